// Tiles of the fused block, and whether to fuse. Both ways are costed with the same model: fused, the intermediate is never
// written, but a tile must hold all its input channels in shared memory.
#include <string.h>

#include <algorithm>
#include <tuple>

#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

constexpr int kMostWarps = 8, kWarp = 32, kWarpRows = 32, kWarpColumns = 64, kSlabBytes = 128;  // separable_forward.cuh's
constexpr int kRun = 4, kStagingPitch = kWarpColumns + 8;
constexpr double kDoesNotFit = 1e30;

struct Geometry {
  int32_t tile_rows, tile_w, warps_m, warps_n, splits, stages;
};

// Pixels by outputs that the warps cover, warps_m of them along the rows of the product.
std::pair<int32_t, int32_t> covered(Layout layout, int32_t warps_m, int32_t warps_n) {
  const int32_t rows = warps_m * kWarpRows, columns = warps_n * kWarpColumns;
  return layout == Layout::kNHWC ? std::make_pair(rows, columns) : std::make_pair(columns, rows);
}

// Input rows and columns that the tiles of rows (counted over all images) and columns read: sums over the tiles.
double staged_rows(const DepthwiseProblem& p, int64_t tile_rows) {
  const int64_t reach = (p.kernel_h - 1) * p.dilation_h;
  double total = 0;
  for (int64_t row = 0, tiles = 0; row < p.batch * p.out_h; ++tiles) {
    const int64_t n = row / p.out_h, y = row - n * p.out_h;
    const int64_t count = std::min({tile_rows - row % tile_rows, p.out_h - y});  // of this tile in this image
    const int64_t first = std::max<int64_t>(y * p.stride_h - p.pad_h, 0);
    const int64_t last = std::min((y + count - 1) * p.stride_h - p.pad_h + reach + 1, p.in_h);
    total += static_cast<double>(std::max<int64_t>(last - first, 0));
    row += count;
    if ((n >= 64 && p.batch > 128) || tiles == kTilesLookedAt)
      return total / static_cast<double>(row) * static_cast<double>(p.batch * p.out_h);  // enough to know
  }
  return total;
}

// A row of a NCHW tile that is narrower than the image begins and ends within sectors of 32 bytes, of which it uses a part.
double split_sectors(const DepthwiseProblem& p, int64_t tile_w) {
  const bool split = p.layout == Layout::kNCHW && tile_w < p.out_w;
  return split ? static_cast<double>(32 / element_size(p.dtype) - 1) * static_cast<double>(ceil_div(p.out_w, tile_w)) : 0.0;
}

double staged_columns(const DepthwiseProblem& p, int64_t tile_w) {
  return reads(p.in_w, p.out_w, tile_w, (p.kernel_w - 1) * p.dilation_w + 1, p.stride_w, p.pad_w);
}

