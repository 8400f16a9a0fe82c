// Tiles of the depthwise kernels. Each candidate tile is costed by what its blocks move and compute; the cheapest wins, so that
// large problems get tiles with little halo and small ones enough blocks to fill the GPU.

#include "cuda/plan/depthwise_tiles.h"

#include <algorithm>

namespace dwconv::cuda {
namespace {

constexpr int kMinThreads = 64;
constexpr double kExcess = 0.1;        // of a tile's time, for each time its problem's bytes that it moves again
constexpr int64_t kSegmentSlack = 15;  // bytes by which a segment may be shifted against its chunks

}  // namespace

Shape shape_of(const KernelRow& row) {
  const bool nhwc = row.layout == Layout::kNHWC, weight = row.pass == Pass::kBackwardWeight;
  Shape s;
  s.weight = weight;
  s.transposed = row.pass == Pass::kBackwardInput;
  s.rows = row.family == Family::kRows;
  s.large = row.family == Family::kLarge || row.family == Family::kLargeLines;
  if (weight) s.setup = kWeightSetup;
  s.filters = nhwc && !weight && !s.large && !s.rows;
  if (row.family == Family::kLines) {
    s.channels = nhwc ? static_cast<int>(kLineBytes / element_size(row.dtype)) : 1;
  } else if (s.large) {
    s.patch_h = nhwc || weight || row.family == Family::kLargeLines ? 1 : 4, s.patch_w = kRunTaps, s.channels = nhwc ? 2 : 1;
    s.blocks = kLargeBlocks, s.instructions = 6;
  } else if (s.rows && !nhwc) {
    s.patch_h = 1, s.patch_w = static_cast<int>(row.aligned / element_size(row.dtype));
    s.threads = kPlaneRowThreads, s.blocks = weight ? kPlaneWeightRowBlocks : plane_row_blocks(row.filter);
    s.instructions = (weight ? 7 : 4) + 16.0 / s.patch_w;
  } else if (s.rows) {
    s.patch_h = 1, s.patch_w = 4;
    const int64_t unit = element_size(row.dtype);
    s.channels = static_cast<int>(row.aligned / unit);
    s.blocks =
        weight ? weight_row_blocks(s.channels, row.filter, row.stride) : row_blocks(unit, s.channels, row.filter, row.stride);
    s.threads =
        weight ? weight_row_threads(s.channels, row.filter, row.stride) : row_threads(unit, s.channels, row.filter, row.stride);
    s.instructions = (weight ? 7 : row.filter + row.stride > 6 ? 11 : 4) / (s.channels == 4 ? 2.0 : 1.0);
  } else if (nhwc) {
    s.patch_h = weight ? 2 : 4, s.patch_w = 4, s.channels = 2;
    s.blocks = weight ? weight_blocks(row.filter) : nhwc_blocks(row.filter), s.instructions = weight ? 14 : 10;
  } else {
    s.patch_h = 4, s.patch_w = s.transposed ? 6 : 7, s.channels = 1;
    s.blocks = weight ? weight_blocks(row.filter) : nchw_blocks(row.filter), s.instructions = 16;
  }
  return s;
}

namespace {

int64_t span(const Shape& s, int64_t outputs, int64_t kernel, int64_t stride) {
  return s.transposed ? (outputs - 1) / stride + (kernel - 1) / stride + 1 : (outputs - 1) * stride + kernel;
}

// Sums the in-image input rows or columns of all tiles along one axis, as reads() does.
double staged(const Shape& s, int64_t tiles, int64_t tile, int64_t kernel, int64_t stride, int64_t pad, int64_t in_size) {
  int64_t total = 0;
  const int64_t first_tile = s.transposed ? -(pad % stride) : 0;
  const int64_t looked = std::min(tiles, kTilesLookedAt);
  for (int64_t i = 0; i < looked; ++i) {
    const int64_t y = first_tile + i * tile;
    const int64_t begin = s.transposed ? (y + pad) / stride - (kernel - 1) / stride : y * stride - pad;
    const int64_t end = begin + span(s, tile, kernel, stride);
    total += std::max<int64_t>(std::min(end, in_size) - std::max<int64_t>(begin, 0), 0);
  }
  return static_cast<double>(total) * static_cast<double>(tiles) / static_cast<double>(looked);
}

// Elements between rows in shared memory that are an odd number of words apart.
int32_t odd_pitch(int64_t columns, int64_t unit) {
  const int64_t words = round_up(columns * unit, 4) / 4 | 1;
  return static_cast<int32_t>(unit == 8 ? columns | 1 : words * 4 / unit);
}

// Fills in the rest of a candidate whose tiling has tile_h, tile_w and slab; false where it does not fit the GPU.
bool complete(const KernelRow& row, const Shape& s, const Request& request, const Gpu& gpu, bool in_one_part, Candidate& c) {
  const DepthwiseProblem& p = request.problem;
  Tiling& t = c.tiling;
  const int64_t unit = element_size(p.dtype), sum_unit = accumulate_size(p.dtype), taps = p.kernel_h * p.kernel_w;
  const bool nhwc = p.layout == Layout::kNHWC;
  const int64_t first_h = s.transposed ? p.pad_h % p.stride_h : 0, first_w = s.transposed ? p.pad_w % p.stride_w : 0;
  t.tiles_h = static_cast<int32_t>(ceil_div(p.out_h + first_h, t.tile_h));
  t.tiles_w = static_cast<int32_t>(ceil_div(p.out_w + first_w, t.tile_w));
  t.aligned = nhwc && request.aligned == kChunk;
  c.in_rows = span(s, t.tile_h, p.kernel_h, p.stride_h), c.in_columns = span(s, t.tile_w, p.kernel_w, p.stride_w);
  const bool runs = s.large && s.weight;  // threads own runs of taps, not patches
  if (runs) c.in_columns = t.tile_w + round_up(p.kernel_w, kRunTaps) - 1;
  const int64_t patches = t.tile_h / s.patch_h * (t.tile_w / s.patch_w);
  const int64_t planes = p.batch * p.channels;
  int64_t lanes, tile_bytes, out_bytes;
  if (s.rows) {
    t.slabs = ceil_div(nhwc || s.weight ? p.channels : planes, t.slab);
    lanes = t.slab / s.channels;
    tile_bytes = out_bytes = 0;
    if (lanes * t.tile_w / s.patch_w > s.threads) return false;
    c.launch.threads = static_cast<int32_t>(lanes * t.tile_w / s.patch_w);
    if (s.exactly > 0 && c.launch.threads != s.exactly) return false;
  } else if (nhwc) {
    t.slabs = ceil_div(p.channels, t.slab);
    lanes = t.slab / s.channels;
    tile_bytes = c.in_rows * c.in_columns * t.slab * unit;
    out_bytes = s.weight ? static_cast<int64_t>(t.tile_h) * t.tile_w * t.slab * unit : 0;
    c.launch.threads = static_cast<int32_t>(
        std::clamp<int64_t>(round_up(lanes * patches, 32), std::max<int64_t>(kMinThreads, lanes), kMostThreads));
    c.launch.threads = static_cast<int32_t>(c.launch.threads / lanes * lanes);
  } else {
    t.slabs = ceil_div(s.weight ? p.channels : planes, t.slab);
    lanes = t.slab;
    c.in_whole = !s.large && t.tiles_w == 1 && p.in_stride_h == p.in_w;
    c.out_whole = t.tiles_w == 1 && p.out_stride_h == p.out_w;
    const int64_t rows = std::min(c.in_rows, p.in_h), out_rows = std::min<int64_t>(t.tile_h, p.out_h);
    const int64_t slack = kSegmentSlack / unit;
    c.in_pitch = static_cast<int32_t>(round_up((c.in_whole ? rows * p.in_w : c.in_columns) + slack, kChunk / unit));
    c.out_pitch = static_cast<int32_t>(round_up((c.out_whole ? out_rows * p.out_w : t.tile_w) + slack, kChunk / unit));
    tile_bytes = t.slab * (c.in_whole ? 1 : c.in_rows) * c.in_pitch * unit;
    out_bytes = t.slab * (c.out_whole ? 1 : t.tile_h) * c.out_pitch * unit;
    if (s.large) {
      c.in_pitch = odd_pitch(c.in_columns, unit);
      tile_bytes = t.slab * c.in_rows * c.in_pitch * unit;
    }
    if (runs) {
      c.out_pitch = odd_pitch(t.tile_w, unit);
      out_bytes = t.slab * t.tile_h * c.out_pitch * unit;
    }
    if (!runs && t.slab * patches > kMostThreads) return false;
    c.launch.threads = static_cast<int32_t>(round_up(t.slab * patches, 32));
  }
  if (runs) {
    const int64_t all = p.kernel_h * ceil_div(p.kernel_w, kRunTaps);
    if (lanes > kMostThreads) return false;
    c.groups = static_cast<int32_t>(std::min(all, kMostThreads / lanes));
    c.group_blocks = static_cast<int32_t>(ceil_div(all, c.groups));
    c.launch.threads = kMostThreads;
  }
  c.launch.blocks_per_sm = static_cast<int32_t>(s.blocks * s.threads / round_up(c.launch.threads, 32));
  const int64_t filter_bytes = s.filters ? taps * t.slab * sum_unit : s.large ? taps * t.slab * unit : 0;
  if (s.weight) {
    const int64_t sums = std::max<int64_t>(runs ? kRunTaps : p.kernel_w, s.channels) * c.launch.threads * sum_unit;
    c.launch.shared_bytes = std::max(tile_bytes + out_bytes, sums);
  } else {
    c.launch.shared_bytes = std::max(tile_bytes + filter_bytes, out_bytes);
  }
  constexpr int64_t kMostIndex = int64_t{1} << 31;
  if (c.launch.shared_bytes > gpu.shared_per_block) return false;
  if (!s.rows && c.in_rows * c.in_columns * t.slab >= kMostIndex) return false;

  const double halo = staged(s, t.tiles_h, t.tile_h, p.kernel_h, p.stride_h, p.pad_h, p.in_h) *
                      staged(s, t.tiles_w, t.tile_w, p.kernel_w, p.stride_w, p.pad_w, p.in_w);
  // A row of a NCHW tile that is narrower than the image begins and ends within sectors of 32 bytes, of which it uses a part.
  const double split = nhwc || t.tiles_w == 1 ? 0.0 : static_cast<double>(t.tiles_w * (32 - unit));
  const double part = nhwc ? std::max(1.0, 32.0 / static_cast<double>(t.slab * unit)) : 1.0;  // runs of less than a sector
  const double loads = static_cast<double>(planes) * (halo * unit + split * p.in_h) * part * c.group_blocks;
  const double outputs = static_cast<double>(planes) * p.out_h * (p.out_w * unit + split) * part * c.group_blocks;
  c.tiles = (s.weight || nhwc ? p.batch : 1) * t.tiles_h * t.tiles_w;
  c.launch.blocks = t.slabs * c.tiles;
  double extra = 0;
  if (s.weight) {
    const int64_t resident = std::clamp<int64_t>(gpu.shared_per_sm / (c.launch.shared_bytes + 1024), 1, c.launch.blocks_per_sm);
    extra = share_parts(p, in_one_part, resident, loads + outputs, gpu, &c);
  }
  // Unused lanes and rows of the last patches are computed too; short runs of channels cost more to fetch.
  const double run = nhwc ? static_cast<double>(std::min(t.slab, static_cast<int32_t>(p.channels)) * unit) : 256;
  const double short_run_penalty = penalty_of_runs(run);
  const double blocks = static_cast<double>(std::max<int64_t>(c.launch.blocks, 1));
  const double begun = s.rows ? static_cast<double>((p.kernel_h - 1) / p.stride_h) : 0;  // rows read before the first is complete
  const double computed = static_cast<double>(t.tiles_h) * (t.tile_h + begun) * static_cast<double>(t.tiles_w) * t.tile_w *
                          static_cast<double>(planes);
  const double warps = static_cast<double>(round_up(c.launch.threads, 32)) / c.launch.threads;
  const double idle =
      (nhwc ? static_cast<double>(t.slabs * t.slab) / static_cast<double>(p.channels) : 1.0) * (s.rows ? warps : 1.0);
  const double phases = s.transposed ? static_cast<double>(p.stride_h * p.stride_w) : 1;
  const double once = static_cast<double>(planes) * static_cast<double>(p.in_h * p.in_w + p.out_h * p.out_w) * unit;
  BlockCost cost;
  cost.total_bytes = once * short_run_penalty + extra;
  cost.bytes = (loads * short_run_penalty + outputs + extra) / blocks;
  cost.flops = 2 * computed * idle / blocks * (static_cast<double>(taps) / phases + s.instructions);
  cost.flops += 2.0 * c.launch.threads * (s.rows && nhwc ? warps : 1.0) * s.setup;
  cost.flop_rate = scalar_rate(p.dtype, gpu) * (s.large ? 0.5 : 0.6);
  cost.direct = s.rows;
  if (s.rows && nhwc) cost.width = std::max(1.0, s.channels / 2.0);
  if (s.weight) cost.waits = static_cast<double>(ceil_div(c.tiles, c.parts));
  c.seconds = launch_seconds(c.launch, cost, gpu) + (c.parts > 1 ? kSumPartsSeconds + kPartSeconds * c.parts : 0);
  // Tiles that the model takes for equal differ by twice in what they move, and L2 merges the sectors that two blocks write.
  if (s.transposed || row.family == Family::kLargeLines) c.seconds *= 1 + kExcess * ((loads + outputs) / once - 1);
  return true;
}

// Tile sides to try along an axis: the whole of it, and even shares.
std::vector<int64_t> sides(int64_t size, int64_t patch, int64_t most) {
  std::vector<int64_t> list;
  for (int64_t pieces = 1; pieces <= 64; ++pieces) {
    const int64_t side = round_up(ceil_div(std::max<int64_t>(size, 1), pieces), patch);
    if (side <= most && (list.empty() || list.back() != side)) list.push_back(side);
    if (side == patch) break;
  }
  if (list.empty()) list.push_back(std::max(most / patch, int64_t{1}) * patch);
  return list;
}

}  // namespace

double share_parts(const DepthwiseProblem& p, bool in_one_part, int64_t resident, double moved, const Gpu& gpu, Candidate* c) {
  const double part_bytes = static_cast<double>(p.channels * p.kernel_h * p.kernel_w * accumulate_size(p.dtype));
  const int64_t affordable = std::max<int64_t>(static_cast<int64_t>(moved / 4 / part_bytes), 1);
  const int64_t blocks = c->tiling.slabs * c->group_blocks, most = std::min(resident * gpu.sm_count / blocks, affordable);
  c->parts = in_one_part ? 1 : static_cast<int32_t>(std::clamp<int64_t>(most, 1, std::max<int64_t>(c->tiles, 1)));
  c->launch.blocks = blocks * c->parts;
  return c->parts > 1 ? 2 * part_bytes * c->parts : 0;
}

bool best_candidate(const KernelRow& row, const Shape& s, const Request& request, const Gpu& gpu, Candidate* best) {
  const DepthwiseProblem& p = request.problem;
  const bool nhwc = p.layout == Layout::kNHWC;
  const int64_t unit = element_size(p.dtype);
  const int64_t offset_h = s.transposed ? p.pad_h % p.stride_h : 0, offset_w = s.transposed ? p.pad_w % p.stride_w : 0;
  std::vector<int64_t> slabs;
  if (s.rows && nhwc) {
    for (int64_t lanes = 4; lanes <= kMostThreads && (lanes == 4 || lanes * s.channels < 2 * p.channels); lanes *= 2) {
      slabs.push_back(lanes * s.channels);
    }
  } else if (nhwc) {
    for (int64_t bytes : {128, 64, 32, 16}) {
      if (bytes / unit >= s.channels && (bytes / unit < 2 * p.channels || bytes == 16)) slabs.push_back(bytes / unit);
    }
    if (slabs.empty()) slabs.push_back(s.channels);
  } else {
    const int64_t planes = s.weight ? p.channels : p.batch * p.channels;
    for (int64_t count = 1; count <= 128 && count < 2 * planes; count *= 2) slabs.push_back(std::min(count, planes));
    const int64_t patches_a_plane =
        (s.rows ? 1 : ceil_div(p.out_h + offset_h, s.patch_h)) * ceil_div(p.out_w + offset_w, s.patch_w);
    if (patches_a_plane <= s.threads) slabs.push_back(std::min(s.threads / patches_a_plane, planes));
  }
  Ranking<Candidate> ranking(request.forced.rank);
  for (int64_t tile_h : sides(p.out_h + offset_h, s.patch_h, nhwc ? 128 : 256)) {
    for (int64_t tile_w : sides(p.out_w + offset_w, s.patch_w, nhwc ? 128 : s.patch_w * 64)) {
      for (int64_t slab : slabs) {
        for (const bool in_one_part : {false, true}) {
          if (in_one_part && !s.weight) continue;
          Candidate c;
          c.launch.row = &row;
          c.tiling.tile_h = static_cast<int32_t>(tile_h), c.tiling.tile_w = static_cast<int32_t>(tile_w);
          c.tiling.slab = static_cast<int32_t>(slab);
          if (complete(row, s, request, gpu, in_one_part, c)) ranking.offer(c);
        }
      }
    }
  }
  if (ranking.chosen() == nullptr) return false;
  *best = *ranking.chosen();
  return true;
}

}  // namespace dwconv::cuda
