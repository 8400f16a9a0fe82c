// Checks of the fused block's arguments, shared by the CPU and the CUDA op. See checks.h.
#pragma once

#include "common/checks.h"

namespace dwconv {
namespace {

constexpr const char* kSeparable = "separable_conv2d";

// The pointwise convolution after a depthwise one of `channels`, and both biases; `like` has the dtype and device.
inline void check_pointwise(const char* op, const std::optional<Tensor>& dw_bias, const Tensor& pw_weight,
                            const std::optional<Tensor>& pw_bias, int64_t channels, const Tensor& like) {
  check_like_input(op, "pw_weight", pw_weight, like);
  DWCONV_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) > 0 && pw_weight.size(1) == channels && pw_weight.size(2) == 1 &&
                   pw_weight.size(3) == 1,
               op, ": pw_weight must have shape (out_channels, ", channels, ", 1, 1), but got ", to_string(pw_weight));
  if (dw_bias) check_vector(op, "dw_bias", *dw_bias, channels, like);
  if (pw_bias) check_vector(op, "pw_bias", *pw_bias, pw_weight.size(0), like);
}

inline void check_residual(const char* op, const Tensor& residual, const Tensor& input, const ConvolutionShape& s,
                           int64_t out_channels) {
  check_like_input(op, "residual", residual, input);
  DWCONV_CHECK(residual.dim() == 4 && residual.size(0) == s.batch && residual.size(1) == out_channels &&
                   residual.size(2) == s.out_h && residual.size(3) == s.out_w,
               op, ": residual must have the output's shape [", s.batch, ", ", out_channels, ", ", s.out_h, ", ", s.out_w,
               "], but got ", to_string(residual));
}

inline ConvolutionShape check_separable(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints& stride,
                                        const Ints& padding, const Ints& dilation, const std::optional<Tensor>& residual) {
  const ConvolutionShape s = check_convolution(kSeparable, input, "dw_weight", dw_weight, stride, padding, dilation);
  DWCONV_CHECK(s.multiplier == 1, kSeparable, ": dw_weight must have one filter per channel of input (", s.channels,
               "), but got shape ", to_string(dw_weight));
  check_pointwise(kSeparable, dw_bias, pw_weight, pw_bias, s.channels, input);
  check_output(kSeparable, input, s, pw_weight.size(0), padding);
  if (residual) check_residual(kSeparable, *residual, input, s, pw_weight.size(0));
  return s;
}

}  // namespace
}  // namespace dwconv