// A launch of the block's kernel with one geometry; seconds is kDoesNotFit where it does not fit.
LaunchPlan cost_of(const Request& request, int64_t out_channels, const Geometry& g, const KernelRow& row, const Gpu& gpu,
                   bool depthwise, double in_rows, SeparableBlockArgs* args) {
  const DepthwiseProblem& p = request.problem;
  const int64_t unit = element_size(p.dtype);
  LaunchPlan plan;
  plan.seconds = kDoesNotFit;
  args->problem = p;
  args->out_channels = out_channels;
  args->tile_rows = g.tile_rows, args->tile_w = g.tile_w;
  args->warps_m = g.warps_m, args->warps_n = g.warps_n;
  std::tie(args->pixels, args->outputs) = covered(p.layout, g.warps_m, g.warps_n);
  args->row_tiles = ceil_div(p.batch * p.out_h, g.tile_rows);
  args->tiles_w = static_cast<int32_t>(ceil_div(p.out_w, g.tile_w));
  args->splits = g.splits;
  args->slabs = static_cast<int32_t>(ceil_div(p.channels * unit, kSlabBytes));
  const int64_t outputs = args->outputs, ranges = ceil_div(out_channels, outputs);
  args->slots = !depthwise && ranges <= g.splits ? std::min(args->slabs, g.stages) : args->slabs;
  args->image_rows = Divisor(std::min(p.out_h, kMostDivided));
  args->tile_columns = Divisor(g.tile_w);
  args->run_columns = Divisor(ceil_div(g.tile_w, kRun));
  args->runs = Divisor(g.tile_rows * ceil_div(g.tile_w, kRun));
  // Slots and stages begin on multiples of the 8 lines that a swizzle runs over.
  args->map_bytes = static_cast<int32_t>(round_up((depthwise ? 8 : 24) * args->pixels + 16 * g.tile_rows, 8 * kSlabBytes));

  args->stages = g.stages;
  const int64_t warps = g.warps_m * g.warps_n, staging = warps * (row.cores != Cores::kScalar ? 16 * 4 : 32) * kStagingPitch;
  const int64_t channels = kSlabBytes / unit;  // of a slab
  const int64_t filters = depthwise ? 2 * p.kernel_h * p.kernel_w * channels * accumulate_size(p.dtype) : 0;
  const bool by_depth = p.layout == Layout::kNCHW && depthwise;
  const int64_t slot =
      !by_depth || row.cores == Cores::kWarpgroup ? args->pixels * kSlabBytes : channels * (args->pixels + kColumnPadding) * unit;
  plan.launch.row = &row;
  plan.launch.threads = static_cast<int32_t>(warps * kWarp);
  plan.launch.blocks_per_sm = static_cast<int32_t>((row.cores != Cores::kScalar ? kSeparableBlocks : 1) * kMostWarps / warps);
  plan.launch.shared_bytes = args->map_bytes + args->slots * slot + std::max(g.stages * outputs * kSlabBytes, staging) + filters;
  plan.launch.blocks = args->row_tiles * args->tiles_w * g.splits;
  if (plan.launch.shared_bytes > gpu.shared_per_block) return plan;

  const double tiles = static_cast<double>(args->row_tiles * args->tiles_w), blocks = tiles * g.splits;
  const double padded_channels = args->slabs * static_cast<double>(channels);
  const double in_columns = staged_columns(p, g.tile_w) + (by_depth ? split_sectors(p, g.tile_w) : 0.0);
  const double in_bytes = in_rows * in_columns * static_cast<double>(p.channels * unit * g.splits);
  const double out_columns = static_cast<double>(p.out_w) + split_sectors(p, g.tile_w);
  const double out_bytes = static_cast<double>(p.batch * p.out_h * out_channels * unit) * out_columns;
  const double once =
      static_cast<double>(p.batch * unit) * static_cast<double>(p.channels * p.in_h * p.in_w + out_channels * p.out_h * p.out_w);
  const double ranges_a_block = static_cast<double>(ceil_div(ranges, g.splits));
  const double product = 2.0 * args->pixels * padded_channels * static_cast<double>(outputs) * ranges_a_block;
  const double pixels = static_cast<double>(g.tile_rows * round_up(g.tile_w, kRun));
  // Instructions an input and an output value, multiply-adds apart: measured ones and the compiler's.
  const bool nhwc = p.layout == Layout::kNHWC;
  const double taps = static_cast<double>(p.kernel_h * p.kernel_w) * (row.filter > 0 ? 1.0 : 3.0);
  const double stage = 2.0 * pixels * padded_channels * (depthwise ? taps + (nhwc ? 17 : 25) : 3);
  const double finish = 2.0 * args->pixels * static_cast<double>(outputs) * ranges_a_block * (nhwc ? 8 : 12);
  const double scalar = scalar_rate(p.dtype, gpu) * 0.6;
  const double product_rate =
      row.cores != Cores::kScalar ? tensor_rate(p.dtype, gpu) * (row.cores == Cores::kWarpgroup ? 1.0 : 0.5) : scalar;
  BlockCost cost;
  cost.total_bytes = once;
  cost.bytes = (in_bytes + out_bytes) / blocks + padded_channels * static_cast<double>(outputs) * ranges_a_block * unit;
  const double setup = 2.0 * plan.launch.threads * 400;
  cost.flops = product / product_rate + (stage + finish + setup) / scalar;  // seconds of an SM: the rates differ
  cost.flop_rate = 1;
  plan.seconds = launch_seconds(plan.launch, cost, gpu);
  return plan;
}

