// Pieces of lines for the kernels of filters of one row (depthwise_lines.cuh): long ones share what a thread prepares, short ones
// make enough blocks to fill the GPU.

#include <algorithm>

#include "cuda/plan/depthwise_tiles.h"

namespace dwconv::cuda {
namespace {

constexpr int64_t kSector = 32;  // bytes
constexpr double kSetup = 120;   // instructions of a thread, the sums of a weight gradient apart

// Of a tiling whose tile_w and slab are set, of so many threads side by side.
Candidate costed(const KernelRow& row, const Request& request, const Gpu& gpu, bool in_one_part, int64_t side, Tiling t) {
  const DepthwiseProblem& p = request.problem;
  const bool nhwc = row.layout == Layout::kNHWC, weight = row.pass == Pass::kBackwardWeight;
  const int64_t unit = element_size(p.dtype), lines = p.batch * p.out_h;
  t.tile_h = 1, t.tiles_h = static_cast<int32_t>(p.out_h);
  t.tiles_w = static_cast<int32_t>(ceil_div(p.out_w, t.tile_w));
  t.slabs = ceil_div(nhwc || weight ? p.channels : lines * p.channels, t.slab);
  Candidate c;
  c.tiling = t;
  c.launch.row = &row;
  c.in_rows = 1, c.in_columns = t.tile_w + p.kernel_w - 1;
  c.launch.threads = kLineThreads;
  c.launch.blocks_per_sm = !nhwc ? kLineBlocks : weight ? kWeightPieceBlocks : kPieceBlocks;
  c.tiles = (nhwc || weight ? lines : 1) * t.tiles_w;
  c.launch.blocks = t.slabs * c.tiles;

  // In channels_last a thread reads the samples before its piece again; in NCHW a block the sectors at its tile's sides.
  const int64_t outputs_a_thread = static_cast<int64_t>(t.tile_w) * t.slab / kLineThreads;
  const int64_t channels = nhwc ? kLineBytes / unit : 1, piece = outputs_a_thread / channels;
  const double again = nhwc ? static_cast<double>(p.kernel_w - 1) / static_cast<double>(piece) : 0;
  const double sides = nhwc ? 0 : static_cast<double>(t.tiles_w * kSector * ((p.pad_w > 0) + (p.pad_w < p.kernel_w - 1)));
  const double values = static_cast<double>(lines * p.channels * unit);
  const double run = static_cast<double>(nhwc ? std::min<int64_t>(t.slab, p.channels) * unit : side * kChunk);
  const double penalty = penalty_of_runs(run);
  const double moved = penalty * (values * (static_cast<double>(p.in_w) * (1 + again) + static_cast<double>(p.out_w)) +
                                  sides * static_cast<double>(lines * p.channels));
  double extra = 0;
  if (weight) {
    c.launch.shared_bytes = std::max<int64_t>(p.kernel_w, channels) * kLineThreads * accumulate_size(p.dtype);
    extra = share_parts(p, in_one_part, c.launch.blocks_per_sm, moved, gpu, &c);
  }
  const double blocks = static_cast<double>(std::max<int64_t>(c.launch.blocks, 1));
  const double computed = static_cast<double>(t.slabs * t.slab * t.tiles_w * t.tile_w) *
                          static_cast<double>(nhwc || weight ? lines : 1);  // unused lanes and ends of lines too
  BlockCost cost;
  cost.total_bytes = penalty * values * static_cast<double>(p.in_w + p.out_w) + extra;
  cost.bytes = (moved + extra) / blocks;
  cost.flops = 2 * computed / blocks * (static_cast<double>(p.kernel_w) + (nhwc ? 8 : 6)) +
               2.0 * kLineThreads * (weight ? kWeightSetup : kSetup);
  cost.flop_rate = scalar_rate(p.dtype, gpu) * 0.6;
  cost.direct = true;
  if (weight) cost.waits = static_cast<double>(ceil_div(c.tiles, c.parts));
  c.seconds = launch_seconds(c.launch, cost, gpu) + (c.parts > 1 ? kSumPartsSeconds + kPartSeconds * c.parts : 0);
  return c;
}

}  // namespace

bool best_line(const KernelRow& row, const Request& request, const Gpu& gpu, Candidate* best) {
  const DepthwiseProblem& p = request.problem;
  const bool nhwc = row.layout == Layout::kNHWC, weight = row.pass == Pass::kBackwardWeight;
  const int64_t unit = element_size(p.dtype), run = nhwc ? 1 : kChunk / unit, width = nhwc ? kLineBytes / unit : 1;
  Ranking<Candidate> ranking(request.forced.rank);
  // Threads side by side, along the channels in channels_last and along a line in NCHW; the others take other pieces or lines.
  for (int64_t side = nhwc ? 8 : 1; side <= kLineThreads; side *= 2) {
    const int64_t needed = nhwc ? p.channels : p.out_w;
    if (side > (nhwc ? 8 : 1) && (side / 2) * (nhwc ? width : run) >= needed) break;
    const int64_t others = kLineThreads / side;
    for (int64_t steps = nhwc ? 4 : 1; steps <= 256; steps *= 2) {
      const int64_t tile_w = nhwc ? others * steps : side * run * steps;
      const int64_t before = tile_w / 2;  // of the tile of half as many steps
      if (steps > (nhwc ? 4 : 1) && before >= p.out_w) break;
      if (tile_w >= int64_t{1} << 30) break;
      Tiling t;
      t.tile_w = static_cast<int32_t>(tile_w);
      t.slab = static_cast<int32_t>(nhwc ? side * width : others);
      ranking.offer(costed(row, request, gpu, false, side, t));
      if (weight) ranking.offer(costed(row, request, gpu, true, side, t));
    }
  }
  *best = *ranking.chosen();
  return true;
}

}  // namespace dwconv::cuda
