// A depthwise convolution with BatchNorm by the batch's statistics and the activation after it, and its backward, on CUDA.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "cuda/ops/batch_norm.h"
#include "cuda/ops/depthwise.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kForward = "depthwise_norm_act";
constexpr const char* kOp = "depthwise_norm_act_backward";

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_norm_act(const Tensor& input, const Tensor& weight,
                                                              const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                                              const Ints stride, const Ints padding, const Ints dilation,
                                                              double eps, const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kForward, input, weight, std::nullopt, stride, padding, dilation);
  check_sides(kForward, s);
  const Device device(kForward, input);
  const Layout layout = layout_of(input);
  const Tensor middle = device.empty(input, {s.batch, s.channels * s.multiplier, s.out_h, s.out_w}, layout);
  NormCall norm(kForward, middle, norm_weight, norm_bias, eps, act, slope, {"input", "norm_weight", "norm_bias"});
  const Tensor x = as_layout(input, layout), w = dense(weight);
  Request request;
  request.multiplier = s.multiplier;
  request.aligned = aligned_start(w) ? aligned_runs(layout, x, middle) : 0;
  set_problem(request.problem, s, layout);
  set_input(request.problem, x);
  set_output(request.problem, middle);
  const Gpu& gpu = device.gpu();
  const DepthwiseStatisticsPlan& plan = planned<DepthwiseStatisticsPlan>(
      plan_key(Op::kDepthwiseNorm, Pass::kForward, request, gpu), [&] { return plan_depthwise_statistics(request, gpu); });
  log_plan(Op::kDepthwiseNorm, Pass::kForward, request.problem, 0, plan.reason, plan.launch, "");
  DepthwiseStatisticsArgs args = plan.args;
  args.convolution.input = x.const_data_ptr();
  args.convolution.weight = w.const_data_ptr();
  args.convolution.output = middle.mutable_data_ptr();
  if (plan.parts == 0) {
    device.launch(plan.launch, &args.convolution);
    const auto [mean, variance] = norm.statistics();
    return {norm.values(), middle, mean, variance};
  }
  const Tensor partial = device.empty(input, Ints{plan.parts, 3, s.channels}, accumulate_scalar(s.dtype));
  args.partial = partial.mutable_data_ptr();
  device.launch(plan.launch, &args);
  const auto [mean, variance] = norm.statistics(partial, plan.parts);
  return {norm.values(), middle, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_norm_act_backward(
    const Tensor& grad_output, const Tensor& middle, const Tensor& input, const Tensor& weight, const MaybeTensor& norm_weight,
    const MaybeTensor& norm_bias, const Tensor& mean, const Tensor& variance, const Ints stride, const Ints padding,
    const Ints dilation, double eps, const std::string act, double slope, const std::vector<bool> output_mask) {
  const ConvolutionShape s = check_convolution(kOp, input, "weight", weight, stride, padding, dilation);
  check_output_like(kOp, "middle", middle, input, s);
  DWCONV_CHECK(output_mask.size() == 2, kOp, ": output_mask must have 2 values, but got ", output_mask.size());
  NormCall norm(kOp, middle, norm_weight, norm_bias, eps, act, slope, {"middle", "norm_weight", "norm_bias"});
  norm.set_grad_output(grad_output);
  norm.set_statistics(mean, variance);
  check_sides(kOp, s);
  const auto [grad_norm_weight, grad_norm_bias] = norm.grad_sums();

  const Device device(kOp, input);
  Request request;
  DepthwiseProblem& p = request.problem;
  const Layout layout = layout_of(middle);
  set_problem(p, s, layout);
  const Tensor x = dense(input, layout), w = dense(weight);
  set_input(p, x);
  request.multiplier = s.multiplier;
  request.aligned = aligned_runs(layout, x, norm.input()) > 0 && aligned_start(norm.grad_output()) && aligned_start(w) ? 16 : 0;
  const Gpu& gpu = device.gpu();
  const DepthwiseNormPlan& plan = planned<DepthwiseNormPlan>(plan_key(Op::kDepthwiseNorm, Pass::kBackward, request, gpu),
                                                             [&] { return plan_depthwise_norm(request, gpu); });
  log_plan(Op::kDepthwiseNorm, Pass::kBackward, p, 0, plan.reason, plan.launch.launch, "");
  if (!plan.fused || !output_mask[0] || !output_mask[1]) {
    const auto [grad_input, grad_weight, unused] = depthwise_conv2d_backward(norm.grad_input(), input, weight, stride, padding,
                                                                             dilation, {output_mask[0], output_mask[1], false});
    return {grad_input, grad_weight, grad_norm_weight, grad_norm_bias};
  }
  const int64_t taps = s.kernel_h * s.kernel_w;
  const Tensor grad_input = device.empty(input, {s.batch, s.channels, s.in_h, s.in_w}, layout);
  const Tensor grad_weight = device.empty(input, {s.channels, 1, s.kernel_h, s.kernel_w}, input.scalar_type());
  const Tensor partial = device.empty(input, Ints{plan.args.parts, s.channels * taps}, accumulate_scalar(s.dtype));
  DepthwiseNormArgs args = plan.args;
  norm.set(&args.norm, norm.count());
  args.input = x.const_data_ptr();
  args.weight = w.const_data_ptr();
  args.grad_input = grad_input.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  device.launch(plan.launch.launch, &args);
  SumPartsArgs sum;
  const LaunchPlan sum_plan = plan_sum_parts(s.dtype, s.channels * taps, 0, args.parts, gpu, &sum);
  sum.partial[0] = partial.const_data_ptr();
  sum.output[0] = grad_weight.mutable_data_ptr();
  device.launch_behind(sum_plan.launch, &sum);
  return {grad_input, grad_weight, grad_norm_weight, grad_norm_bias};
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_norm_act", TORCH_BOX(&dwconv::cuda::depthwise_norm_act));
  m.impl("depthwise_norm_act_backward", TORCH_BOX(&dwconv::cuda::depthwise_norm_act_backward));
}