LaunchPlan best_block(const Request& request, int64_t out_channels, const Gpu& gpu, bool depthwise, SeparableBlockArgs* best) {
  const DepthwiseProblem& p = request.problem;
  struct Candidate {
    double seconds;
    LaunchPlan plan;
    SeparableBlockArgs args;
  };
  Ranking<Candidate> ranking(request.forced.rank);
  const int64_t rows = std::max<int64_t>(p.batch * p.out_h, 1);
  const std::vector<const KernelRow*> kernels =
      matrix_kernels(Op::kSeparable, depthwise ? Pass::kForward : Pass::kPointwise, request, gpu);
  const auto offer = [&](int32_t warps_m, int32_t warps_n, int64_t tile_w, int64_t tile_rows) {
    const double in_rows = staged_rows(p, tile_rows);
    const int64_t ranges = ceil_div(out_channels, covered(p.layout, warps_m, warps_n).second);
    for (int64_t splits = 1;; splits = std::min(2 * splits, ranges)) {
      for (int32_t stages : {3, 2}) {
        const Geometry g = {static_cast<int32_t>(tile_rows),
                            static_cast<int32_t>(tile_w),
                            warps_m,
                            warps_n,
                            static_cast<int32_t>(splits),
                            stages};
        for (const KernelRow* row : kernels) {
          if (row->cores == Cores::kWarpgroup && (warps_m % 2 != 0 || warps_n % 2 != 0))
            continue;  // a warpgroup has the part of 2 x 2 warps
          SeparableBlockArgs args;
          const LaunchPlan next = cost_of(request, out_channels, g, *row, gpu, depthwise, in_rows, &args);
          if (next.seconds < kDoesNotFit) ranking.offer({next.seconds, next, args});
        }
      }
      if (splits == ranges) break;
    }
  };
  for (const auto& [warps_m, warps_n] :
       std::vector<std::pair<int32_t, int32_t>>{{8, 1}, {4, 2}, {2, 4}, {1, 8}, {4, 1}, {2, 2}, {1, 4}}) {
    const int64_t pixels = covered(p.layout, warps_m, warps_n).first;
    const int64_t least = ceil_div(p.out_w, pixels);
    for (int64_t pieces = least; pieces < least + 16; ++pieces) {
      const int64_t tile_w = pieces == 1 ? p.out_w : round_up(ceil_div(p.out_w, pieces), kRun);
      if (tile_w > pixels) continue;
      if (pieces > 1 && tile_w < 8) break;
      const int64_t most = std::min(pixels / tile_w, rows);
      // As many rows as fit; shared evenly over the image; whole images.
      std::vector<int64_t> heights = {most};
      if (most < p.out_h) heights.push_back(ceil_div(p.out_h, ceil_div(p.out_h, most)));
      if (most > p.out_h) heights.push_back(most / p.out_h * p.out_h);
      for (size_t i = 0; i < heights.size(); ++i) {
        if (i == 0 || heights[i] != heights[0]) offer(warps_m, warps_n, tile_w, heights[i]);
      }
    }
  }
  const Candidate* const chosen = ranking.chosen();
  if (chosen == nullptr) {
    LaunchPlan none;
    none.seconds = kDoesNotFit;
    return none;
  }
  *best = chosen->args;
  return chosen->plan;
}

std::string describe(const LaunchPlan& plan, const SeparableBlockArgs& args) {
  return std::string(plan.launch.row->name) + ": " + std::to_string(args.tile_rows) + "x" + std::to_string(args.tile_w) +
         " pixels by 1/" + std::to_string(args.splits) + " of the output channels a block, " +
         (args.slots == args.slabs ? "all" : std::to_string(args.slots)) + " of " + std::to_string(args.slabs) + " slabs kept";
}

}  // namespace

