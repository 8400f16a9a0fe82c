// Tiles of the backward pass of a depthwise convolution with the BatchNorm and activation after it, and whether it is one kernel.
#include <algorithm>

#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

struct Candidate {
  double seconds;
  LaunchPlan plan;
  DepthwiseNormArgs args;
};

// As Transposed::span (kernels/taps.cuh).
int64_t span(int64_t tile, int64_t kernel, int64_t stride) { return (tile - 1) / stride + (kernel - 1) / stride + 1; }

// A launch of the row with one tile, and `slab` channels (channels_last) or images (NCHW) of it; false where it does not fit.
bool complete(const KernelRow& row, const DepthwiseProblem& p, const Gpu& gpu, int64_t tile_h, int64_t tile_w, int64_t slab,
              Candidate* c) {
  const bool nhwc = p.layout == Layout::kNHWC;
  const int64_t K = p.kernel_h, S = p.stride_h, unit = element_size(p.dtype), wide = accumulate_size(p.dtype);
  const int64_t rows = span(tile_h, K, S), columns = span(tile_w, K, S);
  // NCHW: a patch reads whole runs, the last of them past its columns.
  const int64_t pitch = round_up(columns + kGradientColumns, kGradientColumns);
  const int64_t slots = kDepthwiseNormThreads * depthwise_norm_channels(static_cast<int>(K)) / slab;
  const int64_t sums = nhwc ? slots * K * K * slab : K * K * (kDepthwiseNormThreads + 1);
  DepthwiseNormArgs& a = c->args;
  Launch& launch = c->plan.launch;
  a.problem = p;
  a.tile_h = static_cast<int32_t>(tile_h), a.tile_w = static_cast<int32_t>(tile_w);
  a.tiles_h = static_cast<int32_t>(ceil_div(p.in_h + p.pad_h % S, tile_h));
  a.tiles_w = static_cast<int32_t>(ceil_div(p.in_w + p.pad_w % S, tile_w));
  a.tiles = (nhwc ? p.batch : ceil_div(p.batch, slab)) * a.tiles_h * a.tiles_w;
  a.pitch = static_cast<int32_t>(pitch);
  a.slab = static_cast<int32_t>(slab);
  a.slabs = static_cast<int32_t>(nhwc ? ceil_div(p.channels, slab) : p.channels);
  launch.row = &row;
  launch.threads = kDepthwiseNormThreads;
  launch.blocks_per_sm = kDepthwiseNormBlocks;
  launch.shared_bytes = std::max(rows * (nhwc ? columns : pitch) * slab, sums) * wide;
  if (launch.shared_bytes > gpu.shared_per_block || 2 * (launch.shared_bytes + 1024) > gpu.shared_per_sm) return false;
  // Twice as many blocks as run together, so that they even out; a part's sums are written, and read again.
  const int64_t wanted = ceil_div(2 * kDepthwiseNormBlocks * gpu.sm_count, a.slabs);
  a.parts = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, a.tiles));
  launch.blocks = static_cast<int64_t>(a.slabs) * a.parts;

  const double each = static_cast<double>(ceil_div(a.tiles, a.parts));  // tiles of a block
  const double area = static_cast<double>(tile_h * tile_w * slab), halo = static_cast<double>(rows * columns * slab);
  BlockCost cost;
  cost.bytes = each * 2 * static_cast<double>(unit) * (halo + area) + static_cast<double>(K * K * slab * wide);
  cost.total_bytes =
      2.0 * static_cast<double>(unit * p.batch * p.channels) * static_cast<double>(p.out_h * p.out_w + p.in_h * p.in_w) +
      2.0 * static_cast<double>(a.parts * p.channels * K * K * wide);
  // Instructions of a value: some 16 for its gradient by BatchNorm, 30 where it is read by itself; two multiply-adds a tap and 8
  // around them. Threads without a patch wait for the others.
  const int64_t busy = tile_h / S * (tile_w / kGradientColumns) * (nhwc ? kDepthwiseNormThreads / slots : slab);
  const double idle = std::max(1.0, kDepthwiseNormThreads / static_cast<double>(busy));
  cost.flops =
      2 * each * ((nhwc ? 16 : 30) * halo + idle * area * (2.0 * static_cast<double>(K * K) / static_cast<double>(S * S) + 8));
  cost.flop_rate = scalar_rate(DType::kFloat32, gpu) * 0.8;
  cost.waits = each;
  c->plan.seconds = c->seconds = launch_seconds(launch, cost, gpu);
  return true;
}

}  // namespace

