// inverted_residual on the CPU, with packed weights: checks, output allocation, problem, plan, launch; or its two parts.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/packed.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "inverted_residual";

}  // namespace

Tensor inverted_residual(const Tensor& input, const Tensor& expand, int64_t hidden, int64_t expand_act, double expand_slope,
                         const Tensor& packed, const Ints block, const std::vector<double> slopes,
                         const std::optional<Tensor>& residual, bool /*allow_tf32*/) {
  DWCONV_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  DWCONV_CHECK(is_activation(expand_act), kOp, ": expand_act must be an activation's number, but got ", expand_act);
  const int64_t channels = input.size(1);
  const BlockFormat wanted =
      check_packed(kOp, "expand", "pointwise_conv2d_pack", expand, dtype, channels, hidden, 0, 0, hidden > 0);
  const PackedBlock b = check_block(kOp, input, hidden, dtype, packed, block, slopes);
  if (residual) check_residual(kOp, *residual, input, b.shape, b.out_channels);
  const Layout layout = layout_of(input);
  SeparableArgs args;
  CpuProblem& p = args.depthwise.problem;
  p = forward_problem(b.shape, layout);
  p.activation = b.dw_activation;
  const InvertedPlan* const plan =
      b.shape.batch == 0
          ? nullptr
          : &plan_for<InvertedPlan>(Op::kInvertedResidual, Pass::kForward, p, channels * (int64_t{1} << 32) + b.out_channels,
                                    [&](const IsaKernels& isa, const Machine& here) {
                                      return plan_inverted_residual(p, channels, b.out_channels, isa, here);
                                    });
  if (plan == nullptr || !plan->fused) {
    const Tensor expanded =
        pointwise_conv2d(input, expand, hidden, 1, expand_act, expand_slope, std::nullopt, std::nullopt, false);
    return separable_conv2d_packed(expanded, packed, block, slopes, residual, false);
  }
  log_plan(p, plan->block.whole, b.out_channels);
  const Tensor x = dense(input, layout);
  const BlockWeights e = packed_weights(wanted, expand.const_data_ptr());
  ExpandArgs first;
  first.input = x.const_data_ptr();
  first.channels = channels;
  first.in_stride_n = channels * x.size(2) * x.size(3);
  first.in_stride_c = layout == Layout::kNHWC ? 1 : x.size(2) * x.size(3);
  first.weight = e.pw_weight;
  first.bias = e.pw_bias;
  first.activation = {static_cast<ActivationKind>(expand_act), expand_slope};
  first.scratch_offset = plan->scratch_offset, first.most_pixels = plan->most_pixels;
  first.pitch = plan->pitch, first.copy_pitch = plan->copy_pitch;
  args.expand = &first;
  args.depthwise.weight = b.weights.dw_weight;
  args.depthwise.bias = b.weights.dw_bias;
  args.depthwise.weight_pitch = plan->block.depthwise.weight_pitch;
  args.depthwise_kernel = plan->block.depthwise.row->depthwise;
  const Ints size = {b.shape.batch, b.out_channels, b.shape.out_h, b.shape.out_w};
  return run_product(kOp, args, plan->block, b.weights, b.pw_activation, residual, input, size, layout);
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("inverted_residual", TORCH_BOX(&dwconv::inverted_residual)); }