std::vector<const KernelRow*> matrix_kernels(Op op, Pass pass, const Request& request, const Gpu& gpu) {
  const auto fits = [&](const KernelRow* row) {
    return misfit(*row, op, pass, request.problem, 1, gpu) == nullptr &&
           (row->cores == Cores::kScalar || request.problem.dtype != DType::kFloat32 || request.allow_tf32);
  };
  if (request.forced.row != nullptr && fits(request.forced.row)) return {request.forced.row};
  std::vector<const KernelRow*> rows;
  for (const KernelRow* row : kernel_table()) {
    const bool another = rows.empty() || (row->cores != Cores::kScalar && row->cores != rows.back()->cores);
    if (another && rows.size() < 2 && fits(row)) rows.push_back(row);
  }
  return rows;
}

LaunchPlan plan_activation(DType dtype, int64_t count, const Gpu& gpu) {
  LaunchPlan plan;
  plan.launch.row = row_of(Pass::kActivate, dtype, gpu);
  plan.launch.blocks = std::clamp<int64_t>(ceil_div(count, kMostThreads), 1, int64_t{1} << 20);
  plan.launch.threads = kMostThreads;
  return plan;
}

LaunchPlan plan_transpose(const DepthwiseProblem& p, int64_t pixels, const Gpu& gpu, TransposeArgs* args) {
  const int64_t unit = element_size(p.dtype);
  args->channels = p.channels;
  args->pixels = pixels;
  args->channel_tiles = ceil_div(p.channels, kTransposed);
  args->pixel_tiles = ceil_div(pixels, kTransposed);
  args->aligned_in = pixels % (unit <= 4 ? 4 : 2) == 0;  // torch's allocations begin on multiples of 64 bytes and more
  args->aligned_out = p.channels * unit % 16 == 0;
  LaunchPlan plan;
  plan.launch.row = row_of(Pass::kTranspose, p.dtype, gpu);
  plan.launch.blocks = p.batch * args->channel_tiles * args->pixel_tiles;
  plan.launch.threads = 256;
  plan.launch.blocks_per_sm = 4;
  plan.launch.shared_bytes = kTransposed * (kTransposed + (unit < 4 ? 2 : 1)) * unit;
  BlockCost cost;
  cost.bytes = 2.0 * kTransposed * kTransposed * static_cast<double>(unit);
  cost.total_bytes = 2.0 * static_cast<double>(p.batch * p.channels * pixels * unit);
  cost.flops = 2.0 * 256 * (args->aligned_in ? 130 : 170);  // instructions
  cost.flop_rate = scalar_rate(DType::kFloat32, gpu) * 0.6;
  plan.seconds = launch_seconds(plan.launch, cost, gpu);
  return plan;
}

PointwisePlan plan_pointwise(const Request& request, int64_t out_channels, const SeparableAlignment& alignment, const Gpu& gpu) {
  const DepthwiseProblem& p = request.problem;
  PointwisePlan plan;
  static_cast<LaunchPlan&>(plan) = best_block(request, out_channels, gpu, false, &plan.args);
  if (p.layout == Layout::kNCHW) plan.transpose = plan_transpose(p, p.in_h * p.in_w, gpu, &plan.transpose_args);
  plan.seconds += plan.transpose.seconds;
  plan.args.aligned_in = alignment.input, plan.args.aligned_out = alignment.output, plan.args.aligned_weight = alignment.weight;
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  plan.bytes = element_size(p.dtype) * (pixels * (p.channels + out_channels) + p.channels * out_channels);
  plan.flops = counted(2.0 * pixels * p.channels * out_channels);
  plan.reason = (p.layout == Layout::kNCHW ? "channels_last_values, then " : "") + describe(plan, plan.args);
  return plan;
}

