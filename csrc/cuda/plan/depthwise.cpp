// Tiles of the depthwise kernels. Each candidate tile is costed by what its blocks move and compute; the cheapest wins, so that
// large problems get tiles with little halo and small ones enough blocks to fill the GPU.

#include <algorithm>

#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

constexpr int kMinThreads = 64;
constexpr int64_t kChunk = 16;               // bytes
constexpr double kWeightSetup = 800;         // instructions of a thread, with the sums over the threads
constexpr double kSumPartsSeconds = 2.5e-6;  // of the second launch, where there are several parts
constexpr double kPartSeconds = 6e-9;        // a part: of loads of 0.4 us 64 are on their way
constexpr int64_t kSegmentSlack = 15;        // bytes by which a segment may be shifted against its chunks

// What a tiled kernel is, as its file says.
struct Shape {
  int patch_h = 1, patch_w = 1;
  int channels = 1;                        // channels_last: a thread's
  int threads = kMostThreads, blocks = 1;  // of a block at most, and how many an SM's registers hold
  int exactly = 0;                         // threads, where a launch's other blocks decide
  double setup = 300;                      // instructions of a thread apart from its outputs
  double instructions = 0;                 // an output, its taps' multiply-adds apart
  bool rows = false;                       // without staging: a thread walks down a strip's rows
  bool filters = false;                    // in shared memory, of accumulate_size
  bool large = false;                      // filters of the input's type behind the tile
  bool transposed = false;
  bool weight = false;  // backward_weight: both tensors are staged, and the sums meet in shared memory
};

