// depthwise_conv2d and its backward on CUDA: checks, output allocation, problem, plan, launch.
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

struct DepthwisePlan {
  LaunchPlan plan;
  DepthwiseTileArgs args;
};
struct BackwardWeightPlan {
  LaunchPlan plan;
  BackwardWeightTileArgs args;
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
  work.torch = torch_has(activation);
  const auto by_torch = [&] { return in_torch_forward(x, w, bias, TorchConvolution(s), activation, size, layout); };
  const auto by_us = [&](const DepthwisePlan& planned) {
    DepthwiseTileArgs args = planned.args;
    args.input = x.const_data_ptr();
    args.weight = w.const_data_ptr();
    args.bias = bias ? b.const_data_ptr() : nullptr;
    args.output = output.mutable_data_ptr();
    args.problem.activation = activation;  // a short one; a long one is a pass of its own
    device.launch(planned.plan.launch, &args);
    if (!is_inlined(activation.kind)) {
      const ActivateArgs values = {output.const_data_ptr(), output.mutable_data_ptr(), output.numel(), activation};
      device.launch(plan_activation(request.problem.dtype, values.count).launch, &values);
    }
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
  work.torch = true;
  return work;
}

// timed: for the log.
void backward_input(const Operands& o, const Work& work, const Request& request, const Tensor& grad_input,
                    const std::string& timed) {
  const DepthwisePlan& planned = plan_for(work.kernel_pass, request, o.device.gpu());
  log_plan(Op::kDepthwise, work.pass, request.problem, 0, planned.plan.reason, planned.plan.launch, timed);
  DepthwiseTileArgs args = planned.args;
  args.flipped = work.kernel_pass == Pass::kForward;
  args.input = o.grad.const_data_ptr();
  args.weight = o.weight.const_data_ptr();
  args.output = grad_input.mutable_data_ptr();
  o.device.launch(planned.plan.launch, &args);
}

void sum(const Device& device, DType dtype, const Tensor& partial, int32_t parts, const Tensor& output) {
  SumPartsArgs args;
  const LaunchPlan plan = plan_sum_parts(dtype, output.numel(), parts, &args);
  args.partial = partial.const_data_ptr();
  args.output = output.mutable_data_ptr();
  device.launch(plan.launch, &args);
}

Work weight_work(const Operands& o, bool bias) {
  Work work = {Op::kDepthwise, Pass::kBackwardWeight, Pass::kBackwardWeight};
  work.request.multiplier = o.s.multiplier;
  work.request.aligned = aligned_runs(o.layout, o.grad, o.input);
  set_problem(work.request.problem, o.s, o.layout);
  set_input(work.request.problem, o.input);
  set_output(work.request.problem, o.grad);
  work.extras = {.bias = bias, .view = !is_dense(o.input, o.layout) || !is_dense(o.grad, o.layout)};
  work.torch = true;
  return work;
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
  const int64_t outputs = o.s.channels * o.s.multiplier, taps = o.s.kernel_h * o.s.kernel_w;
  const ScalarType sums = accumulate_scalar(o.s.dtype);
  const auto workspace = [&](int64_t size) { return o.device.empty(o.grad, Ints{args.parts, size}, sums); };
  const Tensor partial = workspace(grad_weight != nullptr ? outputs * taps : 0);
  const Tensor partial_bias = workspace(grad_bias != nullptr ? outputs : 0);
  args.input = o.input.const_data_ptr();
  args.grad_output = o.grad.const_data_ptr();
  args.partial = grad_weight != nullptr ? partial.mutable_data_ptr() : nullptr;
  args.partial_bias = grad_bias != nullptr ? partial_bias.mutable_data_ptr() : nullptr;
  o.device.launch(planned.plan.launch, &args);
  if (grad_weight != nullptr) sum(o.device, o.s.dtype, partial, args.parts, *grad_weight);
  if (grad_bias != nullptr) sum(o.device, o.s.dtype, partial_bias, args.parts, *grad_bias);
}

}  // namespace

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
  if (to_input && !torch_input) backward_input(operands, for_input, for_input.request, grad_input, timed_input);
  if (to_weight && !torch_weight) weight_by_us(for_weight.request, timed_weight);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::cuda::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&dwconv::cuda::depthwise_conv2d_backward));
}