SeparablePlan plan_separable(const Request& request, int64_t out_channels, const SeparableAlignment& alignment, const Gpu& gpu) {
  const DepthwiseProblem& p = request.problem;
  SeparablePlan plan;
  SeparableBlockArgs fused_args, pointwise_args;
  LaunchPlan fused = best_block(request, out_channels, gpu, true, &fused_args);

  // Unfused: the depthwise kernel's output is contiguous in the input's layout; the pointwise stage reads channels_last.
  Request first = request, second = request;
  DepthwiseProblem& q = second.problem;
  first.aligned = p.layout == Layout::kNCHW ? alignment.rows : alignment.input && alignment.middle ? 16 : 0;
  q.in_h = p.out_h, q.in_w = p.out_w;
  q.kernel_h = q.kernel_w = q.stride_h = q.stride_w = q.dilation_h = q.dilation_w = 1;
  q.pad_h = q.pad_w = 0;
  q.activation = {};
  const bool nhwc = p.layout == Layout::kNHWC;
  q.in_stride_n = p.channels * p.out_h * p.out_w;
  q.in_stride_c = 1;
  q.in_stride_h = p.channels * p.out_w;
  q.in_stride_w = p.channels;
  DepthwiseProblem& d = first.problem;
  d.out_stride_n = q.in_stride_n;
  d.out_stride_c = nhwc ? 1 : p.out_h * p.out_w;
  d.out_stride_h = nhwc ? q.in_stride_h : p.out_w;
  d.out_stride_w = nhwc ? q.in_stride_w : 1;
  const LaunchPlan pointwise = best_block(second, out_channels, gpu, false, &pointwise_args);
  LaunchPlan depthwise = plan_depthwise(Pass::kForward, first, gpu, &plan.depthwise_args);

  // What the model leaves out, as measured on an H200: in NCHW the fused kernel's depthwise stage, whose reads do not coalesce,
  // takes 2 to 3 times its instructions' time, the kernels of the other way 1.2 to 2 times.
  if (!nhwc) plan.transpose = plan_transpose(p, p.out_h * p.out_w, gpu, &plan.transpose_args);
  const double unfused_seconds = (depthwise.seconds + plan.transpose.seconds + pointwise.seconds) * (nhwc ? 1.0 : 0.6);
  const bool fits = fused.seconds < kDoesNotFit;
  // Apart, a long activation is a pass of its own over an intermediate that has been rounded before it.
  const bool cheaper = fused.seconds <= unfused_seconds || !is_inlined(p.activation.kind);
  plan.fused = fits && (request.forced.fusion == Fusion::kByCost ? cheaper : request.forced.fusion == Fusion::kAlways);
  plan.seconds = plan.fused ? fused.seconds : unfused_seconds;
  plan.depthwise = depthwise;
  plan.block = plan.fused ? fused : pointwise;
  plan.block_args = plan.fused ? fused_args : pointwise_args;
  plan.block_args.aligned_in = plan.fused ? alignment.input : alignment.middle;
  plan.block_args.aligned_out = alignment.output;
  plan.block_args.aligned_weight = alignment.weight;
  const int64_t unit = element_size(p.dtype), pixels = p.batch * p.out_h * p.out_w;
  plan.bytes = unit * (p.batch * p.channels * p.in_h * p.in_w + pixels * out_channels + p.channels * out_channels);
  plan.flops = counted(2.0 * pixels * p.channels * (p.kernel_h * p.kernel_w + out_channels));
  char costs[96];
  snprintf(costs, sizeof costs, "expected %.1f us fused, %.1f us unfused; ", fits ? fused.seconds * 1e6 : 0.0,
           unfused_seconds * 1e6);
  plan.reason = (fits ? costs : std::string("not fused: no tile fits shared memory; ")) +
                (plan.fused ? "fused, " : depthwise.reason + (nhwc ? ", then " : ", then channels_last_values, then ")) +
                describe(plan.block, plan.block_args);
  return plan;
}

}  // namespace dwconv::cuda
