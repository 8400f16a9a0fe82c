// depthwise_conv2d and its backward, for ops that have them among other kernels. Include after defining
// TORCH_TARGET_VERSION.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace dwconv::cuda {

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation, const std::string act, double slope);
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                             const Ints stride, const Ints padding, const Ints dilation,
                                                             const std::vector<bool> output_mask);

}  // namespace dwconv::cuda