DepthwiseNormPlan plan_depthwise_norm(const Request& request, const Gpu& gpu) {
  DepthwiseNormPlan plan;
  const DepthwiseProblem& p = request.problem;
  const Forced& forced = request.forced;
  const int64_t elements = p.batch * p.channels, pixels = p.in_h * p.in_w, outputs = p.out_h * p.out_w;
  plan.bytes = 2 * element_size(p.dtype) * elements * (pixels + outputs);
  plan.flops = counted(1.0 * elements * outputs * (12 + 4 * p.kernel_h * p.kernel_w));
  const KernelRow* row = nullptr;
  for (const KernelRow* each : kernel_table()) {
    const bool fits = misfit(*each, Op::kDepthwiseNorm, Pass::kBackward, p, request.multiplier, gpu) == nullptr;
    if (row == nullptr && fits && request.aligned >= each->aligned) row = each;
  }
  if (row == nullptr || forced.fusion == Fusion::kNever) {
    plan.reason = "apart: no kernel for this filter, stride, dtype, layout or alignment";
    if (row != nullptr) plan.reason = "apart, as forced";
    return plan;
  }
  Ranking<Candidate> ranking(forced.rank);
  const int64_t S = p.stride_h, lane = depthwise_norm_channels(static_cast<int>(p.kernel_h));
  const bool nhwc = p.layout == Layout::kNHWC;
  for (int64_t pieces = 1; pieces <= 16; ++pieces) {
    const int64_t tile_w = round_up(ceil_div(p.in_w + p.pad_w % S, pieces), kGradientColumns);
    for (int64_t rows : {1, 2, 4, 7, 8, 14, 16, 28}) {
      for (int64_t slab :
           nhwc ? std::vector<int64_t>{32 * lane, 16 * lane, 8 * lane} : std::vector<int64_t>{1, 2, 4, 8, 16, 32}) {
        Candidate c;
        if ((nhwc || slab <= p.batch) && complete(*row, p, gpu, rows * S, tile_w, slab, &c)) ranking.offer(c);
      }
    }
    if (tile_w <= kGradientColumns) break;
  }
  const Candidate* const best = ranking.chosen();
  if (best == nullptr) {
    plan.reason = "apart: no tile fits shared memory";
    return plan;
  }
  // Apart BatchNorm's sweep reads two tensors and writes one, and each gradient of the convolution moves two.
  const double unit = static_cast<double>(element_size(p.dtype) * elements);
  const double apart = unit * static_cast<double>(5 * outputs + 2 * pixels) / (0.8 * gpu.bytes_per_second) + 3 * 1.5e-6;
  plan.fused = best->seconds <= apart || forced.fusion == Fusion::kAlways;
  plan.launch = best->plan;
  plan.args = best->args;
  char costs[96];
  snprintf(costs, sizeof costs, "expected %.1f us in one pass, %.1f us apart; ", best->seconds * 1e6, apart * 1e6);
  plan.reason = costs + std::string(plan.fused ? row->name : "apart");
  if (!plan.fused) return plan;
  plan.reason += ": " + std::to_string(plan.args.tile_h) + "x" + std::to_string(plan.args.tile_w) + " pixels by " +
                 std::to_string(plan.args.slab) + (nhwc ? " channels a tile, " : " images a tile, ") +
                 std::to_string(plan.args.parts) + " parts";
  return plan;
}

DepthwiseStatisticsPlan plan_depthwise_statistics(const Request& request, bool by_image, const Gpu& gpu) {
  // The convolution's kernel and the one that takes statistics besides differ in that alone.
  const auto twin = [](const KernelRow& row, Op op) -> const KernelRow* {
    for (const KernelRow* each : kernel_table()) {
      if (each->op == op && each->pass == Pass::kForward && each->family == Family::kRows && each->layout == row.layout &&
          each->dtype == row.dtype && each->filter == row.filter && each->stride == row.stride && each->aligned == row.aligned)
        return each;
    }
    return nullptr;
  };
  DepthwiseStatisticsPlan plan;
  Request convolution = request;
  const KernelRow* const forced = request.forced.row;
  if (forced != nullptr && forced->op == Op::kDepthwiseNorm) convolution.forced.row = twin(*forced, Op::kDepthwise);
  static_cast<LaunchPlan&>(plan) = plan_depthwise(Pass::kForward, convolution, gpu, &plan.args.convolution);
  const KernelRow& row = *plan.launch.row;
  if (row.family != Family::kRows || request.forced.fusion == Fusion::kNever) return plan;
  const KernelRow* const statistics = twin(row, Op::kDepthwiseNorm);
  if (statistics == nullptr) return plan;
  const Tiling& t = plan.args.convolution.tiling;
  const bool nhwc = row.layout == Layout::kNHWC;
  const int64_t unit = element_size(row.dtype), channels = nhwc ? row.aligned / unit : 1;  // of a thread
  plan.launch.row = statistics;
  plan.launch.blocks_per_sm =
      nhwc ? statistics_blocks(unit, static_cast<int>(channels), row.filter, row.stride) : plane_statistics_blocks(row.filter);
  plan.launch.shared_bytes = plan.launch.threads * (2 * channels + 1) * accumulate_size(row.dtype);
  const int64_t tiles = static_cast<int64_t>(t.tiles_h) * t.tiles_w;
  plan.parts = static_cast<int32_t>(by_image ? tiles : request.problem.batch * tiles);
  plan.args.by_image = by_image;
  plan.reason += std::string(", by ") + statistics->name;
  return plan;
}

}  // namespace dwconv::cuda
