// separable_conv2d on the CPU: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "../separable_checks.h"
#include "pack_weights.h"
#include "run.h"

namespace dwconv {
namespace {

void* widened(const Tensor& t, DType dtype, Workspace where) {
  void* const wide = workspace(where, t.numel() * accumulate_size(dtype));
  widen(dtype, torch::stable::contiguous(t).const_data_ptr(), t.numel(), wide);
  return wide;
}

Tensor separable_conv2d(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias, const Tensor& pw_weight,
                        const std::optional<Tensor>& pw_bias, const Ints stride, const Ints padding, const Ints dilation,
                        const std::string dw_act, const std::string pw_act, const std::optional<Tensor>& residual, double dw_slope,
                        double pw_slope) {
  const ConvolutionShape s = check_separable(input, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, residual);
  const DType dtype = check_dtype(kSeparable, "input", input);
  const Layout layout = layout_of(input);
  const int64_t out_channels = pw_weight.size(0);
  SeparableArgs args;
  args.activation = check_activation(kSeparable, "pw_act", pw_act, pw_slope);
  DepthwiseProblem& p = args.depthwise.problem;
  p = forward_problem(s, dtype, layout);
  p.activation = check_activation(kSeparable, "dw_act", dw_act, dw_slope);
  Tensor output = fresh_output(input, {s.batch, out_channels, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;

  const Tensor x = as_layout(input, layout);
  set_input(p, x);
  const SeparablePlan plan = plan_separable(p, out_channels, selected_isa(), this_machine());
  log_plan(p, plan.whole, out_channels);

  const int64_t unit = accumulate_size(dtype);
  const DepthwisePacking packing = {s.channels, 1, s.kernel_h, s.kernel_w, {0, 1, s.kernel_h}, {0, 1, s.kernel_w},
                                    plan.depthwise.row->weight_order, plan.depthwise.weight_pitch};
  void* const dw = workspace(Workspace::kDepthwiseWeight, s.kernel_h * s.kernel_w * plan.depthwise.weight_pitch * unit);
  pack_depthwise(dtype, torch::stable::contiguous(dw_weight).const_data_ptr(), packing, 0, 1, dw);
  if (dw_bias) {
    void* const bias = workspace(Workspace::kDepthwiseBias, plan.depthwise.weight_pitch * unit);
    pack_bias(dtype, torch::stable::contiguous(*dw_bias).const_data_ptr(), s.channels, 1, 0, plan.depthwise.weight_pitch, bias);
    args.depthwise.bias = bias;
  }
  if (layout == Layout::kNHWC) {
    const int64_t padded_out = (out_channels + plan.panel - 1) / plan.panel * plan.panel;
    void* const panels = workspace(Workspace::kPointwiseWeight, padded_out * s.channels * unit);
    pack_pointwise_panels(dtype, torch::stable::contiguous(pw_weight).const_data_ptr(), out_channels, s.channels, plan.panel, panels);
    args.pw_weight = panels;
  } else {
    args.pw_weight = widened(pw_weight, dtype, Workspace::kPointwiseWeight);
  }
  if (pw_bias) args.pw_bias = widened(*pw_bias, dtype, Workspace::kPointwiseBias);
  const Tensor added = residual ? torch::stable::contiguous(*residual, memory_format(layout)) : input;

  args.depthwise.input = x.const_data_ptr();
  args.depthwise.weight = dw;
  args.depthwise.weight_pitch = plan.depthwise.weight_pitch;
  args.depthwise_columns = plan.depthwise.columns;
  args.depthwise.rows_per_tile = plan.depthwise.rows_per_tile;
  args.depthwise_kernel = plan.depthwise.row->depthwise;
  args.depthwise_scratch_bytes = plan.depthwise.scratch_bytes;
  args.out_channels = out_channels;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.out_stride_n = out_channels * s.out_h * s.out_w;
  args.rows_per_tile = plan.whole.rows_per_tile;
  run_tiles(plan.whole, [&](void* scratch, int64_t begin, int64_t end) { plan.whole.row->separable(args, scratch, begin, end); });
  return output;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&dwconv::separable_conv2d));
}
