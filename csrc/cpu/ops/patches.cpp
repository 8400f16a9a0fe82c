// patch_conv2d on the CPU, with packed weights: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/packed.h"

namespace dwconv {

Tensor patch_conv2d(const Tensor& input, const Tensor& packed, const Ints filter, int64_t act, double slope, bool channels_last) {
  constexpr const char* kOp = "patch_conv2d";
  constexpr int64_t kMostSide = 1 << 15;
  DWCONV_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  DWCONV_CHECK(is_activation(act), kOp, ": act must be an activation's number, but got ", act);
  DWCONV_CHECK(filter.size() == kFilterNumbers, kOp, ": filter must be 11 integers, but got ", filter.size());
  const int64_t kernel_h = filter[1], kernel_w = filter[2], channels = input.size(1);
  const bool sides = kernel_h > 0 && kernel_h <= kMostSide && kernel_w > 0 && kernel_w <= kMostSide && channels <= kMostSide;
  DWCONV_CHECK(sides, kOp, ": filter's height and width, and input's channels, must be between 1 and ", kMostSide);
  const int64_t depth = channels * kernel_h * kernel_w;
  const BlockFormat wanted =
      check_packed(kOp, "packed", "pointwise_conv2d_pack", packed, dtype, depth, filter[0], 0, 0, filter[0] > 0);
  const ConvolutionShape s = check_filter_numbers(kOp, input, "packed", dtype, filter);
  const Layout layout = channels_last ? Layout::kNHWC : layout_of(input);
  const Ints size = {s.batch, filter[0], s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(kOp, input, size, layout);

  SeparableArgs args;
  CpuProblem& p = args.depthwise.problem;
  p = forward_problem(s, layout);
  p.channels = depth;
  set_input(p, input);
  const PatchPlan& plan = plan_for<PatchPlan>(
      Op::kPatch, Pass::kForward, p, filter[0],
      [&](const IsaKernels& isa, const Machine& here) { return plan_patches(p, channels, filter[0], isa, here); });
  log_plan(p, plan.product.whole, filter[0]);
  const PatchArgs patches = {channels, plan.scratch_offset, plan.row_pitch};
  args.patches = &patches;
  args.depthwise.input = input.const_data_ptr();
  const BlockWeights weights = packed_weights(wanted, packed.const_data_ptr());
  return run_product(kOp, args, plan.product, weights, {static_cast<ActivationKind>(act), slope}, std::nullopt, input, size,
                     layout);
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("patch_conv2d", TORCH_BOX(&dwconv::patch_conv2d)); }
