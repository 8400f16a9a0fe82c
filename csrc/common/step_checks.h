// depthwise_conv1d_step's arguments, checked, as both devices' kernels take them. Internal linkage, as in checks.h.
#pragma once

#include "common/tensors.h"

namespace dwconv {
namespace {

constexpr const char* kStep = "depthwise_conv1d_step";

// The problem, of one row of one sample: batch, channels, kernel_w, dilation_w, dtype, activation, the input's strides n and c.
template <class Problem>
Problem check_step(const Tensor& input, const Tensor& state, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t dilation, const std::string& act, double slope) {
  DWCONV_CHECK(input.dim() == 2, kStep, ": input must be 2-dimensional (N, C), but got shape ", to_string(input));
  Problem p;
  p.dtype = p.out_dtype = check_dtype(kStep, "input", input);
  p.batch = input.size(0), p.channels = input.size(1);
  p.in_h = p.in_w = p.out_h = p.out_w = p.kernel_h = 1;
  DWCONV_CHECK(p.channels > 0, kStep, ": input must have at least one channel, but got shape ", to_string(input));
  check_like_input(kStep, "weight", weight, input);
  DWCONV_CHECK(weight.dim() == 3 && weight.size(0) == p.channels && weight.size(1) == 1 && weight.size(2) > 0, kStep,
               ": weight must have shape (", p.channels, ", 1, k), but got ", to_string(weight));
  p.kernel_w = weight.size(2), p.dilation_w = dilation;
  DWCONV_CHECK(dilation > 0, kStep, ": dilation should be greater than zero, but got ", dilation);
  int64_t length = 0;
  DWCONV_CHECK(!__builtin_mul_overflow(p.kernel_w - 1, dilation, &length), kStep,
               ": dilation must fit 64 bits with the filter, but got ", dilation);
  check_shaped(kStep, "state", state, {p.batch, p.channels, length}, input);
  for (int64_t d = 0; d < 3; ++d) {
    DWCONV_CHECK(state.size(d) <= 1 || state.stride(d) != 0, kStep,
                 ": state must not be expanded: it is written, and the stride of its dimension ", d, " is 0");
  }
  if (bias) check_vector(kStep, "bias", *bias, p.channels, input);
  p.activation = check_activation(kStep, "act", act, slope);
  p.in_stride_n = input.stride(0), p.in_stride_c = input.stride(1);
  return p;
}

inline Tensor step_output(const Tensor& input) {
  const int64_t strides[] = {input.size(1), 1};
  return empty_strided(kStep, input, shape_of(input), strides);
}

}  // namespace
}  // namespace dwconv
