// Checks of the fused block's arguments, shared by the CPU and the CUDA op. See checks.h.
#pragma once

#include "checks.h"

namespace dwconv {
namespace {

constexpr const char* kSeparable = "separable_conv2d";

inline ConvolutionShape check_separable(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints& stride,
                                        const Ints& padding, const Ints& dilation, const std::optional<Tensor>& residual) {
  const ConvolutionShape s = check_convolution(kSeparable, input, "dw_weight", dw_weight, stride, padding, dilation);
  STD_TORCH_CHECK(s.multiplier == 1, kSeparable, ": dw_weight must have one filter per channel of input (", s.channels,
                  "), but got shape ", to_string(dw_weight));
  check_like_input(kSeparable, "pw_weight", pw_weight, input);
  STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) > 0 && pw_weight.size(1) == s.channels && pw_weight.size(2) == 1 &&
                      pw_weight.size(3) == 1,
                  kSeparable, ": pw_weight must have shape (out_channels, ", s.channels, ", 1, 1), but got ",
                  to_string(pw_weight));
  const int64_t out_channels = pw_weight.size(0);
  if (dw_bias) check_vector(kSeparable, "dw_bias", *dw_bias, s.channels, input);
  if (pw_bias) check_vector(kSeparable, "pw_bias", *pw_bias, out_channels, input);
  if (residual) {
    check_like_input(kSeparable, "residual", *residual, input);
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == s.batch && residual->size(1) == out_channels &&
                        residual->size(2) == s.out_h && residual->size(3) == s.out_w,
                    kSeparable, ": residual must have the output's shape [", s.batch, ", ", out_channels, ", ", s.out_h, ", ",
                    s.out_w, "], but got ", to_string(*residual));
  }
  return s;
}

}  // namespace
}  // namespace dwconv
