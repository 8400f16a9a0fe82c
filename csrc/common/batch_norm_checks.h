// batch_norm_act's checks, the same for both devices. Include after defining TORCH_TARGET_VERSION.
#pragma once

#include "common/checks.h"

namespace dwconv {
namespace {

// What an op calls its arguments.
struct NormNames {
  const char *input = "input", *weight = "weight", *bias = "bias";
};

inline DType check_batch_norm(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, const std::string& act,
                              const NormNames& names = {}) {
  const DType dtype = check_pixels(op, input);
  DWCONV_CHECK(eps >= 0, op, ": eps must be non-negative, but got ", eps);
  check_activation(op, "act", act, 0);
  if (weight) check_wide(op, names.weight, *weight, {input.size(1)}, input, dtype);
  if (bias) check_wide(op, names.bias, *bias, {input.size(1)}, input, dtype);
  return dtype;
}

inline void check_norm_grad(const char* op, const Tensor& grad_output, const Tensor& input, const NormNames& names = {}) {
  check_like_input(op, "grad_output", grad_output, input);
  DWCONV_CHECK(shape_of(grad_output) == shape_of(input), op, ": grad_output must have ", names.input, "'s shape ",
               to_string(input), ", but got ", to_string(grad_output));
}

}  // namespace
}  // namespace dwconv
