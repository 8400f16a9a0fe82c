// depthwise_conv2d's backward, for an op that has its grad_output made by another kernel. Include after defining
// TORCH_TARGET_VERSION.
#pragma once

#include <tuple>
#include <vector>

#include "common/checks.h"

namespace dwconv::cuda {

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                             const Ints stride, const Ints padding, const Ints dilation,
                                                             const std::vector<bool> output_mask);

}  // namespace dwconv::cuda
