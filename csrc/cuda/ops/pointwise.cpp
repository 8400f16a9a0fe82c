// pointwise_conv2d on CUDA, with packed weights: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "cuda/ops/calls.h"
#include "cuda/ops/packed.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kPack = "pointwise_conv2d_pack";
constexpr const char* kOp = "pointwise_conv2d";

Tensor pointwise_conv2d_pack(const Tensor& weight, const std::optional<Tensor>& bias, const std::string /*isa*/,
                             const std::string input_dtype) {
  const DType weights = check_pointwise_weight(kPack, weight);
  const DType dtype = packed_dtype(kPack, weights, input_dtype);
  if (bias) check_vector(kPack, "bias", *bias, weight.size(0), weight);
  const Device device(kPack, weight);
  return pack(dtype, PackedPlaces(dtype, weight.size(1), weight.size(0), 0, 0), weight, std::nullopt, std::nullopt, weight, bias);
}

// Of a convolution of stride 1: its pixels are the input's at the stride.
void set_pixels(DepthwiseProblem& p, const ConvolutionShape& s, const int64_t (&strides)[4]) {
  p.in_stride_n = strides[0], p.in_stride_c = strides[1];
  p.in_stride_h = strides[2] * s.stride_h, p.in_stride_w = strides[3] * s.stride_w;
  p.stride_h = p.stride_w = 1;
}

}  // namespace

Tensor pointwise_conv2d(const Tensor& input, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t act,
                        double slope, const std::optional<Tensor>& residual, const std::optional<Tensor>& gate, bool allow_tf32) {
  DWCONV_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  DWCONV_CHECK(is_activation(act), kOp, ": act must be an activation's number, but got ", act);
  const int64_t channels = input.size(1);
  check_packed(kOp, "packed", kPack, packed, input, dtype, channels, out_channels, 0, 0, true);
  const ConvolutionShape s = check_filter(kOp, input, "packed", dtype, 1, 1, {stride, stride}, {0, 0}, {1, 1});
  check_output(kOp, input, s, out_channels, {0, 0});
  if (residual) check_residual(kOp, *residual, input, s, out_channels);
  if (gate) check_shaped(kOp, "gate", *gate, {s.batch, channels, 1, 1}, input);
  check_sides(kOp, s);
  const Layout layout = layout_of(input);
  const Device device(kOp, input);
  const Tensor output = device.empty(input, {s.batch, out_channels, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;

  // Single pixels lie in both layouts alike.
  const bool nhwc = layout == Layout::kNHWC || s.in_h * s.in_w == 1;
  const Tensor x = nhwc ? as_layout(input, Layout::kNHWC) : dense(input, layout);
  const Tensor added = residual ? dense(*residual, layout) : output;
  const Tensor gates = gate ? dense(*gate) : output;
  Request request;
  request.allow_tf32 = allow_tf32;
  DepthwiseProblem& p = request.problem;
  set_problem(p, s, nhwc ? Layout::kNHWC : layout);
  const int64_t pixels = s.batch * s.in_h * s.in_w;
  if (nhwc) {
    set_pixels(p, s, {x.stride(0), x.stride(1), x.stride(2), x.stride(3)});
    if (is_dense(x, Layout::kNHWC) && stride == 1 && !gate && pixels < (int64_t{1} << 31)) {  // one column, cut anywhere
      p.in_h = p.out_h = pixels;
      p.batch = p.in_w = p.out_w = 1;
      p.in_stride_n = pixels * channels, p.in_stride_h = p.in_stride_w = channels;
    }
  } else {
    set_pixels(p, s, {channels * s.in_h * s.in_w, 1, channels * s.in_w, channels});
  }
  const auto whole_chunks = [&](const Tensor& t) { return t.size(1) * t.element_size() % 16 == 0; };
  SeparableAlignment alignment;
  alignment.input = (nhwc ? aligned_channels(x) : whole_chunks(x)) && (!gate || aligned_start(gates));
  alignment.output = nhwc && aligned_channels(output) && aligned_channels(added);
  alignment.weight = whole_chunks(x);
  const Gpu& gpu = device.gpu();
  PlanKey key = plan_key(Op::kPointwise, Pass::kForward, request, gpu);
  key.out_channels = out_channels;
  key.alignment = alignment;
  const PointwisePlan& plan = planned<PointwisePlan>(key, [&] { return plan_pointwise(request, out_channels, alignment, gpu); });
  log_plan(Op::kPointwise, Pass::kForward, p, out_channels, plan.reason, plan.launch, "");

  Tensor values = x;
  if (!nhwc) {
    values = device.empty(input, {s.batch, channels, s.in_h, s.in_w}, Layout::kNHWC);
    TransposeArgs transpose = plan.transpose_args;
    transpose.input = x.const_data_ptr();
    transpose.output = values.mutable_data_ptr();
    device.launch(plan.transpose.launch, &transpose);
  }
  const PackedPlaces at(dtype, channels, out_channels, 0, 0);
  SeparableBlockArgs args = plan.args;
  args.input = values.const_data_ptr();
  args.pw_weight = at_byte(packed, at.pw_weight);
  args.pw_bias = at_byte(packed, at.pw_bias);
  args.wide_bias = 1;
  args.gate = gate ? gates.const_data_ptr() : nullptr;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.activation = {static_cast<ActivationKind>(act), slope};
  device.launch(plan.launch, &args);
  return output;
}

}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("pointwise_conv2d_pack", TORCH_BOX(&dwconv::cuda::pointwise_conv2d_pack));
  m.impl("pointwise_conv2d", TORCH_BOX(&dwconv::cuda::pointwise_conv2d));
}
