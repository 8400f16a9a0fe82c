// depthwise_conv2d, its backward and depthwise_conv_transpose2d on CUDA: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include "cuda/ops/depthwise.h"

#include <torch/csrc/stable/library.h>

#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kForward = "depthwise_conv2d";
constexpr const char* kBackward = "depthwise_conv2d_backward";
constexpr const char* kTransposed = "depthwise_conv_transpose2d";

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

// With an activation: a short one is the kernel's; a long one is a pass of its own, but behind the kernels of lines.
void launch_activated(const Device& device, const DepthwisePlan& planned, DepthwiseTileArgs* args, const Activation& activation,
                      const Tensor& output) {
  args->output = output.mutable_data_ptr();
  args->problem.activation = activation;
  device.launch(planned.plan.launch, args);
  if (is_inlined(activation.kind) || planned.plan.launch.row->family == Family::kLines) return;
  const ActivateArgs values = {output.const_data_ptr(), output.mutable_data_ptr(), output.numel(), activation};
  device.launch(plan_activation(args->problem.dtype, values.count, device.gpu()).launch, &values);
}

// The operands of a backward pass, in the input's layout.
struct Operands {
  const Device& device;
  const ConvolutionShape& s;
  Layout layout;
  const Tensor &grad, &input, &weight;
};

Work input_work(const Operands& o, const Tensor& grad_input) {
  Work work = {Op::kDepthwise, Pass::kBackwardInput, Pass::kBackwardInput};
  work.request.multiplier = o.s.multiplier;
  work.request.aligned = aligned_start(o.weight) ? aligned_runs(o.layout, o.grad, grad_input) : 0;
  set_problem(work.request.problem, o.s, o.layout);
  turn_to_input(&work);
  set_input(work.request.problem, o.grad);
  set_output(work.request.problem, grad_input);
  work.extras = {.view = !is_dense(o.grad, o.layout)};
  work.torch = torch_has(o.s);
  return work;
}

void set_tensors(DepthwiseTileArgs* args, const Operands& o, const Work& work, const Tensor& grad_input) {
  args->flipped = work.kernel_pass == Pass::kForward;
  args->input = o.grad.const_data_ptr();
  args->weight = o.weight.const_data_ptr();
  args->output = grad_input.mutable_data_ptr();
}

// timed: for the log.
void backward_input(const Operands& o, const Work& work, const Request& request, const Tensor& grad_input,
                    const std::string& timed) {
  const DepthwisePlan& planned = plan_for(work.kernel_pass, request, o.device.gpu());
  log_plan(Op::kDepthwise, work.pass, request.problem, 0, planned.plan.reason, planned.plan.launch, timed);
  DepthwiseTileArgs args = planned.args;
  set_tensors(&args, o, work, grad_input);
  o.device.launch(planned.plan.launch, &args);
}

// The input gradient's kernels, with bias and activation.
Tensor depthwise_conv_transpose2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                                  const Ints padding, const Ints output_padding, const Ints dilation, const std::string act,
                                  double slope) {
  ConvolutionShape s = check_transposed(kTransposed, input, weight, bias, stride, padding, output_padding, dilation);
  const Activation activation = check_activation(kTransposed, "act", act, slope);
  check_sides(kTransposed, s);
  s.multiplier = weight.size(1);
  const Layout layout = layout_of(input);
  const Device device(kTransposed, input);
  const Ints size = {s.batch, s.channels * s.multiplier, s.in_h, s.in_w};
  Tensor output = device.empty(input, size, layout);
  if (output.numel() == 0) return output;
  const Tensor x = as_layout(input, layout);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
  const Operands operands = {device, s, layout, x, x, w};
  Work work = input_work(operands, output);
  work.extras = {.activation = activation, .bias = bias.has_value(), .view = !is_dense(x, layout)};
  work.torch = torch_has(activation) && s.multiplier == 1;
  const TorchConvolution theirs(s.channels, stride, padding, output_padding, dilation);
  const auto by_torch = [&] { return in_torch_forward(x, w, bias, theirs, activation, size, layout); };
  const auto by_us = [&](const DepthwisePlan& planned) {
    DepthwiseTileArgs args = planned.args;
    set_tensors(&args, operands, work, output);
    args.bias = bias ? b.const_data_ptr() : nullptr;
    args.spreads = 1;
    launch_activated(device, planned, &args, activation, output);
  };
  std::string timed;
  if (s.multiplier == 1) {
    timed = tune(device, &work, [&](const Request& way) {
      way.forced.source == Source::kTorch ? void(by_torch()) : by_us(plan_for(work.kernel_pass, way, device.gpu()));
    });
  }
  if (is_for_torch(work, device.gpu(), timed)) {
    output = Tensor();  // its memory first
    return by_torch();
  }
  const DepthwisePlan& planned = plan_for(work.kernel_pass, work.request, device.gpu());
  log_plan(Op::kDepthwise, work.pass, work.request.problem, 0, planned.plan.reason, planned.plan.launch, timed);
  by_us(planned);
  return output;
}

