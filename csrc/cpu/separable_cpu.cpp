// separable_conv2d on the CPU: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <string.h>
#include <torch/csrc/stable/library.h>

#include "../separable_checks.h"
#include "pack_weights.h"
#include "run.h"

namespace dwconv {
namespace {

constexpr const char* kPack = "separable_conv2d_pack";

Ints packed_shape(int64_t out_channels, int64_t channels, const PointwiseFormat& format) {
  return {(out_channels + format.panel - 1) / format.panel, padded_depth(format, channels), format.panel};
}

ScalarType packed_type(const PointwiseFormat& format) {
  return format.dtype == DType::kFloat64   ? ScalarType::Double
         : format.dtype == DType::kFloat32 ? ScalarType::Float
                                           : ScalarType::BFloat16;
}

// The pointwise weights in the order this CPU's kernels read, for many calls with the same weights.
Tensor separable_conv2d_pack(const Tensor& pw_weight) {
  STD_TORCH_CHECK(
      pw_weight.dim() == 4 && pw_weight.size(0) > 0 && pw_weight.size(1) > 0 && pw_weight.size(2) == 1 && pw_weight.size(3) == 1,
      kPack, ": pw_weight must have shape (out_channels, channels, 1, 1), but got ", to_string(pw_weight));
  const DType dtype = check_dtype(kPack, "pw_weight", pw_weight);
  const PointwiseFormat format = pointwise_format(selected_isa(), dtype);
  const int64_t out_channels = pw_weight.size(0), channels = pw_weight.size(1);
  const Tensor packed =
      torch::stable::empty(packed_shape(out_channels, channels, format), packed_type(format), std::nullopt, pw_weight.device());
  pack_pointwise_panels(dtype, torch::stable::contiguous(pw_weight).const_data_ptr(), out_channels, channels, format,
                        packed.mutable_data_ptr());
  return packed;
}

const void* packed_weights(const Tensor& pw_weight, const std::optional<Tensor>& pw_packed, DType dtype,
                           const PointwiseFormat& format) {
  const int64_t out_channels = pw_weight.size(0), channels = pw_weight.size(1);
  const Ints shape = packed_shape(out_channels, channels, format);
  if (pw_packed) {
    STD_TORCH_CHECK(pw_packed->dim() == 3 && pw_packed->size(0) == shape[0] && pw_packed->size(1) == shape[1] &&
                        pw_packed->size(2) == shape[2] && pw_packed->is_contiguous() && pw_packed->is_cpu() &&
                        pw_packed->scalar_type() == packed_type(format),
                    kSeparable, ": pw_packed must be what ", kPack, " makes of pw_weight, but got shape ", to_string(*pw_packed));
    return pw_packed->const_data_ptr();
  }
  void* const panels = workspace(Workspace::kPointwiseWeight, shape[0] * shape[1] * shape[2] * element_size(format.dtype));
  pack_pointwise_panels(dtype, torch::stable::contiguous(pw_weight).const_data_ptr(), out_channels, channels, format, panels);
  return panels;
}

Tensor separable_conv2d(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints stride, const Ints padding,
                        const Ints dilation, const std::string dw_act, const std::string pw_act,
                        const std::optional<Tensor>& residual, double dw_slope, double pw_slope,
                        const std::optional<Tensor>& pw_packed, bool /*allow_tf32*/) {
  const ConvolutionShape s = check_separable(input, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, residual);
  const DType dtype = check_dtype(kSeparable, "input", input);
  const Layout layout = layout_of(input);
  const int64_t out_channels = pw_weight.size(0);
  SeparableArgs args;
  args.activation = check_activation(kSeparable, "pw_act", pw_act, pw_slope);
  DepthwiseProblem& p = args.depthwise.problem;
  p = forward_problem(s, dtype, layout);
  p.activation = check_activation(kSeparable, "dw_act", dw_act, dw_slope);
  const Ints size = {s.batch, out_channels, s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(input, size, layout);

  const Tensor x = as_layout(input, layout);
  set_input(p, x);
  const SeparablePlan plan = plan_separable(p, out_channels, selected_isa(), this_machine());
  log_plan(p, plan.whole, out_channels);

  const int64_t unit = accumulate_size(dtype);
  const DepthwisePacking packing = {s.channels,
                                    1,
                                    s.kernel_h,
                                    s.kernel_w,
                                    {0, 1, s.kernel_h},
                                    {0, 1, s.kernel_w},
                                    plan.depthwise.row->weight_order,
                                    plan.depthwise.weight_pitch};
  void* const dw = workspace(Workspace::kDepthwiseWeight, s.kernel_h * s.kernel_w * plan.depthwise.weight_pitch * unit);
  pack_depthwise(dtype, torch::stable::contiguous(dw_weight).const_data_ptr(), packing, 0, 1, dw);
  if (dw_bias) {
    void* const bias = workspace(Workspace::kDepthwiseBias, plan.depthwise.weight_pitch * unit);
    pack_bias(dtype, torch::stable::contiguous(*dw_bias).const_data_ptr(), s.channels, 1, 0, plan.depthwise.weight_pitch, bias);
    args.depthwise.bias = bias;
  }
  const PointwiseFormat& format = plan.whole.row->pointwise;
  args.pw_weight = packed_weights(pw_weight, pw_packed, dtype, format);
  const int64_t padded_out = (out_channels + format.panel - 1) / format.panel * format.panel;
  void* const wide_pw_bias = workspace(Workspace::kPointwiseBias, padded_out * unit);
  memset(wide_pw_bias, 0, padded_out * unit);
  if (pw_bias) widen(dtype, torch::stable::contiguous(*pw_bias).const_data_ptr(), out_channels, wide_pw_bias);
  args.pw_bias = wide_pw_bias;
  const Tensor added = residual ? torch::stable::contiguous(*residual, memory_format(layout)) : input;

  args.depthwise.input = x.const_data_ptr();
  args.depthwise.weight = dw;
  args.depthwise.weight_pitch = plan.depthwise.weight_pitch;
  args.depthwise_kernel = plan.depthwise.row->depthwise;
  args.out_channels = out_channels;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  const Tensor output = fresh_output(input, size, layout);  // last: see workspace.h
  args.output = output.mutable_data_ptr();
  args.rows_per_tile = plan.whole.rows_per_tile;
  args.splits = plan.splits;
  tell_far(plan.whole, &p);
  run_tiles(plan.whole, [&](void* scratch, Tiles tiles) { plan.whole.row->separable(args, scratch, tiles); });
  return output;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("separable_conv2d_pack", TORCH_BOX(&dwconv::separable_conv2d_pack));
  m.impl("separable_conv2d", TORCH_BOX(&dwconv::separable_conv2d));
}
