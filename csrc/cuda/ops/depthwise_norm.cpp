// A depthwise convolution on CUDA with what follows it: BatchNorm by the batch's statistics and the activation, and their
// backward; the mean of each of its planes.
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
constexpr const char* kPooled = "depthwise_conv2d_pooled";

// A convolution's forward pass that may leave its tiles' statistics.
struct StatisticsCall {
  const Device& device;
  Tensor x, w;
  Request request;
  bool by_image;

  StatisticsCall(const Device& on, const ConvolutionShape& s, const Tensor& input, const Tensor& weight, const Tensor& output,
                 bool of_images)
      : device(on), by_image(of_images) {
    const Layout layout = layout_of(input);
    x = as_layout(input, layout), w = dense(weight);
    request.multiplier = s.multiplier;
    request.aligned = aligned_start(w) ? aligned_runs(layout, x, output) : 0;
    set_problem(request.problem, s, layout);
    set_input(request.problem, x);
    set_output(request.problem, output);
  }
  const DepthwiseStatisticsPlan& plan(const Forced& forced) const {
    Request one = request;
    one.forced = forced;
    const Gpu& gpu = device.gpu();
    const PlanKey key = plan_key(Op::kDepthwiseNorm, by_image ? Pass::kJoinMeans : Pass::kForward, one, gpu);
    return planned<DepthwiseStatisticsPlan>(key, [&] { return plan_depthwise_statistics(one, by_image, gpu); });
  }
  // The statistics of a plan's parts.
  Tensor run(const DepthwiseStatisticsPlan& plan, const MaybeTensor& bias, const Activation& activation, const Tensor& output,
             const std::string& timed) const {
    log_plan(Op::kDepthwiseNorm, Pass::kForward, request.problem, 0, plan.reason, plan.launch, timed);
    DepthwiseStatisticsArgs args = plan.args;
    DepthwiseTileArgs& conv = args.convolution;
    const MaybeTensor b = bias ? MaybeTensor(dense(*bias)) : std::nullopt;
    conv.input = x.const_data_ptr();
    conv.weight = w.const_data_ptr();
    conv.bias = b ? b->const_data_ptr() : nullptr;
    conv.output = output.mutable_data_ptr();
    conv.problem.activation = activation;
    const int64_t channels = by_image ? output.size(0) * output.size(1) : output.size(1);
    const Tensor partial = device.empty(output, Ints{plan.parts, 3, channels}, accumulate_scalar(conv.problem.dtype));
    args.partial = partial.mutable_data_ptr();
    device.launch(plan.launch, &args);
    return partial;
  }
};

// Whether the convolution alone is torch's, where nothing was timed.
bool convolution_is_for_torch(Pass pass, const Request& request, const Gpu& gpu) {
  Work work = {Op::kDepthwise, pass, pass, request};
  return request.forced == Forced{} && faster_in_torch(work, gpu) != nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_norm_act(const Tensor& input, const Tensor& weight,
                                                              const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                                                              const Ints stride, const Ints padding, const Ints dilation,
                                                              double eps, const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kForward, input, weight, std::nullopt, stride, padding, dilation);
  check_sides(kForward, s);
  const Device device(kForward, input);
  const Tensor middle = device.empty(input, {s.batch, s.channels * s.multiplier, s.out_h, s.out_w}, layout_of(input));
  const auto norm_of = [&](const Tensor& t) {
    return NormCall(kForward, t, norm_weight, norm_bias, eps, act, slope, {"input", "norm_weight", "norm_bias"});
  };
  NormCall norm = norm_of(middle);  // whose checks come before any kernel
  const StatisticsCall call(device, s, input, weight, middle, false);
  const auto convolve = [&] { return depthwise_conv2d(input, weight, std::nullopt, stride, padding, dilation, "identity", 0); };
  Work work = {Op::kDepthwiseNorm, Pass::kForward, Pass::kForward, call.request};
  std::string timed;
  if (call.plan(call.request.forced).parts > 0) {
    const auto run = [&](const Request& way) {
      if (way.forced.fusion == Fusion::kNever) {
        const Tensor output = convolve();
        norm_of(output).statistics();
      } else {
        const DepthwiseStatisticsPlan& plan = call.plan(way.forced);
        norm.statistics(call.run(plan, std::nullopt, {}, middle, ""), plan.parts);
      }
    };
    timed = tune(device, &work, run, convolve);
  }
  const DepthwiseStatisticsPlan& plan = call.plan(work.request.forced);
  if (plan.parts == 0 || convolution_is_for_torch(Pass::kForward, work.request, device.gpu())) {
    const Tensor output = convolve();
    NormCall apart = norm_of(output);
    const auto [mean, variance] = apart.statistics();
    return {apart.values(), output, mean, variance};
  }
  const auto [mean, variance] = norm.statistics(call.run(plan, std::nullopt, {}, middle, timed), plan.parts);
  return {norm.values(), middle, mean, variance};
}