Work weight_work(const Operands& o, bool bias) {
  Work work = {Op::kDepthwise, Pass::kBackwardWeight, Pass::kBackwardWeight};
  work.request.multiplier = o.s.multiplier;
  work.request.aligned = aligned_runs(o.layout, o.grad, o.input);
  set_problem(work.request.problem, o.s, o.layout);
  set_input(work.request.problem, o.input);
  set_output(work.request.problem, o.grad);
  work.extras = {.bias = bias, .view = !is_dense(o.input, o.layout) || !is_dense(o.grad, o.layout)};
  work.torch = torch_has(o.s);
  return work;
}

// The first stage by first(), then the second where there are several parts.
template <class First>
void sum_weight(const Operands& o, const Tensor* grad_weight, const Tensor* grad_bias, BackwardWeightTileArgs* args,
                const First& first) {
  const ConvolutionShape& s = o.s;
  const int64_t outputs = s.channels * s.multiplier, taps = s.kernel_h * s.kernel_w;
  const int64_t weights = grad_weight != nullptr ? outputs * taps : 0, biases = grad_bias != nullptr ? outputs : 0;
  void* const to_weight = weights > 0 ? grad_weight->mutable_data_ptr() : nullptr;
  void* const to_bias = biases > 0 ? grad_bias->mutable_data_ptr() : nullptr;
  args->input = o.input.const_data_ptr();
  args->grad_output = o.grad.const_data_ptr();
  if (args->parts == 1) {
    args->partial = to_weight, args->partial_bias = to_bias;
    return first();
  }
  const auto workspace = [&](int64_t size) {
    return o.device.empty(o.grad, Ints{args->parts, size}, accumulate_scalar(s.dtype));
  };
  const Tensor partial = workspace(weights), partial_bias = workspace(biases);
  args->partial = weights > 0 ? partial.mutable_data_ptr() : nullptr;
  args->partial_bias = biases > 0 ? partial_bias.mutable_data_ptr() : nullptr;
  first();
  SumPartsArgs second;
  const LaunchPlan sum = plan_sum_parts(s.dtype, weights, biases, args->parts, o.device.gpu(), &second);
  second.partial[0] = args->partial, second.partial[1] = args->partial_bias;
  second.output[0] = to_weight, second.output[1] = to_bias;
  o.device.launch_behind(sum.launch, &second);
}

void backward_weight(const Operands& o, const Request& request, const Tensor* grad_weight, const Tensor* grad_bias,
                     const std::string& timed) {
  const Gpu& gpu = o.device.gpu();
  const BackwardWeightPlan& planned =
      dwconv::planned<BackwardWeightPlan>(plan_key(Op::kDepthwise, Pass::kBackwardWeight, request, gpu), [&] {
        BackwardWeightPlan made;
        made.plan = plan_backward_weight(request, gpu, &made.args);
        return made;
      });
  log_plan(Op::kDepthwise, Pass::kBackwardWeight, request.problem, 0, planned.plan.reason, planned.plan.launch, timed);
  BackwardWeightTileArgs args = planned.args;
  sum_weight(o, grad_weight, grad_bias, &args, [&] { o.device.launch(planned.plan.launch, &args); });
}

