// depthwise_conv1d_step on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

Tensor depthwise_conv1d_step(const Tensor& input, Tensor state, const Tensor& weight, const std::optional<Tensor>& bias,
                             int64_t dilation, const std::string act, double slope) {
  constexpr const char* kOp = "depthwise_conv1d_step";
  DWCONV_CHECK(input.dim() == 2, kOp, ": input must be 2-dimensional (N, C), but got shape ", to_string(input));
  StepArgs args;
  CpuProblem& p = args.problem;
  p.dtype = p.out_dtype = check_dtype(kOp, "input", input);
  p.batch = input.size(0), p.channels = input.size(1);
  p.in_h = p.in_w = p.out_h = p.out_w = p.kernel_h = 1;
  DWCONV_CHECK(p.channels > 0, kOp, ": input must have at least one channel, but got shape ", to_string(input));
  check_like_input(kOp, "weight", weight, input);
  DWCONV_CHECK(weight.dim() == 3 && weight.size(0) == p.channels && weight.size(1) == 1 && weight.size(2) > 0, kOp,
               ": weight must have shape (", p.channels, ", 1, k), but got ", to_string(weight));
  p.kernel_w = weight.size(2), p.dilation_w = dilation;
  DWCONV_CHECK(dilation > 0, kOp, ": dilation must be positive, but got ", dilation);
  int64_t length = 0;
  DWCONV_CHECK(!__builtin_mul_overflow(p.kernel_w - 1, dilation, &length), kOp,
               ": dilation must fit 64 bits with the filter, but got ", dilation);
  check_shaped(kOp, "state", state, {p.batch, p.channels, length}, input);
  for (int64_t d = 0; d < 3; ++d) {
    DWCONV_CHECK(state.size(d) <= 1 || state.stride(d) != 0, kOp,
                 ": state must not be expanded: it is written, and the stride of its dimension ", d, " is 0");
  }
  if (bias) check_vector(kOp, "bias", *bias, p.channels, input);
  p.activation = check_activation(kOp, "act", act, slope);
  p.in_stride_n = input.stride(0), p.in_stride_c = input.stride(1);
  args.state_stride_n = state.stride(0), args.state_stride_c = state.stride(1), args.state_stride_w = state.stride(2);

  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  const int64_t strides[] = {p.channels, 1};
  const Tensor output = empty_strided(kOp, input, {p.batch, p.channels}, strides);
  args.input = input.const_data_ptr();
  args.state = state.mutable_data_ptr();
  args.weight = w.const_data_ptr();
  args.bias = bias ? b.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  const Plan& plan = plan_for<Plan>(Op::kDepthwiseStep, Pass::kForward, p, 0,
                                    [&](const IsaKernels& isa, const Machine& here) { return plan_step(p, isa, here); });
  log_plan(p, plan);
  run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->step(args, scratch, tiles); });
  return output;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("depthwise_conv1d_step", TORCH_BOX(&dwconv::depthwise_conv1d_step)); }