std::tuple<Tensor, Tensor> depthwise_conv2d_pooled(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                                                   const Ints stride, const Ints padding, const Ints dilation,
                                                   const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kPooled, input, weight, bias, stride, padding, dilation);
  const Activation activation = check_activation(kPooled, "act", act, slope);
  check_sides(kPooled, s);
  const int64_t channels = s.channels * s.multiplier;
  const Device device(kPooled, input);
  Tensor output = device.empty(input, {s.batch, channels, s.out_h, s.out_w}, layout_of(input));
  if (output.numel() > 0) {
    const StatisticsCall call(device, s, input, weight, output, true);
    const DepthwiseStatisticsPlan& plan = call.plan(call.request.forced);
    if (plan.parts > 0) {
      const Tensor partial = call.run(plan, bias, activation, output, "");
      const Tensor mean = device.empty(input, {s.batch, channels, 1, 1}, Layout::kNCHW);
      const JoinPartsArgs args = {partial.const_data_ptr(), nullptr,   mean.mutable_data_ptr(), nullptr, 0,
                                  s.batch * channels,       plan.parts};
      device.launch(plan_join_parts(Pass::kJoinMeans, s.dtype, args.channels, device.gpu()).launch, &args);
      return {output, mean};
    }
    output = Tensor();  // its memory first
    output = depthwise_conv2d(input, weight, bias, stride, padding, dilation, act, slope);
  }
  return {output, torch_mean_of_pixels(output)};
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
  const auto plan_of = [&](const Forced& forced) -> const DepthwiseNormPlan& {
    Request one = request;
    one.forced = forced;
    return planned<DepthwiseNormPlan>(plan_key(Op::kDepthwiseNorm, Pass::kBackward, one, gpu),
                                      [&] { return plan_depthwise_norm(one, gpu); });
  };
  const auto apart = [&] {
    return depthwise_conv2d_backward(norm.grad_input(), input, weight, stride, padding, dilation,
                                     {output_mask[0], output_mask[1], false});
  };
  const auto together = [&](const DepthwiseNormPlan& plan) -> Pair {
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
    return {grad_input, grad_weight};
  };
  const bool both = output_mask[0] && output_mask[1] && layout_of(input) == layout;
  Work work = {Op::kDepthwiseNorm, Pass::kBackward, Pass::kBackward, request};
  std::string timed;
  if (both && plan_of(request.forced).launch.launch.row != nullptr) {
    const auto run = [&](const Request& way) {
      if (way.forced.fusion == Fusion::kNever) {
        apart();
      } else {
        together(plan_of(way.forced));
      }
    };
    timed = tune(device, &work, run, apart);
  }
  const DepthwiseNormPlan& plan = plan_of(work.request.forced);
  log_plan(Op::kDepthwiseNorm, Pass::kBackward, p, 0, plan.reason, plan.launch.launch, timed);
  if (!both || !plan.fused || convolution_is_for_torch(Pass::kBackward, work.request, gpu)) {
    const auto [grad_input, grad_weight, unused] = apart();
    return {grad_input, grad_weight, grad_norm_weight, grad_norm_bias};
  }
  const auto [grad_input, grad_weight] = together(plan);
  return {grad_input, grad_weight, grad_norm_weight, grad_norm_bias};
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_conv2d_pooled", TORCH_BOX(&dwconv::cuda::depthwise_conv2d_pooled));
  m.impl("depthwise_norm_act", TORCH_BOX(&dwconv::cuda::depthwise_norm_act));
  m.impl("depthwise_norm_act_backward", TORCH_BOX(&dwconv::cuda::depthwise_norm_act_backward));
}
