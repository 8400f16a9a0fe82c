// depthwise_conv2d and its backward on CUDA: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kForward = "depthwise_conv2d";
constexpr const char* kBackward = "depthwise_conv2d_backward";

struct DepthwisePlan {
  LaunchPlan plan;
  DepthwiseTileArgs args;
};
struct BackwardWeightPlan {
  LaunchPlan plan;
  BackwardWeightTileArgs args;
};
struct BackwardPlan {
  LaunchPlan plan;
  BackwardTileArgs args;
};

const DepthwisePlan& plan_for(Pass pass, const Request& request, const Gpu& gpu) {
  return planned<DepthwisePlan>(plan_key(Op::kDepthwise, pass, request, gpu), [&] {
    DepthwisePlan made;
    made.plan = plan_depthwise(pass, request, gpu, &made.args);
    return made;
  });
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation, const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kForward, input, weight, bias, stride, padding, dilation);
  const Activation activation = check_activation(kForward, "act", act, slope);
  check_sides(kForward, s);
  const Layout layout = layout_of(input);
  const Device device(kForward, input);
  const Tensor output = device.empty(input, {s.batch, s.channels * s.multiplier, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;
  const Tensor x = as_layout(input, layout);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
  Request request;
  request.multiplier = s.multiplier;
  request.aligned = aligned_start(w) ? aligned_runs(layout, x, output) : 0;
  set_problem(request.problem, s, layout);
  set_input(request.problem, x);
  set_output(request.problem, output);
  const DepthwisePlan& planned = plan_for(Pass::kForward, request, device.gpu());
  log_plan(Op::kDepthwise, Pass::kForward, request.problem, 0, planned.plan.reason, planned.plan.launch);
  DepthwiseTileArgs args = planned.args;
  args.input = x.const_data_ptr();
  args.weight = w.const_data_ptr();
  args.bias = bias ? b.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.problem.activation = activation;  // a short one; a long one is a pass of its own
  device.launch(planned.plan.launch, &args);
  if (!is_inlined(activation.kind)) {
    const ActivateArgs values = {output.const_data_ptr(), output.mutable_data_ptr(), output.numel(), activation};
    device.launch(plan_activation(request.problem.dtype, values.count, device.gpu()).launch, &values);
  }
  return output;
}

// At stride and dilation 1 the input gradient is the forward pass of grad_output with the flipped filter and padding K - 1 - P.
bool is_mirrored(const ConvolutionShape& s) {
  return s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.multiplier == 1;
}

Request request_to_input(const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& weight,
                         const Tensor& grad_input) {
  Request request;
  request.multiplier = s.multiplier;
  request.aligned = aligned_start(weight) ? aligned_runs(layout, grad, grad_input) : 0;
  DepthwiseProblem& p = request.problem;
  set_problem(p, s, layout);
  std::swap(p.in_h, p.out_h);
  std::swap(p.in_w, p.out_w);
  set_input(p, grad);
  set_output(p, grad_input);
  if (is_mirrored(s)) p.pad_h = s.kernel_h - 1 - s.pad_h, p.pad_w = s.kernel_w - 1 - s.pad_w;
  return request;
}

Request request_to_weight(const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& input) {
  Request request;
  request.multiplier = s.multiplier;
  request.aligned = aligned_runs(layout, grad, input);
  set_problem(request.problem, s, layout);
  set_input(request.problem, input);
  set_output(request.problem, grad);
  return request;
}

void set_tensors(DepthwiseTileArgs* args, const ConvolutionShape& s, const Tensor& grad, const Tensor& weight,
                 const Tensor& grad_input) {
  args->flipped = is_mirrored(s);
  args->input = grad.const_data_ptr();
  args->weight = weight.const_data_ptr();
  args->output = grad_input.mutable_data_ptr();
}

void backward_input(const Device& device, const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& weight,
                    const Tensor& grad_input) {
  const Request request = request_to_input(s, layout, grad, weight, grad_input);
  const DepthwisePlan& planned = plan_for(is_mirrored(s) ? Pass::kForward : Pass::kBackwardInput, request, device.gpu());
  log_plan(Op::kDepthwise, Pass::kBackwardInput, request.problem, 0, planned.plan.reason, planned.plan.launch);
  DepthwiseTileArgs args = planned.args;
  set_tensors(&args, s, grad, weight, grad_input);
  device.launch(planned.plan.launch, &args);
}

// The first stage by first(args), then the second where there are several parts.
template <class First>
void sum_weight(const Device& device, const ConvolutionShape& s, const Tensor& grad, const Tensor& input,
                const Tensor* grad_weight, const Tensor* grad_bias, BackwardWeightTileArgs* args, const First& first) {
  const int64_t outputs = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  const int64_t weights = grad_weight != nullptr ? outputs * taps : 0, biases = grad_bias != nullptr ? outputs : 0;
  void* const to_weight = weights > 0 ? grad_weight->mutable_data_ptr() : nullptr;
  void* const to_bias = biases > 0 ? grad_bias->mutable_data_ptr() : nullptr;
  args->input = input.const_data_ptr();
  args->grad_output = grad.const_data_ptr();
  if (args->parts == 1) {
    args->partial = to_weight, args->partial_bias = to_bias;
    return first();
  }
  const auto workspace = [&](int64_t size) { return device.empty(grad, Ints{args->parts, size}, accumulate_scalar(s.dtype)); };
  const Tensor partial = workspace(weights), partial_bias = workspace(biases);
  args->partial = weights > 0 ? partial.mutable_data_ptr() : nullptr;
  args->partial_bias = biases > 0 ? partial_bias.mutable_data_ptr() : nullptr;
  first();
  SumPartsArgs second;
  const LaunchPlan sum = plan_sum_parts(s.dtype, weights, biases, args->parts, device.gpu(), &second);
  second.partial[0] = args->partial, second.partial[1] = args->partial_bias;
  second.output[0] = to_weight, second.output[1] = to_bias;
  device.launch_behind(sum.launch, &second);
}

void backward_weight(const Device& device, const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& input,
                     const Tensor* grad_weight, const Tensor* grad_bias) {
  const Request request = request_to_weight(s, layout, grad, input);
  const Gpu& gpu = device.gpu();
  const BackwardWeightPlan& planned =
      dwconv::planned<BackwardWeightPlan>(plan_key(Op::kDepthwise, Pass::kBackwardWeight, request, gpu), [&] {
        BackwardWeightPlan made;
        made.plan = plan_backward_weight(request, gpu, &made.args);
        return made;
      });
  log_plan(Op::kDepthwise, Pass::kBackwardWeight, request.problem, 0, planned.plan.reason, planned.plan.launch);
  BackwardWeightTileArgs args = planned.args;
  sum_weight(device, s, grad, input, grad_weight, grad_bias, &args, [&] { device.launch(planned.plan.launch, &args); });
}

// All gradients in one launch, and a second one for several parts; false where they are better apart.
bool backward_at_once(const Device& device, const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& input,
                      const Tensor& weight, const Tensor& grad_input, const Tensor* grad_weight, const Tensor* grad_bias) {
  if (!is_mirrored(s)) return false;
  const Request to_input = request_to_input(s, layout, grad, weight, grad_input);
  Request request = request_to_weight(s, layout, grad, input);
  request.aligned = std::min(request.aligned, to_input.aligned);
  const Gpu& gpu = device.gpu();
  const BackwardPlan& planned = dwconv::planned<BackwardPlan>(plan_key(Op::kDepthwise, Pass::kBackward, request, gpu), [&] {
    BackwardPlan made;
    made.plan = plan_backward(to_input, request, gpu, &made.args);
    return made;
  });
  if (planned.plan.launch.row == nullptr) return false;
  log_plan(Op::kDepthwise, Pass::kBackward, request.problem, 0, planned.plan.reason, planned.plan.launch);
  BackwardTileArgs args = planned.args;
  set_tensors(&args.input, s, grad, weight, grad_input);
  sum_weight(device, s, grad, input, grad_weight, grad_bias, &args.weight, [&] { device.launch(planned.plan.launch, &args); });
  return true;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                             const Ints stride, const Ints padding, const Ints dilation,
                                                             const std::vector<bool> output_mask) {
  const ConvolutionShape s = check_convolution(kBackward, input, "weight", weight, stride, padding, dilation);
  check_grad_output(kBackward, grad_output, input, s);
  check_mask(kBackward, output_mask);
  check_sides(kBackward, s);
  const Layout layout = layout_of(input);
  const Device device(kBackward, input);
  const auto empty = [&](const Ints& size) { return device.empty(input, size, input.scalar_type()); };
  const Tensor grad_input = output_mask[0] ? device.empty(input, {s.batch, s.channels, s.in_h, s.in_w}, layout) : empty({0});
  const Tensor grad_weight = output_mask[1] ? empty({s.channels * s.multiplier, 1, s.kernel_h, s.kernel_w}) : empty({0});
  const Tensor grad_bias = output_mask[2] ? empty({s.channels * s.multiplier}) : empty({0});
  const Tensor grad = as_layout(grad_output, layout);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor* const to_weight = output_mask[1] ? &grad_weight : nullptr;
  const Tensor* const to_bias = output_mask[2] ? &grad_bias : nullptr;
  const bool sums = output_mask[1] || output_mask[2];
  const Tensor x = sums ? as_layout(input, layout) : input;
  if (grad_input.numel() > 0 && sums && backward_at_once(device, s, layout, grad, x, w, grad_input, to_weight, to_bias)) {
    return {grad_input, grad_weight, grad_bias};
  }
  if (grad_input.numel() > 0) backward_input(device, s, layout, grad, w, grad_input);
  if (sums) backward_weight(device, s, layout, grad, x, to_weight, to_bias);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::cuda::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&dwconv::cuda::depthwise_conv2d_backward));
}
