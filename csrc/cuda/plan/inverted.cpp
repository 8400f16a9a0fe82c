// Tiles of the inverted residual's kernel, and whether to use it. Fused, the expanded image is never written, but neighbouring
// tiles expand their halo twice, and a tile's input must fit shared memory with all its channels: both ways are costed with the
// same model (as FCM does, arXiv 2404.19331), and the cheaper one is taken.
#include "cuda/plan/inverted.h"

#include <algorithm>

namespace dwconv::cuda {
namespace {

constexpr int kWarp = 32, kWarpRows = 32, kWarpColumns = 64, kSlabBytes = 128;  // warp_tile.cuh's
constexpr int kRun = 4, kStagingPitch = kWarpColumns + 8;                       // separable_forward.cuh's
constexpr double kDoesNotFit = 1e30;

// Of the warps, warps_m * warps_n share the projection's sums: a block may have more, which expand and convolve.
struct Geometry {
  int32_t tile_h, tile_w, warps_m, warps_n, warps;
};

LaunchPlan cost_of(const Request& request, int64_t in_channels, int64_t out_channels, const Geometry& g, const KernelRow& row,
                   const Gpu& gpu, InvertedResidualArgs* args) {
  const DepthwiseProblem& p = request.problem;
  const int64_t unit = element_size(p.dtype), wide = accumulate_size(p.dtype);
  const bool nhwc = p.layout == Layout::kNHWC, matrices = row.cores != Cores::kScalar;
  LaunchPlan plan;
  plan.seconds = kDoesNotFit;
  SeparableBlockArgs& b = args->block;
  b.problem = p;
  b.out_channels = out_channels;
  b.tile_rows = g.tile_h, b.tile_w = g.tile_w;
  b.warps_m = g.warps_m, b.warps_n = g.warps_n;
  b.pixels = nhwc ? g.warps_m * kWarpRows : g.warps_n * kWarpColumns;
  b.outputs = nhwc ? g.warps_n * kWarpColumns : g.warps_m * kWarpRows;
  b.tiles_w = static_cast<int32_t>(ceil_div(p.out_w, g.tile_w));
  b.splits = static_cast<int32_t>(ceil_div(out_channels, b.outputs));
  b.slabs = static_cast<int32_t>(ceil_div(p.channels * unit, kSlabBytes));
  b.tile_columns = Divisor(g.tile_w);
  b.run_columns = Divisor(ceil_div(g.tile_w, kRun));
  b.wide_bias = 1;
  args->in_channels = in_channels;
  args->taps = static_cast<int32_t>(std::min<int64_t>(p.kernel_h * p.kernel_w, 1 << 20));
  args->tiles_h = static_cast<int32_t>(ceil_div(p.out_h, g.tile_h));
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h + 1, reach_w = (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t in_rows = (g.tile_h - 1) * p.stride_h + reach_h, in_columns = (g.tile_w - 1) * p.stride_w + reach_w;
  const int64_t past = (round_up(g.tile_w, kRun) - g.tile_w) * p.stride_w;  // read by a run that the tile cuts off
  constexpr int64_t kMostPixels = 1 << 14;
  if (in_rows > kMostPixels || in_columns > kMostPixels || in_rows * in_columns + past > kMostPixels) return plan;
  const int64_t in_pixels = round_up(in_rows * in_columns + past, kWarpRows), chunks = line_chunks(in_channels * unit);
  args->in_rows = static_cast<int32_t>(in_rows), args->in_columns = static_cast<int32_t>(in_columns);
  args->in_pixels = static_cast<int32_t>(in_pixels);
  args->pitch = static_cast<int32_t>((chunks | 1) * 16);
  args->columns = Divisor(in_columns), args->pixels = Divisor(in_pixels), args->chunks = Divisor(chunks);
  b.map_bytes = static_cast<int32_t>(round_up(8 * b.pixels + in_pixels, 8 * kSlabBytes));

  const int64_t warps = g.warps, staging = warps * (matrices ? 16 * 4 : 32) * kStagingPitch;
  const int64_t channels = kSlabBytes / unit, outputs = b.outputs;
  plan.launch.row = &row;
  plan.launch.threads = static_cast<int32_t>(warps * kWarp);
  plan.launch.blocks_per_sm = static_cast<int32_t>((matrices ? kSeparableBlocks : 1) * 256 / plan.launch.threads);
  const int64_t filters = 2 * p.kernel_h * p.kernel_w * channels * wide;
  int64_t end = b.map_bytes + b.pixels * kSlabBytes;
  const auto place = [&](int32_t* at, int64_t bytes) {
    *at = static_cast<int32_t>(std::min<int64_t>(end, 1 << 30));
    end += bytes;
  };
  place(&args->ring_at, 2 * outputs * kSlabBytes);
  place(&args->expanded_at, std::max(in_pixels * kSlabBytes, staging - 2 * outputs * kSlabBytes));
  place(&args->input_at, in_pixels * args->pitch);
  place(&args->weights_at, 2 * channels * args->pitch);
  place(&args->filters_at, filters);
  place(&args->biases_at, 4 * channels * wide);
  plan.launch.shared_bytes = end;
  plan.launch.blocks = p.batch * args->tiles_h * b.tiles_w * b.splits;
  if (plan.launch.shared_bytes > gpu.shared_per_block) return plan;

  // Instructions a value, multiply-adds apart, as the compiler makes them.
  const double tiles = static_cast<double>(p.batch * args->tiles_h * b.tiles_w), blocks = tiles * b.splits;
  const double hidden = static_cast<double>(b.slabs * channels);
  const int64_t rows = matrices ? 16 : kWarpRows, group = matrices ? 32 : channels;  // pixels and channels expanded together
  const int64_t parts = in_pixels / rows * (channels / group), left = ceil_div(p.channels, group) * group;
  const double expanded = static_cast<double>(ceil_div(parts, warps) * warps * rows * group) * static_cast<double>(left) /
                          static_cast<double>(channels);
  const double depthwise = static_cast<double>(g.tile_h * round_up(g.tile_w, kRun)) * hidden;
  const double sums = static_cast<double>(b.pixels * outputs);
  const double taps = static_cast<double>(p.kernel_h * p.kernel_w) * (row.filter > 0 ? 1.0 : 3.0);
  // An SM has four tensor cores, one a warp.
  const double busy = std::min(1.0, g.warps_m * g.warps_n * plan.launch.blocks_per_sm / 4.0);
  const double products = 2.0 * (expanded * static_cast<double>(chunks * 16 / unit) + sums * hidden / busy);
  const double instructions = expanded * 6 + depthwise * (taps + 12) + sums * (nhwc ? 8 : 12) +
                              static_cast<double>(in_pixels * chunks) * (nhwc ? 40 : 60) + plan.launch.threads * 800.0;
  // A row of a NCHW tile begins and ends within sectors of 32 bytes.
  const double split = nhwc || b.tiles_w == 1 ? 0.0 : static_cast<double>(32 / unit - 1) * b.tiles_w;
  const double in_values = reads(p.in_h, p.out_h, g.tile_h, reach_h, p.stride_h, p.pad_h) *
                           (reads(p.in_w, p.out_w, g.tile_w, reach_w, p.stride_w, p.pad_w) + split);
  const double out_values = static_cast<double>(p.out_h) * (static_cast<double>(p.out_w) + split);
  const double scalar = scalar_rate(p.dtype, gpu) * 0.6;
  BlockCost cost;
  cost.total_bytes =
      static_cast<double>(p.batch * unit) * static_cast<double>(in_channels * p.in_h * p.in_w + out_channels * p.out_h * p.out_w);
  cost.bytes = static_cast<double>(p.batch * unit) *
                   (in_values * static_cast<double>(in_channels * b.splits) + out_values * static_cast<double>(out_channels)) /
                   blocks +
               hidden * static_cast<double>((in_channels + outputs) * unit);
  cost.flops = products / (matrices ? tensor_rate(p.dtype, gpu) * 0.5 : scalar) + 2.0 * instructions / scalar;
  cost.flop_rate = 1;
  plan.seconds = launch_seconds(plan.launch, cost, gpu);
  return plan;
}

LaunchPlan best_tile(const Request& request, int64_t in_channels, int64_t out_channels, const Gpu& gpu,
                     InvertedResidualArgs* best) {
  const DepthwiseProblem& p = request.problem;
  struct Candidate {
    double seconds;
    LaunchPlan plan;
    InvertedResidualArgs args;
  };
  Ranking<Candidate> ranking(request.forced.rank);
  const std::vector<const KernelRow*> kernels = matrix_kernels(Op::kInvertedResidual, Pass::kForward, request, gpu);
  const auto offer = [&](const Geometry& g) {
    for (const KernelRow* row : kernels) {
      InvertedResidualArgs args;
      const LaunchPlan next = cost_of(request, in_channels, out_channels, g, *row, gpu, &args);
      if (next.seconds < kDoesNotFit) ranking.offer({next.seconds, next, args});
    }
  };
  const auto search = [&](int64_t further) {
    for (const auto& [warps_m, warps_n] : std::vector<std::pair<int32_t, int32_t>>{
             {8, 1}, {4, 2}, {2, 4}, {1, 8}, {4, 1}, {2, 2}, {1, 4}, {2, 1}, {1, 2}, {1, 1}}) {
      const int64_t pixels = p.layout == Layout::kNHWC ? warps_m * kWarpRows : warps_n * kWarpColumns;
      const int64_t least = ceil_div(p.out_w, pixels);
      for (int64_t pieces = least; pieces <= least + further; ++pieces) {
        const int64_t tile_w = pieces == 1 ? p.out_w : round_up(ceil_div(p.out_w, pieces), kRun);
        if (pieces > least && tile_w < 8) break;
        // As many rows as fit, and fewer, shared evenly over the image.
        int64_t last = 0;
        for (int64_t rows = std::min(pixels / tile_w, p.out_h); rows > 0; rows = rows / 2) {
          for (const int64_t tile_h : {rows, ceil_div(p.out_h, ceil_div(p.out_h, rows))}) {
            for (const int32_t warps : {4, 8}) {
              const Geometry g = {static_cast<int32_t>(tile_h), static_cast<int32_t>(tile_w), warps_m, warps_n, warps};
              if (tile_h != last && warps >= warps_m * warps_n) offer(g);
            }
            last = tile_h;
          }
        }
      }
    }
  };
  // In NCHW as wide as they can be: a narrower tile splits sectors of 32 bytes in each of its rows.
  search(p.layout == Layout::kNCHW ? 0 : 15);
  if (ranking.chosen() == nullptr) search(15);
  const Candidate* const chosen = ranking.chosen();
  if (chosen == nullptr) {
    LaunchPlan none;
    none.seconds = kDoesNotFit;
    return none;
  }
  *best = chosen->args;
  return chosen->plan;
}

// What the two kernels take, of a contiguous expanded image.
double seconds_apart(const Request& request, int64_t in_channels, int64_t out_channels, const Gpu& gpu) {
  const DepthwiseProblem& p = request.problem;
  const bool nhwc = p.layout == Layout::kNHWC;
  const int64_t unit = element_size(p.dtype);
  const auto whole = [unit](int64_t channels) { return channels * unit % 16 == 0; };
  Request first = request, second = request;
  DepthwiseProblem& q = first.problem;
  q.channels = in_channels;
  q.kernel_h = q.kernel_w = q.stride_h = q.stride_w = q.dilation_h = q.dilation_w = 1;
  q.pad_h = q.pad_w = 0;
  q.out_h = p.in_h, q.out_w = p.in_w;
  q.in_stride_n = in_channels * p.in_h * p.in_w, q.in_stride_c = 1;
  q.in_stride_h = in_channels * p.in_w, q.in_stride_w = in_channels;
  DepthwiseProblem& d = second.problem;
  d.in_stride_n = p.channels * p.in_h * p.in_w, d.in_stride_c = nhwc ? 1 : p.in_h * p.in_w;
  d.in_stride_h = nhwc ? p.channels * p.in_w : p.in_w, d.in_stride_w = nhwc ? p.channels : 1;
  const SeparableAlignment pointwise = {whole(in_channels), false, nhwc && whole(p.channels), whole(in_channels)};
  const SeparableAlignment block = {nhwc && whole(p.channels), whole(p.channels), nhwc && whole(out_channels), whole(p.channels),
                                    nhwc ? 0 : whole_runs({p.in_w * unit, p.out_w * unit})};
  return plan_pointwise(first, p.channels, pointwise, gpu).seconds + plan_separable(second, out_channels, block, gpu).seconds;
}

}  // namespace

InvertedPlan plan_inverted_residual(const Request& request, int64_t in_channels, int64_t out_channels,
                                    const SeparableAlignment& alignment, const Gpu& gpu) {
  const DepthwiseProblem& p = request.problem;
  InvertedPlan plan;
  plan.block = best_tile(request, in_channels, out_channels, gpu, &plan.args);
  const double apart = seconds_apart(request, in_channels, out_channels, gpu);
  const bool fits = plan.block.seconds < kDoesNotFit;
  plan.fused =
      fits && (request.forced.fusion == Fusion::kByCost ? plan.block.seconds <= apart : request.forced.fusion == Fusion::kAlways);
  SeparableBlockArgs& b = plan.args.block;
  b.aligned_in = alignment.input, b.aligned_out = alignment.output, b.aligned_weight = alignment.weight;
  const int64_t unit = element_size(p.dtype), read = p.batch * p.in_h * p.in_w, written = p.batch * p.out_h * p.out_w;
  plan.bytes = unit * (read * in_channels + written * out_channels + p.channels * (in_channels + out_channels));
  plan.flops = counted(2.0 * p.channels * (1.0 * read * in_channels + 1.0 * written * (p.kernel_h * p.kernel_w + out_channels)));
  char text[240];
  if (fits) {
    snprintf(text, sizeof text,
             "expected %.1f us in one kernel, %.1f us in two; %s: %dx%d pixels a block, %d slabs of hidden channels",
             plan.block.seconds * 1e6, apart * 1e6, plan.block.launch.row->name, b.tile_rows, b.tile_w, b.slabs);
  }
  plan.reason = fits ? text : "two kernels: no tile fits shared memory";
  return plan;
}

}  // namespace dwconv::cuda
