// depthwise_conv1d_step on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "common/step_checks.h"
#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

Tensor depthwise_conv1d_step(const Tensor& input, Tensor state, const Tensor& weight, const std::optional<Tensor>& bias,
                             int64_t dilation, const std::string act, double slope) {
  StepArgs args;
  args.problem = check_step<CpuProblem>(input, state, weight, bias, dilation, act, slope);
  const CpuProblem& p = args.problem;
  args.state_stride_n = state.stride(0), args.state_stride_c = state.stride(1), args.state_stride_w = state.stride(2);

  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  const Tensor output = step_output(input);
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
