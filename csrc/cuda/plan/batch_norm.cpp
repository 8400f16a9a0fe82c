// How BatchNorm's two sweeps are cut: parts of the sums, and the blocks that write the values.
#include <algorithm>

#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

constexpr int64_t kRuns = 4;         // loads of a thread that are on their way together: batch_norm_sums.cuh
constexpr int64_t kMostLanes = 64;   // of channels_last: 1 KB of channels, the rest are rows
constexpr int64_t kBlocksPerSm = 8;  // so many even out; each makes constants and ends in a barrier

const KernelRow* norm_row(Pass pass, DType dtype, Layout layout) {
  for (const KernelRow* row : kernel_table()) {
    if (row->op == Op::kBatchNorm && row->pass == pass && row->dtype == dtype && row->layout == layout) return row;
  }
  return nullptr;
}

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

// The block's threads, and the parts or pieces of which there are enough for the GPU. `sums`: a block has one channel in NCHW.
void cut(const DepthwiseProblem& p, int64_t values, bool sums, const Gpu& gpu, BatchNormArgs* args) {
  args->layout = p.layout;
  args->batch = p.batch, args->channels = p.channels, args->pixels = p.in_h * p.in_w;
  args->aligned = values > 1;
  const int64_t wanted = kBlocksPerSm * gpu.sm_count;
  if (p.layout == Layout::kNHWC) {
    const int64_t vectors = ceil_div(p.channels, values), slabs = ceil_div(vectors, kMostLanes), lanes = ceil_div(vectors, slabs);
    const int64_t rows = kNormThreads / lanes, pixels = args->batch * args->pixels;
    args->slabs = static_cast<int32_t>(slabs), args->lanes = static_cast<int32_t>(lanes), args->rows = static_cast<int32_t>(rows);
    const int64_t most = std::min<int64_t>(ceil_div(pixels, rows * kRuns), int64_t{1} << 20);
    args->parts = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(wanted, slabs), 1, most));
    return;
  }
  const int64_t vectors = ceil_div(args->pixels, values);
  const int64_t lanes = std::min<int64_t>(power_of_two(ceil_div(vectors, kRuns)), kNormThreads), rows = kNormThreads / lanes;
  args->lanes = static_cast<int32_t>(lanes), args->rows = static_cast<int32_t>(rows);
  const int64_t groups = ceil_div(sums ? p.batch : p.batch * p.channels, rows);  // of planes that a block has at a time
  const int64_t ranges = sums ? std::clamp<int64_t>(ceil_div(wanted, p.channels), 1, groups) : groups;
  const int64_t blocks = sums ? ranges * p.channels : groups;
  const int64_t pieces = std::clamp<int64_t>(ceil_div(wanted, blocks), 1, ceil_div(vectors, lanes * kRuns));
  args->piece = ceil_div(vectors, pieces) * values;
  args->pieces = static_cast<int32_t>(ceil_div(args->pixels, args->piece));
  args->parts = static_cast<int32_t>(ranges * args->pieces);
}

LaunchPlan launch_of(Pass pass, const DepthwiseProblem& p, const BatchNormArgs& args, int64_t sums_bytes) {
  LaunchPlan plan;
  plan.launch.row = norm_row(pass, p.dtype, p.layout);
  plan.launch.threads = kNormThreads;
  plan.launch.blocks_per_sm = kNormBlocks;
  plan.launch.shared_bytes = kNormThreads * sums_bytes;
  const int64_t of_nchw = sums_bytes > 0 ? p.channels * args.parts : ceil_div(p.batch * p.channels, args.rows) * args.pieces;
  plan.launch.blocks = p.layout == Layout::kNHWC ? static_cast<int64_t>(args.slabs) * args.parts : of_nchw;
  return plan;
}

}  // namespace

LaunchPlan plan_join_parts(Pass pass, DType dtype, int64_t channels, const Gpu& gpu) {
  LaunchPlan plan;
  plan.launch.row = row_of(pass, dtype, gpu);
  plan.launch.threads = kJoinedChannels * kJoiningThreads;
  plan.launch.blocks = ceil_div(channels, kJoinedChannels);
  plan.launch.shared_bytes = plan.launch.threads * (pass == Pass::kJoinGradSums ? 2 : 3) * 8;
  return plan;
}

BatchNormPlan plan_batch_norm(Pass pass, const DepthwiseProblem& p, int32_t aligned, const Gpu& gpu) {
  const bool backward = pass == Pass::kBackward;
  const int64_t unit = element_size(p.dtype), wide = accumulate_size(p.dtype);
  const int64_t values = aligned >= 16 ? 16 / unit : 1, channels = p.layout == Layout::kNHWC ? values : 1;
  BatchNormPlan plan;
  cut(p, values, true, gpu, &plan.sums_args);
  cut(p, values, false, gpu, &plan.values_args);
  plan.sums = launch_of(backward ? Pass::kGradSums : Pass::kStatistics, p, plan.sums_args,
                        wide * (backward ? 2 * channels : 2 * channels + 1));
  plan.values = launch_of(pass, p, plan.values_args, 0);
  plan.join = plan_join_parts(backward ? Pass::kJoinGradSums : Pass::kJoinStatistics,
                              wide == 8 ? DType::kFloat64 : DType::kFloat32, p.channels, gpu);

  const int64_t elements = p.batch * p.channels * plan.sums_args.pixels, sweeps = backward ? 5 : 3;
  plan.bytes = elements * unit * (backward ? 3 : 2);
  plan.flops = elements * (backward ? 12 : 7);
  const double moved = static_cast<double>(elements * unit * sweeps);
  plan.values.seconds = moved / gpu.bytes_per_second + 3 * 1.5e-6;
  plan.reason = std::string(plan.sums.launch.row->name) + " in " + std::to_string(plan.sums_args.parts) + " parts, then " +
                plan.values.launch.row->name + ": " + std::to_string(values) + " values a load";
  return plan;
}

}  // namespace dwconv::cuda
