// Ops that other ops call without the dispatcher.
#pragma once

#include "common/checks.h"

namespace dwconv::cuda {

using OptionalTensor = std::optional<Tensor>;

Tensor pointwise_conv2d(const Tensor& input, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t act,
                        double slope, const OptionalTensor& residual, const OptionalTensor& gate, bool allow_tf32);
Tensor separable_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints block, const std::vector<double> slopes,
                               const OptionalTensor& residual, bool allow_tf32);

}  // namespace dwconv::cuda
