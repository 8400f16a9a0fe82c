// pointwise_conv2d and linear on the CPU, with packed weights: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/packed.h"

namespace dwconv {
namespace {

constexpr const char* kPack = "pointwise_conv2d_pack";
constexpr const char* kOp = "pointwise_conv2d";
constexpr const char* kLinear = "linear";

BlockFormat format_of(DType dtype, int64_t channels, int64_t out_channels) {
  return block_format(selected_isa(), dtype, pointwise_format(selected_isa(), dtype), channels, out_channels, 0, 0);
}

Tensor pointwise_conv2d_pack(const Tensor& weight, const std::optional<Tensor>& bias, const std::string isa,
                             const std::string input_dtype) {
  check_isa(kPack, isa);
  const DType weights = check_pointwise_weight(kPack, weight);
  const DType dtype = packed_dtype(kPack, weights, input_dtype);
  if (bias) check_vector(kPack, "bias", *bias, weight.size(0), weight);
  const BlockFormat format = format_of(dtype, weight.size(1), weight.size(0));
  return packed_tensor(format, weight,
                       [&](void* packed) { pack(format, weights, std::nullopt, std::nullopt, weight, bias, packed); });
}

// The gate in the accumulation type, each image's followed by as much as the kernels read past it.
const void* widened_gate(const Tensor& gate, DType dtype, int64_t batch, int64_t channels, int64_t pitch) {
  const Tensor values = dense(gate);
  const int64_t unit = accumulate_size(dtype);
  char* const wide = static_cast<char*>(workspace(Workspace::kDepthwiseWeight, batch * pitch * unit));
  for (int64_t n = 0; n < batch; ++n) {
    char* const image = wide + n * pitch * unit;
    widen(dtype, offset(static_cast<const char*>(values.const_data_ptr()), n * channels, dtype), channels, image);
    memset(image + channels * unit, 0, (pitch - channels) * unit);
  }
  return wide;
}

}  // namespace

Tensor pointwise_conv2d(const Tensor& input, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t act,
                        double slope, const std::optional<Tensor>& residual, const std::optional<Tensor>& gate,
                        bool /*allow_tf32*/) {
  DWCONV_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  DWCONV_CHECK(is_activation(act), kOp, ": act must be an activation's number, but got ", act);
  const int64_t channels = input.size(1);
  const BlockFormat wanted = check_packed(kOp, "packed", kPack, packed, dtype, channels, out_channels, 0, 0, out_channels > 0);
  const ConvolutionShape s = check_filter(kOp, input, "packed", dtype, 1, 1, {stride, stride}, {0, 0}, {1, 1});
  check_output(kOp, input, s, out_channels, {0, 0});
  if (residual) check_residual(kOp, *residual, input, s, out_channels);
  if (gate) check_shaped(kOp, "gate", *gate, {s.batch, channels, 1, 1}, input);
  const Layout layout = layout_of(input);
  const Ints size = {s.batch, out_channels, s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(kOp, input, size, layout);

  const Tensor x = as_layout(input, layout);
  SeparableArgs args;
  CpuProblem& p = args.depthwise.problem;
  p = forward_problem(s, layout);
  set_input(p, x);
  const bool one_column = layout == Layout::kNHWC && is_dense(x, layout) && stride == 1;
  if (one_column && !gate) {  // one column of pixels, cut anywhere
    p.in_h = p.out_h = s.batch * s.out_h * s.out_w;
    p.batch = p.in_w = p.out_w = 1;
    p.in_stride_n = p.in_h * channels, p.in_stride_h = p.in_stride_w = channels;
  }
  const SeparablePlan& plan = plan_for<SeparablePlan>(
      Op::kPointwise, Pass::kForward, p, out_channels,
      [&](const IsaKernels& isa, const Machine& here) { return plan_pointwise(p, out_channels, isa, here); });
  log_plan(p, plan.whole, out_channels);
  const BlockWeights w = packed_weights(wanted, packed.const_data_ptr());
  args.depthwise.input = x.const_data_ptr();
  if (gate) {
    args.gate_pitch = channels + kMostLanes;
    args.gate = widened_gate(*gate, dtype, s.batch, channels, args.gate_pitch);
  }
  const Activation activation = {static_cast<ActivationKind>(act), slope};
  return run_product(kOp, args, plan, w, activation, residual, input, size, layout);
}

// Rows are pixels of a channels_last picture one pixel wide.
Tensor linear(const Tensor& input, const Tensor& packed, int64_t out_features, int64_t act, double slope) {
  DWCONV_CHECK(input.dim() > 0 && input.numel() > 0, kLinear,
               ": input must have shape (..., features) and not be empty, but got ", to_string(input));
  const DType dtype = check_dtype(kLinear, "input", input);
  DWCONV_CHECK(is_activation(act), kLinear, ": act must be an activation's number, but got ", act);
  Ints size = shape_of(input);
  const int64_t features = size.back(), rows = input.numel() / features;
  check_packed(kLinear, "packed", kPack, packed, dtype, features, out_features, 0, 0, out_features > 0);
  const Tensor x = reinterpreted(dense(input), {1, features, rows, 1}, {rows * features, 1, features, features});
  const Tensor y = pointwise_conv2d(x, packed, out_features, 1, act, slope, std::nullopt, std::nullopt, false);
  size.back() = out_features;
  Ints strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return reinterpreted(y, size, strides);
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("pointwise_conv2d_pack", TORCH_BOX(&dwconv::pointwise_conv2d_pack));
  m.impl("pointwise_conv2d", TORCH_BOX(&dwconv::pointwise_conv2d));
  m.impl("linear", TORCH_BOX(&dwconv::linear));
}
