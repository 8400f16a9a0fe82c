// separable_conv2d on the CPU: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "../separable_checks.h"
#include "pack_weights.h"
#include "run.h"

namespace dwconv {
namespace {

Tensor widened(const Tensor& t, DType dtype) {
  const Tensor wide = scratch_tensor(std::max<int64_t>(t.numel(), 1) * accumulate_size(dtype));
  widen(dtype, torch::stable::contiguous(t).const_data_ptr(), t.numel(), wide.mutable_data_ptr());
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
  Tensor output = empty_output(input, {s.batch, out_channels, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;

  const Tensor x = as_layout(input, layout);
  set_input(p, x);
  const SeparablePlan plan = plan_separable(p, out_channels, selected_isa(), this_machine());
  log_plan(p, plan.whole, out_channels);

  const int64_t unit = accumulate_size(dtype);
  const Tensor dw = scratch_tensor(s.channels * s.kernel_h * s.kernel_w * unit);
  DepthwisePacking k = {s.channels, 1, s.kernel_h, s.kernel_w, {0, 1, s.kernel_h}, {0, 1, s.kernel_w}, 0, 0, 0, 0};
  if (layout == Layout::kNHWC) {
    k.stride_c = 1, k.stride_s = s.channels, k.stride_r = s.kernel_w * s.channels;
  } else {
    k.stride_s = 1, k.stride_r = s.kernel_w, k.stride_c = s.kernel_h * s.kernel_w;
  }
  pack_depthwise(dtype, torch::stable::contiguous(dw_weight).const_data_ptr(), k, dw.mutable_data_ptr());

  Tensor pw;
  const int64_t padded_out = (out_channels + plan.panel - 1) / plan.panel * plan.panel;
  if (layout == Layout::kNHWC) {
    pw = scratch_tensor(padded_out * s.channels * unit);
    pack_pointwise_panels(dtype, torch::stable::contiguous(pw_weight).const_data_ptr(), out_channels, s.channels, plan.panel,
                          pw.mutable_data_ptr());
  } else {
    pw = widened(pw_weight, dtype);
  }
  const Tensor wide_dw_bias = dw_bias ? widened(*dw_bias, dtype) : scratch_tensor(1);
  const Tensor wide_pw_bias = pw_bias ? widened(*pw_bias, dtype) : scratch_tensor(1);
  const Tensor added = residual ? torch::stable::contiguous(*residual, memory_format(layout)) : input;

  args.depthwise.input = x.const_data_ptr();
  args.depthwise.weight = dw.const_data_ptr();
  args.depthwise.bias = dw_bias ? wide_dw_bias.const_data_ptr() : nullptr;
  args.depthwise.rows_per_tile = plan.depthwise.rows_per_tile;
  args.depthwise_kernel = plan.depthwise.row->depthwise;
  args.depthwise_scratch_bytes = plan.depthwise.scratch_bytes;
  args.out_channels = out_channels;
  args.pw_weight = pw.const_data_ptr();
  args.pw_bias = pw_bias ? wide_pw_bias.const_data_ptr() : nullptr;
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
