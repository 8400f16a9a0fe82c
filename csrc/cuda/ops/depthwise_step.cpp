// depthwise_conv1d_step on CUDA: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "common/step_checks.h"
#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

Tensor depthwise_conv1d_step(const Tensor& input, Tensor state, const Tensor& weight, const std::optional<Tensor>& bias,
                             int64_t dilation, const std::string act, double slope) {
  const DepthwiseProblem p = check_step<DepthwiseProblem>(input, state, weight, bias, dilation, act, slope);
  const Device device(kStep, input);
  const Tensor output = step_output(input);
  if (output.numel() == 0) return output;
  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  StepArgs args;
  args.input = input.const_data_ptr();
  args.state = state.mutable_data_ptr();
  args.weight = w.const_data_ptr();
  args.bias = bias ? b.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.batch = p.batch, args.channels = p.channels, args.taps = p.kernel_w, args.dilation = dilation;
  args.in_stride_n = p.in_stride_n, args.in_stride_c = p.in_stride_c;
  args.state_stride_n = state.stride(0), args.state_stride_c = state.stride(1), args.state_stride_w = state.stride(2);
  args.activation = p.activation;
  const LaunchPlan plan = plan_step(p.dtype, p.batch * p.channels, p.kernel_w, dilation);
  log_plan(Op::kDepthwiseStep, Pass::kForward, p, 0, plan.reason, plan.launch, {});
  device.launch(plan.launch, &args);
  return output;
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_conv1d_step", TORCH_BOX(&dwconv::cuda::depthwise_conv1d_step));
}