Shape shape_of(const KernelRow& row) {
  const bool nhwc = row.layout == Layout::kNHWC, weight = row.pass == Pass::kBackwardWeight;
  Shape s;
  s.weight = weight;
  s.transposed = row.pass == Pass::kBackwardInput;
  s.rows = row.family == Family::kRows;
  s.large = row.family == Family::kLarge;
  if (weight) s.setup = kWeightSetup;
  s.filters = nhwc && !weight && !s.large && !s.rows;
  if (s.large) {
    s.patch_h = nhwc || weight ? 1 : 4, s.patch_w = kRunTaps, s.channels = nhwc ? 2 : 1;
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

int64_t span(const Shape& s, int64_t outputs, int64_t kernel, int64_t stride) {
  return s.transposed ? (outputs - 1) / stride + (kernel - 1) / stride + 1 : (outputs - 1) * stride + kernel;
}

struct Candidate {
  Launch launch;
  Tiling tiling;
  int64_t in_rows = 0, in_columns = 0;
  int32_t in_pitch = 0, out_pitch = 0;
  bool in_whole = false, out_whole = false;
  int32_t parts = 1, groups = 1, group_blocks = 1;
  int64_t tiles = 0;
  double seconds = 1e30;
};

// Sums the in-image input rows or columns of all tiles along one axis.
int64_t staged(const Shape& s, int64_t tiles, int64_t tile, int64_t kernel, int64_t stride, int64_t pad, int64_t in_size) {
  int64_t total = 0;
  const int64_t first_tile = s.transposed ? -(pad % stride) : 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t y = first_tile + i * tile;
    const int64_t begin = s.transposed ? (y + pad) / stride - (kernel - 1) / stride : y * stride - pad;
    const int64_t end = begin + span(s, tile, kernel, stride);
    total += std::max<int64_t>(std::min(end, in_size) - std::max<int64_t>(begin, 0), 0);
  }
  return total;
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

  const double halo = static_cast<double>(staged(s, t.tiles_h, t.tile_h, p.kernel_h, p.stride_h, p.pad_h, p.in_h)) *
                      static_cast<double>(staged(s, t.tiles_w, t.tile_w, p.kernel_w, p.stride_w, p.pad_w, p.in_w));
  // A row of a NCHW tile that is narrower than the image begins and ends within sectors of 32 bytes, of which it uses a part.
  const double split = nhwc || t.tiles_w == 1 ? 0.0 : static_cast<double>(t.tiles_w * (32 - unit));
  const double part = nhwc ? std::max(1.0, 32.0 / static_cast<double>(t.slab * unit)) : 1.0;  // runs of less than a sector
  const double loads = static_cast<double>(planes) * (halo * unit + split * p.in_h) * part * c.group_blocks;
  const double outputs = static_cast<double>(planes) * p.out_h * (p.out_w * unit + split) * part * c.group_blocks;
  c.tiles = (s.weight || nhwc ? p.batch : 1) * t.tiles_h * t.tiles_w;
  c.launch.blocks = t.slabs * c.tiles;
  double extra = 0;
  if (s.weight) {
    // Enough parts to fill the GPU, as long as the partial sums are a small share of what is moved.
    const double part_bytes = static_cast<double>(p.channels * taps * sum_unit);
    const int64_t affordable = std::max<int64_t>(static_cast<int64_t>((loads + outputs) / 4 / part_bytes), 1);
    const int64_t resident = std::clamp<int64_t>(gpu.shared_per_sm / (c.launch.shared_bytes + 1024), 1, c.launch.blocks_per_sm);
    c.parts = static_cast<int32_t>(std::clamp<int64_t>(std::min(resident * gpu.sm_count / (t.slabs * c.group_blocks), affordable),
                                                       1, std::max<int64_t>(c.tiles, 1)));
    if (in_one_part) c.parts = 1;
    c.launch.blocks = t.slabs * c.group_blocks * c.parts;
    extra = c.parts > 1 ? 2 * part_bytes * c.parts : 0;
  }
  // Unused lanes and rows of the last patches are computed too; short runs of channels cost more to fetch.
  const double run = nhwc ? static_cast<double>(std::min(t.slab, static_cast<int32_t>(p.channels)) * unit) : 256;
  const double short_run_penalty = run >= 256 ? 1.0 : run >= 128 ? 1.05 : run >= 64 ? 1.12 : 1.3;
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

int64_t chunks_of(const Tiling& t, int64_t values) { return t.aligned ? ceil_div(t.slab, values) : t.slab; }

std::string describe(const Candidate& c, const Request& request) {
  const Tiling& t = c.tiling;
  return std::string(c.launch.row->name) + ", " +
         (c.launch.row->filter > 0 ? std::to_string(c.launch.row->filter) + "x" + std::to_string(c.launch.row->filter) +
                                         " stride " + std::to_string(c.launch.row->stride)
                                   : std::string("any filter at stride 1")) +
         ": " + std::to_string(t.tile_h) + "x" + std::to_string(t.tile_w) + " outputs of " + std::to_string(t.slab) +
         (request.problem.layout == Layout::kNHWC ? " channels" : " planes") + " a block";
}

// Of the rows that differ from this one, whose tile is `best`, in a thread's channels alone; and where a weight gradient of few
// threads leaves SMs idle, of the staged ones too, which have more.
const KernelRow* cheapest_like(const KernelRow& row, const Request& request, const Gpu& gpu, Candidate* best) {
  const KernelRow* chosen = &row;
  for (const KernelRow* other : kernel_table()) {
    if (other == &row || other->aligned > request.aligned) continue;
    if (misfit(*other, Op::kDepthwise, row.pass, request.problem, request.multiplier, gpu) != nullptr) continue;
    const bool few = row.pass == Pass::kBackwardWeight && best->launch.blocks < gpu.sm_count;
    const bool staged = other->family == Family::kTiles && few;
    if (!staged && (other->family != Family::kRows || row.family != Family::kRows)) continue;
    Candidate c;
    if (!best_candidate(*other, shape_of(*other), request, gpu, &c) || c.seconds >= best->seconds) continue;
    chosen = other;
    *best = c;
  }
  return chosen;
}

// The first row that fits and has a tile for this GPU; the forced one before it. `why` collects what the rows before said.
const KernelRow* choose_row(Pass pass, const Request& request, const Gpu& gpu, Candidate* best, std::string* why) {
  const DepthwiseProblem& p = request.problem;
  std::vector<const KernelRow*> order;
  if (request.forced.row != nullptr) order.push_back(request.forced.row);
  order.insert(order.end(), kernel_table().begin(), kernel_table().end());
  for (const KernelRow* row : order) {
    if (misfit(*row, Op::kDepthwise, pass, p, request.multiplier, gpu) != nullptr) continue;
    if (row->aligned > request.aligned) continue;
    if (row->family == Family::kAny) {
      if (why->empty()) *why = "no tiled kernel for this filter, stride, dilation or multiplier";
      return row;
    }
    if (best_candidate(*row, shape_of(*row), request, gpu, best)) {
      return row == request.forced.row || p.layout == Layout::kNCHW ? row : cheapest_like(*row, request, gpu, best);
    }
    *why =
        std::string(row->name) + " has no tile that fits " + std::to_string(gpu.shared_per_block >> 10) + " KiB of shared memory";
  }
  return nullptr;
}

void set_counts(const DepthwiseProblem& p, int64_t multiplier, LaunchPlan* plan) {
  const int64_t taps = p.kernel_h * p.kernel_w, planes = p.batch * p.channels * multiplier;
  plan->bytes = element_size(p.dtype) *
                (p.batch * p.channels * p.in_h * p.in_w + planes * p.out_h * p.out_w + p.channels * multiplier * taps);
  plan->flops = 2 * planes * p.out_h * p.out_w * taps;
}

// What the tile of a kernel in channels_last is to it, or to its part of a launch.
void set_tile(const Candidate& c, int channels, DepthwiseTileArgs* args) {
  const Tiling& t = c.tiling;
  args->tiling = t;
  args->slabs = Divisor(t.slabs), args->tiles_w = Divisor(t.tiles_w), args->tiles_h = Divisor(t.tiles_h);
  args->lanes = Divisor(t.slab / channels);
}
void set_tile(const Candidate& c, BackwardWeightTileArgs* args) {
  args->tiling = c.tiling;
  args->parts = c.parts;
  args->tiles = c.tiles;
}

}  // namespace

LaunchPlan plan_depthwise(Pass pass, const Request& request, const Gpu& gpu, DepthwiseTileArgs* args) {
  const DepthwiseProblem& p = request.problem;
  const bool forward = pass == Pass::kForward;
  LaunchPlan plan;
  Candidate best;
  std::string why;
  const KernelRow* const row = choose_row(pass, request, gpu, &best, &why);
  args->problem = p;
  args->multiplier = request.multiplier;
  if (row->family == Family::kAny) {
    const int64_t channels = p.channels * (forward ? request.multiplier : 1);
    const bool vectors = p.layout == Layout::kNHWC && request.aligned == kChunk && request.multiplier == 1;
    const int64_t work = p.batch * channels * p.out_h * p.out_w / (vectors ? kChunk / element_size(p.dtype) : 1);
    args->tiling = {};
    args->tiling.aligned = vectors;
    plan.launch = {row, std::clamp<int64_t>(ceil_div(work, kMostThreads), 1, int64_t{1} << 20), kMostThreads, 0};
    BlockCost cost = {};
    cost.total_bytes = static_cast<double>(element_size(p.dtype) * p.batch * channels * (p.in_h * p.in_w + p.out_h * p.out_w));
    cost.flops = 2.0 * p.batch * channels * p.out_h * p.out_w * p.kernel_h * p.kernel_w / plan.launch.blocks;
    cost.bytes = cost.total_bytes / plan.launch.blocks;
    cost.flop_rate = scalar_rate(p.dtype, gpu) * 0.2;
    plan.seconds = launch_seconds(plan.launch, cost, gpu);
    plan.reason = std::string(row->name) + ": " + why;
  } else {
    set_tile(best, shape_of(*row).channels, args);
    args->in_pitch = best.in_pitch, args->out_pitch = best.out_pitch;
    args->in_whole = best.in_whole, args->out_whole = best.out_whole;
    args->in_columns = Divisor(best.in_columns);
    const int64_t values = kChunk / element_size(p.dtype);
    if (p.layout == Layout::kNHWC) {
      args->in_chunks = Divisor(chunks_of(best.tiling, values));
    } else if (best.in_pitch > 0) {
      args->in_chunks = Divisor(ceil_div(best.in_pitch, values));
      args->out_chunks = Divisor(best.out_pitch / values);
      args->channels = Divisor(std::min(p.channels, kMostDivided));
    }
    plan.launch = best.launch;
    plan.seconds = best.seconds;
    plan.reason = describe(best, request);
  }
  set_counts(p, request.multiplier, &plan);
  return plan;
}

LaunchPlan plan_backward_weight(const Request& request, const Gpu& gpu, BackwardWeightTileArgs* args) {
  const DepthwiseProblem& p = request.problem;
  LaunchPlan plan;
  Candidate best;
  std::string why;
  const KernelRow* const row = choose_row(Pass::kBackwardWeight, request, gpu, &best, &why);
  args->problem = p;
  args->multiplier = request.multiplier;
  if (row->family == Family::kAny) {
    const int64_t outputs = p.channels * request.multiplier, groups = p.kernel_h * ceil_div(p.kernel_w, kAnyTaps);
    args->tiling = {};
    args->tiling.slabs = p.layout == Layout::kNHWC ? ceil_div(outputs, 32) : outputs;
    args->tiles = p.batch * ceil_div(p.out_h * p.out_w, kAnyPixels);
    args->parts = static_cast<int32_t>(
        std::clamp<int64_t>(4 * gpu.sm_count / (args->tiling.slabs * groups), 1, std::max<int64_t>(args->tiles, 1)));
    plan.launch = {row, args->tiling.slabs * groups * args->parts, kMostThreads,
                   kAnyTaps * kMostThreads * accumulate_size(p.dtype)};
    plan.reason = std::string(row->name) + ": " + why;
  } else {
    set_tile(best, args);
    args->groups = best.groups, args->group_blocks = best.group_blocks;
    args->in_pitch = best.in_pitch, args->out_pitch = best.out_pitch;
    args->in_whole = best.in_whole, args->out_whole = best.out_whole;
    args->in_columns = Divisor(best.in_columns), args->out_columns = Divisor(best.tiling.tile_w);
    const int64_t values = kChunk / element_size(p.dtype);
    if (p.layout == Layout::kNHWC) {
      args->in_chunks = args->out_chunks = Divisor(chunks_of(best.tiling, values));
    } else if (best.in_pitch > 0) {
      args->in_chunks = Divisor(best.in_pitch / values), args->out_chunks = Divisor(best.out_pitch / values);
    }
    plan.launch = best.launch;
    plan.seconds = best.seconds;
    plan.reason = describe(best, request);
  }
  plan.reason += args->parts == 1 ? ", in one part" : ", " + std::to_string(args->parts) + " parts";
  set_counts(p, request.multiplier, &plan);
  return plan;
}

LaunchPlan plan_backward(const Request& to_input, const Request& to_weight, const Gpu& gpu, BackwardTileArgs* args) {
  LaunchPlan plan;
  plan.seconds = 1e30;
  const KernelRow* const wanted = to_weight.forced.row;
  if (wanted != nullptr && wanted->pass != Pass::kBackward) return plan;
  for (const KernelRow* row : kernel_table()) {
    const bool fits = misfit(*row, Op::kDepthwise, Pass::kBackward, to_weight.problem, to_weight.multiplier, gpu) == nullptr;
    if (!fits || row->aligned > std::min(to_input.aligned, to_weight.aligned)) continue;
    const bool forced = row == wanted;
    Shape s = shape_of(*row);
    s.threads = kBackwardRowThreads, s.blocks = kBackwardRowBlocks;
    for (s.exactly = 32; s.exactly <= s.threads; s.exactly *= 2) {
      Candidate input, weight;
      Shape summing = s;
      summing.weight = true, summing.setup = kWeightSetup;
      if (!best_candidate(*row, s, to_input, gpu, &input) || !best_candidate(*row, summing, to_weight, gpu, &weight)) continue;
      // As long as the SMs hold all of them the longer decides; with twice as many each fills the GPU for itself.
      const int64_t blocks = input.launch.blocks + weight.launch.blocks, held = gpu.sm_count * weight.launch.blocks_per_sm;
      const double seconds =
          blocks <= held ? std::max(input.seconds, weight.seconds) : input.seconds + weight.seconds - kLaunchSeconds;
      if (seconds >= plan.seconds || (!forced && blocks > 2 * held)) continue;
      plan.launch = weight.launch;
      plan.launch.blocks = blocks;
      plan.seconds = seconds;
      args->weight_blocks = static_cast<int32_t>(weight.launch.blocks);
      args->input.problem = to_input.problem, args->weight.problem = to_weight.problem;
      set_tile(input, s.channels, &args->input);
      set_tile(weight, &args->weight);
      plan.reason = describe(weight, to_weight) + ", " + std::to_string(weight.parts) + " parts; and for the input's gradient " +
                    std::to_string(input.tiling.tile_h) + "x" + std::to_string(input.tiling.tile_w) + " of " +
                    std::to_string(input.tiling.slab) + " channels";
    }
    if (forced) return plan;
  }
  DepthwiseTileArgs input;
  BackwardWeightTileArgs weight;
  if (plan.launch.row != nullptr &&
      plan_depthwise(Pass::kForward, to_input, gpu, &input).seconds + plan_backward_weight(to_weight, gpu, &weight).seconds <=
          plan.seconds) {
    plan.launch.row = nullptr;
  }
  return plan;
}

LaunchPlan plan_sum_parts(DType dtype, int64_t weights, int64_t biases, int32_t parts, const Gpu& gpu, SumPartsArgs* args) {
  LaunchPlan plan;
  plan.launch.row = row_of(Pass::kSumParts, dtype, gpu);
  args->count[0] = weights, args->count[1] = biases;
  args->first_blocks = ceil_div(weights, 32);
  args->parts = parts;
  plan.launch.blocks = args->first_blocks + ceil_div(biases, 32);
  plan.launch.threads = kMostThreads;
  plan.launch.shared_bytes = kMostThreads * accumulate_size(dtype);
  plan.reason = std::string(plan.launch.row->name) + ": " + std::to_string(parts) + " parts in their order";
  return plan;
}

}  // namespace dwconv::cuda
