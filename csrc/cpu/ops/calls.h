// Ops that other ops call without the dispatcher.
#pragma once

#include "common/checks.h"

namespace dwconv {

using OptionalTensor = std::optional<Tensor>;

Tensor depthwise_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints filter, int64_t act, double slope);
Tensor pointwise_conv2d(const Tensor& input, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t act,
                        double slope, const OptionalTensor& residual, const OptionalTensor& gate, bool allow_tf32);
Tensor patch_conv2d(const Tensor& input, const Tensor& packed, const Ints filter, int64_t act, double slope, bool channels_last);
Tensor linear(const Tensor& input, const Tensor& packed, int64_t out_features, int64_t act, double slope);
Tensor separable_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints block, const std::vector<double> slopes,
                               const OptionalTensor& residual, bool allow_tf32);
Tensor inverted_residual(const Tensor& input, const Tensor& expand, int64_t hidden, int64_t expand_act, double expand_slope,
                         const Tensor& packed, const Ints block, const std::vector<double> slopes, const OptionalTensor& residual,
                         bool allow_tf32);
Tensor squeeze_excitation(const Tensor& input, const Tensor& reduce_weight, const OptionalTensor& reduce_bias,
                          const Tensor& expand_weight, const OptionalTensor& expand_bias, const std::string act,
                          const std::string gate, double slope);
Tensor layer_norm2d(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps);
Tensor max_pool2d(const Tensor& input, const Ints kernel_size, const Ints stride, const Ints padding, const Ints dilation);
Tensor interleave_channels(const Tensor& first, const Tensor& second);
Tensor global_average_pool(const Tensor& input, bool keepdim);

}  // namespace dwconv
