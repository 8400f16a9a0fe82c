// Every plan of the CPU, for any problem that the checks let through, any caches and any number of threads.
#include "cpu/plan/plan.h"
#include "cpu/runtime/cpu_features.h"
#include "problems.h"

namespace dwconv::fuzz {
namespace {

constexpr int64_t kMost = int64_t{1} << 62;

void check(const Plan& plan, const Machine& machine) {
  HOLDS(plan.row != nullptr);
  HOLDS(plan.rows_per_tile >= 1 && plan.rows_per_tile < kMost);
  HOLDS(plan.columns >= 1 && plan.tiles >= 1 && plan.tiles < kMost && plan.parts >= 1);
  HOLDS(plan.workers >= 1 && plan.workers <= machine.threads && plan.workers <= plan.tiles);
  HOLDS(plan.scratch_bytes >= 0 && plan.scratch_bytes < kMost);
}

void check(const SeparablePlan& plan, const Machine& machine) {
  check(plan.whole, machine);
  HOLDS(plan.splits >= 1);
}

void run(FuzzedDataProvider& from) {
  const std::vector<IsaKernels>& sets = supported_isas();
  const IsaKernels& isa = sets[from.ConsumeIntegralInRange<size_t>(0, sets.size() - 1)];
  Machine machine = {};
  machine.l1_bytes = int64_t{4096} * from.ConsumeIntegralInRange<int>(1, 64);
  machine.l2_bytes = int64_t{65536} * from.ConsumeIntegralInRange<int>(1, 64);
  machine.l3_bytes = machine.l2_bytes * from.ConsumeIntegralInRange<int>(0, 256);
  machine.threads = from.ConsumeIntegralInRange<int>(1, 1024);
  machine.prefetch_threshold = from.ConsumeBool() ? number(from, 0, kNever) : default_prefetch_threshold(machine.l2_bytes);
  const int kind = from.ConsumeIntegralInRange<int>(0, 10);
  const int64_t multiplier = kind == 1 || kind == 2 ? number(from, 1, int64_t{1} << 20) : 1;
  std::optional<CpuProblem> found = problem<CpuProblem>(from, multiplier, kind == 2);
  if (!found) return;
  CpuProblem p = *found;
  p.l1_ways = machine.l1_ways();
  const int64_t out_channels = number(from, 1, int64_t{1} << 40);
  const bool weights = allocable(p, {out_channels, p.channels}) && allocable(p, {p.batch, out_channels, p.out_h, p.out_w});
  switch (kind) {
    case 0:
      return check(plan_forward(p, isa, machine), machine);
    case 1:
      p.layout = Layout::kNHWC;
      p.channels *= multiplier;
      set_dense(&p, p.channels, p.channels);
      return check(plan_forward_repeated(p, multiplier, isa, machine), machine);
    case 2: {
      std::swap(p.in_h, p.out_h), std::swap(p.in_w, p.out_w);
      p.depth = multiplier;
      set_dense(&p, p.channels, p.channels);
      p.in_stride_m = p.batch * p.in_stride_n;
      const Plan plan = plan_backward_input(p, isa, machine);
      return plan.row != nullptr ? check(plan, machine) : void();
    }
    case 3:
      return check(plan_backward_weight(p, isa, machine), machine);
    case 4:
      return check(plan_batch_norm(p, from.ConsumeBool(), isa, machine), machine);
    case 5:
      return check(plan_layer_norm(p, isa, machine), machine);
    case 6:
      return allocable(p, {p.channels, out_channels}) ? check(plan_squeeze(p, out_channels, isa, machine).gates, machine)
                                                      : void();
    case 7:
      p.in_h = p.in_w = p.out_h = p.out_w = p.kernel_h = 1;
      return allocable(p, {p.batch, p.channels, p.kernel_w, p.dilation_w}) ? check(plan_step(p, isa, machine), machine) : void();
    case 8:
      return weights ? check(plan_separable(p, out_channels, isa, machine), machine) : void();
    case 9:
      p.kernel_h = p.kernel_w = p.dilation_h = p.dilation_w = 1, p.pad_h = p.pad_w = 0;
      p.out_h = (p.in_h - 1) / p.stride_h + 1, p.out_w = (p.in_w - 1) / p.stride_w + 1;
      set_dense(&p, p.channels, p.channels);
      if (!allocable(p, {p.batch, out_channels, p.out_h, p.out_w}) || !weights) return;
      return check(plan_pointwise(p, out_channels, isa, machine), machine);
    default: {
      const int64_t in_channels = number(from, 1, int64_t{1} << 40);
      if (!weights || !allocable(p, {p.batch, in_channels, p.in_h, p.in_w}) || !allocable(p, {p.channels, in_channels})) return;
      const InvertedPlan plan = plan_inverted_residual(p, in_channels, out_channels, isa, machine);
      if (!plan.fused) return;
      check(plan.block, machine);
      HOLDS(plan.scratch_offset >= 0 && plan.most_pixels >= 1 && plan.pitch >= 1 && plan.copy_pitch >= 1);
    }
  }
}

}  // namespace
}  // namespace dwconv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider from(data, size);
  try {
    dwconv::fuzz::run(from);
  } catch (const std::runtime_error&) {  // no kernel of this dtype, in words
  }
  return 0;
}
