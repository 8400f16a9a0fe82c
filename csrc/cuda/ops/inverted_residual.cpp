// inverted_residual on CUDA, with packed weights: checks, output allocation, problem, plan, launch; or its two parts.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "cuda/ops/calls.h"
#include "cuda/ops/packed.h"
#include "cuda/plan/inverted.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kOp = "inverted_residual";

// The plan depends on the input's channels too.
struct InvertedKey : PlanKey {
  int64_t in_channels = 0;

  bool operator==(const InvertedKey&) const = default;
};

Tensor inverted_residual(const Tensor& input, const Tensor& expand, int64_t hidden, int64_t expand_act, double expand_slope,
                         const Tensor& packed, const Ints block, const std::vector<double> slopes,
                         const std::optional<Tensor>& residual, bool allow_tf32) {
  DWCONV_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  DWCONV_CHECK(is_activation(expand_act), kOp, ": expand_act must be an activation's number, but got ", expand_act);
  const int64_t channels = input.size(1);
  check_packed(kOp, "expand", "pointwise_conv2d_pack", expand, input, dtype, channels, hidden, 0, 0, true);
  const BlockShape b = check_block_shape(kOp, input, hidden, dtype, block, slopes, [&] {
    check_packed(kOp, "packed", "separable_conv2d_pack", packed, input, dtype, hidden, block[0], block[1], block[2],
                 block[1] > 0 && block[2] > 0);
  });
  if (residual) check_residual(kOp, *residual, input, b.shape, b.out_channels);
  check_sides(kOp, b.shape);
  const ConvolutionShape& s = b.shape;
  const Layout layout = layout_of(input);
  const Device device(kOp, input);
  const Gpu& gpu = device.gpu();
  const bool nhwc = layout == Layout::kNHWC;
  const Tensor x = as_layout(input, layout);
  Request request;
  request.allow_tf32 = allow_tf32;
  set_problem(request.problem, s, layout);
  set_input(request.problem, x);
  SeparableAlignment alignment;
  alignment.input = nhwc && aligned_channels(x);
  alignment.output = nhwc && b.out_channels * x.element_size() % 16 == 0 && (!residual || aligned_start(*residual));
  alignment.weight = hidden * x.element_size() % 16 == 0;
  InvertedKey key = {plan_key(Op::kInvertedResidual, Pass::kForward, request, gpu), channels};
  key.out_channels = b.out_channels;
  key.alignment = alignment;
  const InvertedPlan none;
  const InvertedPlan& plan = s.batch == 0 ? none : planned<InvertedPlan>(key, [&] {
    return plan_inverted_residual(request, channels, b.out_channels, alignment, gpu);
  });
  if (!plan.fused) {
    const Tensor expanded =
        pointwise_conv2d(input, expand, hidden, 1, expand_act, expand_slope, std::nullopt, std::nullopt, allow_tf32);
    return separable_conv2d_packed(expanded, packed, block, slopes, residual, allow_tf32);
  }
  log_plan(Op::kInvertedResidual, Pass::kForward, request.problem, b.out_channels, plan.reason, plan.block.launch, "");

  const Tensor output = device.empty(input, {s.batch, b.out_channels, s.out_h, s.out_w}, layout);
  const Tensor added = residual ? dense(*residual, layout) : output;
  const PackedPlaces of_block(dtype, hidden, b.out_channels, block[1], block[2]), of_expand(dtype, channels, hidden, 0, 0);
  InvertedResidualArgs args = plan.args;
  args.expand_weight = at_byte(expand, of_expand.pw_weight);
  args.expand_bias = at_byte(expand, of_expand.pw_bias);
  args.expand_activation = {static_cast<ActivationKind>(expand_act), expand_slope};
  args.aligned_expand = channels * x.element_size() % 16 == 0;
  SeparableBlockArgs& to = args.block;
  to.problem.activation = b.dw_activation;
  to.activation = b.pw_activation;
  to.input = x.const_data_ptr();
  to.dw_weight = at_byte(packed, of_block.dw_weight);
  to.dw_bias = at_byte(packed, of_block.dw_bias);
  to.pw_weight = at_byte(packed, of_block.pw_weight);
  to.pw_bias = at_byte(packed, of_block.pw_bias);
  to.residual = residual ? added.const_data_ptr() : nullptr;
  to.output = output.mutable_data_ptr();
  device.launch(plan.block.launch, &args);
  return output;
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("inverted_residual", TORCH_BOX(&dwconv::cuda::inverted_residual));
}
