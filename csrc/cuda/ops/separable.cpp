// separable_conv2d on CUDA: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "common/separable_checks.h"
#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

bool aligned_matrix(const Tensor& t) { return aligned_start(t) && t.size(1) * t.element_size() % 16 == 0; }

Tensor separable_conv2d(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints stride, const Ints padding,
                        const Ints dilation, const std::string dw_act, const std::string pw_act,
                        const std::optional<Tensor>& residual, double dw_slope, double pw_slope, bool allow_tf32) {
  const ConvolutionShape s = check_separable(input, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, residual);
  check_sides(kSeparable, s);
  const int64_t out_channels = pw_weight.size(0);
  const Activation last_activation = check_activation(kSeparable, "pw_act", pw_act, pw_slope);
  Request request;
  const Layout layout = layout_of(input);
  set_problem(request.problem, s, layout);
  request.problem.activation = check_activation(kSeparable, "dw_act", dw_act, dw_slope);
  request.allow_tf32 = allow_tf32;
  const Device device(kSeparable, input);
  const Tensor output = device.empty(input, {s.batch, out_channels, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor x = as_layout(input, layout);
  const Tensor dw = dense(dw_weight), pw = dense(pw_weight);
  const Tensor db = dw_bias ? dense(*dw_bias) : dw, pb = pw_bias ? dense(*pw_bias) : pw;
  const Tensor added = residual ? torch::stable::contiguous(*residual, memory_format(layout)) : output;
  set_input(request.problem, x);

  const bool nhwc = layout == Layout::kNHWC;
  SeparableAlignment alignment;
  alignment.input = nhwc && aligned_channels(x) && aligned_start(dw);
  alignment.middle = s.channels * x.element_size() % 16 == 0;
  alignment.output = nhwc && aligned_channels(output) && aligned_channels(added);
  alignment.weight = aligned_matrix(pw);
  alignment.rows = nhwc ? 0 : std::min(aligned_rows(x), whole_runs({s.out_w * element_size(request.problem.dtype)}));
  const Gpu& gpu = device.gpu();
  PlanKey key = plan_key(Op::kSeparable, Pass::kForward, request, gpu);
  key.out_channels = out_channels;
  key.alignment = alignment;
  const SeparablePlan& plan = planned<SeparablePlan>(key, [&] { return plan_separable(request, out_channels, alignment, gpu); });
  log_plan(Op::kSeparable, Pass::kForward, request.problem, out_channels, plan.reason, plan.block.launch);

  SeparableBlockArgs args = plan.block_args;
  args.activation = last_activation;
  args.pw_weight = pw.const_data_ptr();
  args.pw_bias = pw_bias ? pb.const_data_ptr() : nullptr;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  if (plan.fused) {
    args.problem.activation = request.problem.activation;
    args.input = x.const_data_ptr();
    args.dw_weight = dw.const_data_ptr();
    args.dw_bias = dw_bias ? db.const_data_ptr() : nullptr;
    device.launch(plan.block.launch, &args);
    return output;
  }
  const Tensor middle = device.empty(input, {s.batch, s.channels, s.out_h, s.out_w}, layout);
  DepthwiseTileArgs first = plan.depthwise_args;
  first.problem.activation = request.problem.activation;
  first.input = x.const_data_ptr();
  first.weight = dw.const_data_ptr();
  first.bias = dw_bias ? db.const_data_ptr() : nullptr;
  first.output = middle.mutable_data_ptr();
  device.launch(plan.depthwise.launch, &first);
  const bool done = is_inlined(request.problem.activation.kind);
  const Tensor activated = done && nhwc ? middle : device.empty(input, {s.batch, s.channels, s.out_h, s.out_w}, Layout::kNHWC);
  if (!nhwc) {
    TransposeArgs values = plan.transpose_args;
    values.input = middle.const_data_ptr();
    values.output = activated.mutable_data_ptr();
    if (!done) values.activation = request.problem.activation;
    device.launch_behind(plan.transpose.launch, &values);
  } else if (!done) {
    const ActivateArgs values = {middle.const_data_ptr(), activated.mutable_data_ptr(), middle.numel(),
                                 request.problem.activation};
    device.launch(plan_activation(request.problem.dtype, values.count, gpu).launch, &values);
  }
  args.input = activated.const_data_ptr();
  if (args.aligned_in) {  // then it reads pixels by asynchronous copies, past the cache that is not coherent
    device.launch_behind(plan.block.launch, &args);
  } else {
    device.launch(plan.block.launch, &args);
  }
  return output;
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("separable_conv2d", TORCH_BOX(&dwconv::cuda::separable_conv2d));
}