// All gradients in one launch, and a second one for several parts; false where they are better apart.
bool backward_at_once(const Operands& o, const Work& for_input, const Work& for_weight, const Tensor& grad_input,
                      const Tensor* grad_weight, const Tensor* grad_bias) {
  const auto other = [](const Forced& way) { return way.rank > 0 || way.source == Source::kTorch; };
  if (for_input.kernel_pass != Pass::kForward || other(for_input.request.forced) || other(for_weight.request.forced))
    return false;
  Request request = for_weight.request;
  request.aligned = std::min(request.aligned, for_input.request.aligned);
  const Gpu& gpu = o.device.gpu();
  const BackwardPlan& planned = dwconv::planned<BackwardPlan>(plan_key(Op::kDepthwise, Pass::kBackward, request, gpu), [&] {
    BackwardPlan made;
    made.plan = plan_backward(for_input.request, request, gpu, &made.args);
    return made;
  });
  if (planned.plan.launch.row == nullptr) return false;
  log_plan(Op::kDepthwise, Pass::kBackward, request.problem, 0, planned.plan.reason, planned.plan.launch, "");
  BackwardTileArgs args = planned.args;
  set_tensors(&args.input, o, for_input, grad_input);
  sum_weight(o, grad_weight, grad_bias, &args.weight, [&] { o.device.launch(planned.plan.launch, &args); });
  return true;
}

}  // namespace

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation, const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kForward, input, weight, bias, stride, padding, dilation);
  const Activation activation = check_activation(kForward, "act", act, slope);
  check_sides(kForward, s);
  const Layout layout = layout_of(input);
  const Device device(kForward, input);
  const Ints size = {s.batch, s.channels * s.multiplier, s.out_h, s.out_w};
  Tensor output = device.empty(input, size, layout);
  if (output.numel() == 0) return output;
  const Tensor x = as_layout(input, layout);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
  Work work = {Op::kDepthwise, Pass::kForward, Pass::kForward};
  Request& request = work.request;
  request.multiplier = s.multiplier;
  request.aligned = aligned_start(w) ? aligned_runs(layout, x, output) : 0;
  set_problem(request.problem, s, layout);
  set_input(request.problem, x);
  set_output(request.problem, output);
  work.extras = {.activation = activation, .bias = bias.has_value(), .view = !is_dense(x, layout)};
  work.torch = torch_has(s) && torch_has(activation);
  const auto by_torch = [&] { return in_torch_forward(x, w, bias, TorchConvolution(s), activation, size, layout); };
  const auto by_us = [&](const DepthwisePlan& planned) {
    DepthwiseTileArgs args = planned.args;
    args.input = x.const_data_ptr();
    args.weight = w.const_data_ptr();
    args.bias = bias ? b.const_data_ptr() : nullptr;
    launch_activated(device, planned, &args, activation, output);
  };
  const std::string timed = tune(device, &work, [&](const Request& way) {
    way.forced.source == Source::kTorch ? void(by_torch()) : by_us(plan_for(Pass::kForward, way, device.gpu()));
  });
  if (is_for_torch(work, device.gpu(), timed)) {
    output = Tensor();  // its memory first
    return by_torch();
  }
  const DepthwisePlan& planned = plan_for(Pass::kForward, request, device.gpu());
  log_plan(Op::kDepthwise, Pass::kForward, request.problem, 0, planned.plan.reason, planned.plan.launch, timed);
  by_us(planned);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                             const Ints stride, const Ints padding, const Ints dilation,
                                                             const std::vector<bool> output_mask) {
  const ConvolutionShape s = check_convolution(kBackward, input, "weight", weight, stride, padding, dilation);
  check_output_like(kBackward, "grad_output", grad_output, input, s);
  check_mask(kBackward, output_mask);
  check_sides(kBackward, s);
  const Layout layout = layout_of(input);
  const Device device(kBackward, input);
  const Gpu& gpu = device.gpu();
  const auto empty = [&](const Ints& size) { return device.empty(input, size, input.scalar_type()); };
  const Ints input_size = {s.batch, s.channels, s.in_h, s.in_w},
             weight_size = {s.channels * s.multiplier, 1, s.kernel_h, s.kernel_w};
  Tensor grad_input = output_mask[0] ? device.empty(input, input_size, layout) : empty({0});
  Tensor grad_weight = output_mask[1] ? empty(weight_size) : empty({0});
  Tensor grad_bias = output_mask[2] ? empty({weight_size[0]}) : empty({0});
  const bool to_input = grad_input.numel() > 0, to_weight = output_mask[1] || output_mask[2];
  const Tensor grad = as_layout(grad_output, layout);
  const Tensor x = to_weight ? as_layout(input, layout) : input;
  const Tensor w = torch::stable::contiguous(weight);
  const Operands operands = {device, s, layout, grad, x, w};
  const auto by_torch = [&](bool for_input, bool for_weight) {
    const std::array<bool, 3> mask = {for_input, for_weight && output_mask[1], for_weight && output_mask[2]};
    return torch_convolution_backward(grad, x, w, TorchConvolution(s), mask);
  };
  const auto weight_by_us = [&](const Request& way, const std::string& timed) {
    backward_weight(operands, way, output_mask[1] ? &grad_weight : nullptr, output_mask[2] ? &grad_bias : nullptr, timed);
  };

  Work for_input = to_input ? input_work(operands, grad_input) : Work{}, for_weight = weight_work(operands, output_mask[2]);
  std::string timed_input, timed_weight;
  if (to_input) {
    timed_input = tune(device, &for_input, [&](const Request& way) {
      way.forced.source == Source::kTorch ? void(by_torch(true, false))
                                          : backward_input(operands, for_input, way, grad_input, "");
    });
  }
  if (output_mask[1] && x.numel() > 0) {
    timed_weight = tune(device, &for_weight, [&](const Request& way) {
      way.forced.source == Source::kTorch ? void(by_torch(false, true)) : weight_by_us(way, "");
    });
  }
  bool torch_input = to_input && is_for_torch(for_input, gpu, timed_input);
  bool torch_weight = to_weight && x.numel() > 0 && is_for_torch(for_weight, gpu, timed_weight);
  if (to_input && output_mask[1] && for_input.request.forced == Forced{} && for_weight.request.forced == Forced{}) {
    Work both = for_weight;
    both.pass = Pass::kBackward;
    torch_input = torch_weight = is_for_torch(both, gpu, "");
  }
  if (torch_input || torch_weight) {
    if (torch_input) grad_input = Tensor();  // its memory first
    const auto [theirs_input, theirs_weight, theirs_bias] = by_torch(torch_input, torch_weight);
    if (torch_input) grad_input = as_output(theirs_input, input_size, layout);
    if (torch_weight && output_mask[1]) grad_weight = as_output(theirs_weight, weight_size, Layout::kNCHW);
    if (torch_weight && output_mask[2]) grad_bias = theirs_bias;
  }
  const bool both = to_input && to_weight && !torch_input && !torch_weight;
  if (both && backward_at_once(operands, for_input, for_weight, grad_input, output_mask[1] ? &grad_weight : nullptr,
                               output_mask[2] ? &grad_bias : nullptr)) {
    return {grad_input, grad_weight, grad_bias};
  }
  if (to_input && !torch_input) backward_input(operands, for_input, for_input.request, grad_input, timed_input);
  if (to_weight && !torch_weight) weight_by_us(for_weight.request, timed_weight);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::cuda::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&dwconv::cuda::depthwise_conv2d_backward));
  m.impl("depthwise_conv_transpose2d", TORCH_BOX(&dwconv::cuda::depthwise_conv_transpose2d));
}
