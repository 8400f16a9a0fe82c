// Every plan of CUDA, for any problem that the checks let through and any GPU. The kernels themselves are left out.
#define DWCONV_ENTRY(...) nullptr
#include "cuda/kernels/kernel_table.h"
#include "cuda/plan/inverted.h"
#include "cuda/plan/packed.h"
#include "problems.h"

namespace dwconv::cuda {

#include "cuda_groups.inc"  // made of kernels.inc by __init__.py

namespace {

using namespace dwconv::fuzz;

void check(const LaunchPlan& plan, const Gpu& gpu) {
  HOLDS(plan.launch.row != nullptr);
  HOLDS(plan.launch.threads >= 1 && plan.launch.threads <= 1024);
  HOLDS(plan.launch.blocks >= 1);  // more than a launch can have are refused there
  HOLDS(plan.launch.shared_bytes >= 0 && plan.launch.shared_bytes <= gpu.shared_per_block);
}

void check_tiles(const Tiling& t, int64_t out_h, int64_t out_w) {
  if (t.tile_h == 0) return;  // kAny has none
  HOLDS(t.slab >= 1 && t.slabs >= 1 && int64_t{t.tile_h} * t.tiles_h >= out_h && int64_t{t.tile_w} * t.tiles_w >= out_w);
}

// check_sides (cuda/ops/launch.h).
bool sides_fit(const DepthwiseProblem& p) {
  constexpr double kMost = 2147483648.0;
  const auto product = [](int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); };
  const auto fits = [&](int64_t in, int64_t kernel, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
    return static_cast<double>(in) + product(2, pad) < kMost &&
           product(out - 1, stride) + product(kernel - 1, dilation) < kMost && product(in, stride) < kMost &&
           product(out, stride) < kMost;
  };
  return fits(p.in_h, p.kernel_h, p.out_h, p.stride_h, p.pad_h, p.dilation_h) &&
         fits(p.in_w, p.kernel_w, p.out_w, p.stride_w, p.pad_w, p.dilation_w) && product(p.kernel_h, p.kernel_w) < kMost / 2 &&
         product(p.out_h, p.out_w) < kMost && p.channels < (int64_t{1} << 31) - kMostDivided;
}

Gpu gpu_from(FuzzedDataProvider& from) {
  Gpu gpu;
  gpu.arch = from.PickValueInArray({75, 80, 86, 89, 90, 100, 120});
  gpu.sm_count = from.ConsumeIntegralInRange<int32_t>(1, 256);
  gpu.shared_per_block =
      int64_t{1024} * from.ConsumeIntegralInRange<int>(gpu.arch == 75 ? 64 : 99, 227);  // what there is, and more
  gpu.shared_per_sm = gpu.shared_per_block + 1024 * from.ConsumeIntegralInRange<int>(1, 64);
  return gpu;
}

void run(FuzzedDataProvider& from) {
  const Gpu gpu = gpu_from(from);
  const int kind = from.ConsumeIntegralInRange<int>(0, 6);
  const int64_t multiplier = kind < 3 ? number(from, 1, 1 << 20) : 1;
  const std::optional<DepthwiseProblem> found = problem<DepthwiseProblem>(from, multiplier, kind == 1 && from.ConsumeBool());
  if (!found || !sides_fit(*found)) return;
  constexpr double kMemory = 68719476736.0;  // 2^36: of a GPU, of each tensor
  if (!allocable(*found, {found->batch, found->channels, found->in_h, found->in_w}, kMemory) ||
      !allocable(*found, {found->batch, found->channels, multiplier, found->out_h, found->out_w}, kMemory))
    return;
  Request request;
  request.problem = *found;
  request.multiplier = multiplier;
  request.aligned = found->layout == Layout::kNHWC ? from.PickValueInArray({0, 16}) : from.PickValueInArray({0, 2, 4, 8, 16});
  if (element_size(found->dtype) > request.aligned) request.aligned = 0;
  request.allow_tf32 = from.ConsumeBool();
  request.forced.rank = from.ConsumeIntegralInRange<int32_t>(0, 20);
  const int64_t out_channels = number(from, 1, (int64_t{1} << 31) - kMostDivided - 1);
  const DepthwiseProblem& p = request.problem;
  if (getenv("FUZZ_PRINT") != nullptr) {
    fprintf(stderr,
            "kind %d, arch %d, %d SMs, %lld of %lld bytes of shared memory, multiplier %lld, aligned %d, rank %d, outputs %lld\n",
            kind, gpu.arch, gpu.sm_count, (long long)gpu.shared_per_block, (long long)gpu.shared_per_sm, (long long)multiplier,
            request.aligned, request.forced.rank, (long long)out_channels);
    print(p);
  }
  const bool weights = allocable(p, {out_channels, p.channels}) && allocable(p, {p.batch, out_channels, p.out_h, p.out_w});
  const SeparableAlignment alignment = {from.ConsumeBool(), from.ConsumeBool(), from.ConsumeBool(), from.ConsumeBool(),
                                        request.aligned};
  switch (kind) {
    case 0: {
      DepthwiseTileArgs args;
      check(plan_depthwise(Pass::kForward, request, gpu, &args), gpu);
      return check_tiles(args.tiling, p.out_h, p.out_w);
    }
    case 1: {
      Work work;
      work.request = request;
      turn_to_input(&work);
      const DepthwiseProblem& turned = work.request.problem;
      set_dense(&work.request.problem, turned.channels, turned.channels);
      DepthwiseTileArgs args;
      check(plan_depthwise(work.kernel_pass, work.request, gpu, &args), gpu);
      return check_tiles(args.tiling, turned.out_h, turned.out_w);
    }
    case 2: {
      BackwardWeightTileArgs args;
      check(plan_backward_weight(request, gpu, &args), gpu);
      HOLDS(args.parts >= 1 && args.tiles >= 1);
      if (args.tiling.tile_h > 0) check_tiles(args.tiling, p.out_h, p.out_w);
      Work work;
      work.request = request;
      turn_to_input(&work);
      BackwardTileArgs both;
      if (work.kernel_pass != Pass::kForward) return;
      const LaunchPlan plan = plan_backward(work.request, request, gpu, &both);
      return plan.launch.row != nullptr ? check(plan, gpu) : void();
    }
    case 3: {
      if (!weights) return;
      const SeparablePlan plan = plan_separable(request, out_channels, alignment, gpu);
      if (!plan.fused) check(plan.depthwise, gpu);
      return check(plan.block, gpu);
    }
    case 4:
      return check(plan_batch_norm(from.ConsumeBool() ? Pass::kForward : Pass::kBackward, p, request.aligned, gpu).values, gpu);
    case 5: {
      const int64_t in_channels = number(from, 1, (int64_t{1} << 31) - kMostDivided - 1);
      if (!weights || !allocable(p, {p.batch, in_channels, p.in_h, p.in_w}) || !allocable(p, {p.channels, in_channels})) return;
      const InvertedPlan plan = plan_inverted_residual(request, in_channels, out_channels, alignment, gpu);
      return plan.fused ? check(plan.block, gpu) : void();
    }
    default: {
      const DepthwiseNormPlan plan = plan_depthwise_norm(request, gpu);
      return plan.fused ? check(plan.launch, gpu) : void();
    }
  }
}

}  // namespace
}  // namespace dwconv::cuda

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider from(data, size);
  dwconv::cuda::run(from);
  return 0;
}
