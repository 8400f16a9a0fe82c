// layer_norm2d on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/launch.h"

namespace dwconv {

Tensor layer_norm2d(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  constexpr const char* kOp = "layer_norm2d";
  LayerNormArgs args;
  CpuProblem& p = args.problem;
  p = pixelwise_problem(kOp, input);
  p.layout = Layout::kNHWC;
  DWCONV_CHECK(eps >= 0, kOp, ": eps must be non-negative, but got ", eps);
  if (weight) check_wide(kOp, "weight", *weight, {p.channels}, input, p.dtype);
  if (bias) check_wide(kOp, "bias", *bias, {p.channels}, input, p.dtype);
  const Tensor scale = weight ? dense(*weight) : input;
  const Tensor shift = bias ? dense(*bias) : input;
  const Tensor x = as_layout(input, Layout::kNHWC);
  set_input(p, x);
  args.eps = eps;
  args.input = x.const_data_ptr();
  args.weight = weight ? scale.const_data_ptr() : nullptr;
  args.bias = bias ? shift.const_data_ptr() : nullptr;
  const Tensor output = fresh_output(kOp, input, shape_of(input), Layout::kNHWC);
  args.output = output.mutable_data_ptr();
  const Plan& plan = plan_for<Plan>(Op::kLayerNorm, Pass::kForward, p, 0,
                                    [&](const IsaKernels& isa, const Machine& here) { return plan_layer_norm(p, isa, here); });
  log_plan(p, plan);
  args.rows_per_tile = plan.rows_per_tile;
  run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->layer_norm(args, scratch, tiles); });
  return output;
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("layer_norm2d", TORCH_BOX(&dwconv::layer_norm2d)); }
