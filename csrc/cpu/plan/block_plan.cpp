// Plans of the fused block and of what runs on its kernels: pointwise convolutions and inverted residuals.
#include <algorithm>
#include <iterator>
#include <string_view>

#include "cpu/plan/parts.h"

namespace dwconv {

namespace {

constexpr int64_t kMinPixels = 98;     // that a panel is worth reading for
constexpr int64_t kSplitsAWorker = 4;  // tiles of a worker: enough to even out the tail

const char* product_name(const KernelRow& row) {
  return row.isa == Isa::kAmx                      ? "product on AMX tiles"
         : row.pointwise.dtype == DType::kBFloat16 ? "product of bfloat16 pairs"
                                                   : "product by multiply-adds";
}

}  // namespace

PointwiseFormat pointwise_format(const IsaKernels& isa, DType dtype) {
  struct Known {
    const IsaKernels* isa = nullptr;
    PointwiseFormat format;
  };
  static thread_local Known known[std::size(kDTypes)];  // of this thread's last set
  Known& last = known[static_cast<int>(dtype)];
  if (last.isa != &isa) {
    CpuProblem any;
    any.dtype = any.out_dtype = dtype;
    last = {&isa, choose_row(isa, {}, Op::kSeparable, Pass::kForward, any)->pointwise};  // both layouts' rows have the same
  }
  return last.format;
}

BlockFormat block_format(const IsaKernels& isa, DType dtype, const PointwiseFormat& pointwise, int64_t channels,
                         int64_t out_channels, int64_t kernel_h, int64_t kernel_w) {
  BlockFormat format;
  format.dtype = dtype, format.pointwise = pointwise;
  format.channels = channels, format.out_channels = out_channels;
  format.kernel_h = kernel_h, format.kernel_w = kernel_w;
  format.pitch = weight_pitch(isa, dtype, channels);
  return format;
}

namespace {

// The tiles of a fused block: rows of the output, and ranges of its channels.
struct BlockTiles {
  int64_t rows_per_tile, row_tiles, splits;
};

// of_planes: tiles of the kernel that reads and writes NCHW planes in place. They do not lie across images, and long runs of each
// plane are worth more than a depthwise result that leaves much of L2 free.
// has_stage: a depthwise stage, which every range of output channels repeats.
BlockTiles block_tiles(const CpuProblem& p, int64_t out_channels, const PointwiseFormat& format, bool of_planes, bool has_stage,
                       const Machine& machine) {
  // The tile's depthwise result shares L2 with a panel; where the weights outgrow L2 it is as large as L2 allows, since they
  // are read once a tile. At least kMinPixels, for the panel's reuse.
  constexpr int64_t kMiddleBytes = 256 << 10;
  const int64_t unit = element_size(format.dtype);
  const int64_t weight_bytes = p.channels * out_channels * unit;
  const int64_t row_bytes = std::max<int64_t>(p.out_w * p.channels * unit, 1);
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t images = of_planes ? std::max<int64_t>(p.batch, 1) : 1, rows = total_rows / images;
  const int64_t budget =
      of_planes || weight_bytes > machine.l2_bytes / 2 ? machine.l2_bytes / 2 : std::min(kMiddleBytes, machine.l2_bytes / 4);
  const int64_t least = ceil_div(kMinPixels, std::max<int64_t>(p.out_w, 1));
  const int64_t most = std::max(budget / row_bytes, least);
  // Threads share the rows while each has kMinPixels, enough work with a panel for the next one to come from memory meanwhile;
  // else they split the outputs, and each does the whole depthwise stage.
  const int64_t panels = ceil_div(out_channels, format.panel);
  const bool few_rows = total_rows < machine.threads * least;
  BlockTiles tiles;
  tiles.splits = few_rows ? std::clamp<int64_t>(machine.threads / std::max<int64_t>(total_rows / most, 1), 1, panels) : 1;
  const int64_t sharers = ceil_div(ceil_div(machine.threads, tiles.splits), images);
  int64_t pieces = ceil_div(ceil_div(std::max<int64_t>(rows, 1), most), sharers) * sharers;
  // Without a stage rows are as good to share as outputs, where each reads the weights from L2.
  if (!has_stage && weight_bytes <= machine.l2_bytes / 2) {
    pieces = std::max(pieces, std::min(kSplitsAWorker * machine.threads / images, rows / least));
  }
  tiles.rows_per_tile = std::max<int64_t>(ceil_div(rows, pieces), 1);
  // Several tiles a worker, so that there is something to take from a slow one: ranges of outputs of the same rows, whose
  // depthwise result a worker keeps from tile to tile.
  tiles.row_tiles = images * ceil_div(rows, tiles.rows_per_tile);
  const int64_t shared =
      machine.threads > 1 ? ceil_div(kSplitsAWorker * machine.threads, std::max<int64_t>(tiles.row_tiles, 1)) : 1;
  tiles.splits = std::clamp(shared, tiles.splits, panels);
  return tiles;
}

void set_tiles(SeparablePlan& plan, const BlockTiles& tiles) {
  plan.splits = tiles.splits;
  plan.whole.rows_per_tile = tiles.rows_per_tile;
  plan.whole.columns = tiles.splits;
  plan.whole.tiles = tiles.row_tiles * tiles.splits;
}

// The prefetch and the reason; stage: what the latter says of the depthwise stage.
void finish(SeparablePlan& plan, const CpuProblem& p, bool of_planes, const std::string& stage, const Machine& machine) {
  Plan& whole = plan.whole;
  // Prefetching the next tile's input during the product costs little, and pays before memory itself is read.
  const bool beyond_l3 = p.layout == Layout::kNHWC && whole.bytes >= machine.l3_bytes / 4;
  whole.prefetch_input = whole.prefetch_output = should_prefetch(p, machine, false) || beyond_l3;
  if (machine.with_reasons) {
    whole.reason = std::to_string(whole.rows_per_tile) + " rows by 1/" + std::to_string(plan.splits) +
                   " of the output channels a tile; " + product_name(*whole.row) + (of_planes ? ", pixels are lanes" : "") +
                   stage + (whole.prefetch_input ? "; the next tile's input is prefetched" : "");
  }
}

}  // namespace

SeparablePlan plan_separable(const CpuProblem& problem, int64_t out_channels, const IsaKernels& isa, const Machine& machine) {
  SeparablePlan plan;
  Plan& whole = plan.whole;
  CpuProblem stage = problem;
  stage.batch = 1;
  const Family family = nchw_family(isa, Pass::kForward, stage, stage.channels);
  whole.row = block_row(problem, family, isa, machine);
  const bool of_planes = whole.row->family == Family::kDirect;
  const PointwiseFormat& format = whole.row->pointwise;
  const BlockTiles tiles = block_tiles(problem, out_channels, format, of_planes, true, machine);
  if (of_planes) {
    plan.depthwise.row = plane_stage_row(stage, family, isa, machine);
    plan.depthwise.weight_pitch = problem.channels;
    plan.depthwise.scratch_bytes = plan.depthwise.row->scratch(stage, tiles.rows_per_tile);
  } else {
    stage.layout = Layout::kNHWC;
    stage.out_dtype = format.dtype;
    stage.out_stride_w = 2 * problem.channels;  // whatever the scratch's is, its pixels do not lie close together
    if (problem.layout == Layout::kNCHW) stage.dtype = problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    plan.depthwise = plan_forward(stage, set_of(problem.dtype, isa), machine);
  }
  set_tiles(plan, tiles);
  const int64_t out_pixels = problem.batch * problem.out_h * problem.out_w;
  whole.workers = workers_for(out_pixels * out_channels * problem.channels / 16, whole.tiles, machine);
  whole.scratch_bytes = whole.row->scratch(problem, whole.rows_per_tile) + (of_planes ? plan.depthwise.scratch_bytes : 0);
  whole.flops = counted(2.0 * out_pixels * problem.channels * (problem.kernel_h * problem.kernel_w + out_channels));
  whole.bytes = element_size(problem.dtype) * (problem.batch * problem.channels * problem.in_h * problem.in_w +
                                               out_pixels * out_channels + problem.channels * out_channels);
  const std::string stage_text = machine.with_reasons ? "; depthwise stage: " + describe(*plan.depthwise.row) : "";
  finish(plan, problem, of_planes, stage_text, machine);
  return plan;
}

SeparablePlan plan_pointwise(const CpuProblem& p, int64_t out_channels, const IsaKernels& isa, const Machine& machine) {
  SeparablePlan plan;
  Plan& whole = plan.whole;
  whole.row = block_row(p, Family::kRows, isa, machine);
  const bool of_planes = whole.row->family == Family::kDirect;
  const PointwiseFormat& format = whole.row->pointwise;
  BlockTiles tiles = block_tiles(p, out_channels, format, of_planes, false, machine);
  if (!of_planes && p.out_w == 1 && tiles.rows_per_tile > format.rows) {  // whole register tiles, across images
    tiles.rows_per_tile = round_up(tiles.rows_per_tile, format.rows);
    tiles.row_tiles = ceil_div(p.batch * p.out_h, tiles.rows_per_tile);
  }
  set_tiles(plan, tiles);
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  whole.workers = workers_for(pixels * out_channels * p.channels / 16, whole.tiles, machine);
  whole.scratch_bytes = whole.row->scratch(p, whole.rows_per_tile);
  whole.flops = counted(2.0 * pixels * p.channels * out_channels);
  whole.bytes = element_size(p.dtype) * (pixels * (p.channels + out_channels) + p.channels * out_channels);
  finish(plan, p, of_planes, "", machine);
  return plan;
}

InvertedPlan plan_inverted_residual(const CpuProblem& p, int64_t in_channels, int64_t out_channels, const IsaKernels& isa,
                                    const Machine& machine) {
  // Bytes of the expanded image from which it goes to memory; and operations an element below which a trip to L3 and back costs
  // more than the product does.
  constexpr int64_t kLine = 64, kLarge = 8 << 20, kFewFlops = 128;
  InvertedPlan plan;
  Plan& whole = plan.block.whole;
  whole.row = choose_row(isa, machine, Op::kSeparable, Pass::kForward, p);  // in NCHW the one that transposes comes first
  const PointwiseFormat& format = whole.row->pointwise;
  const int64_t unit = element_size(format.dtype), lanes = kLine / unit;
  plan.pitch = round_up(p.channels, lanes);
  if (plan.pitch * unit % 1024 == 0) plan.pitch += lanes;
  plan.copy_pitch = round_up(in_channels, lanes) + lanes;
  const int64_t in_row = p.in_w * plan.pitch * unit, middle_row = p.out_w * (p.channels + 2 * lanes) * unit;
  // The expanded rows and the depthwise result share L2 with panels and output; several tiles a worker even out the end.
  const int64_t budget = machine.l2_bytes * 5 / 8, reach = (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t affordable = (budget - (reach - p.stride_h) * in_row) / std::max<int64_t>(p.stride_h * in_row + middle_row, 1);
  const int64_t fair = ceil_div(p.batch * p.out_h, kSplitsAWorker * machine.threads);
  const int64_t rows = std::clamp<int64_t>(std::min(affordable, fair), 1, p.batch * p.out_h);
  const int64_t out_pixels = p.batch * p.out_h * p.out_w, in_pixels = p.batch * p.in_h * p.in_w;
  whole.flops = counted(2.0 * in_pixels * in_channels * p.channels +
                        2.0 * out_pixels * p.channels * (p.kernel_h * p.kernel_w + out_channels));
  const int64_t elements = in_pixels * p.channels, expanded = elements * element_size(p.dtype);
  const bool beyond_caches = expanded >= std::min(kLarge, machine.l3_bytes / 4);
  const bool few_flops = expanded >= machine.threads * machine.l2_bytes && whole.flops < kFewFlops * elements;
  const bool forced = machine.forced.name != nullptr && whole.row->name == std::string_view(machine.forced.name);
  const bool stages = whole.row->family != Family::kDirect;
  plan.fused = stages && affordable >= 1 && (beyond_caches || few_flops || forced);
  if (!plan.fused) return plan;

  CpuProblem stage = p;
  stage.batch = 1;
  stage.layout = Layout::kNHWC;
  stage.dtype = stage.out_dtype = format.dtype;
  stage.in_stride_w = plan.pitch, stage.out_stride_w = 2 * p.channels;  // whatever they are, pixels do not lie close together
  plan.block.depthwise = plan_forward(stage, set_of(p.dtype, isa), machine);
  set_tiles(plan.block, {rows, ceil_div(p.batch * p.out_h, rows), 1});
  whole.workers = workers_for(out_pixels * out_channels * p.channels / 16, whole.tiles, machine);
  plan.most_pixels = std::min((std::min(rows, p.out_h) - 1) * p.stride_h + reach, p.in_h) * p.in_w;
  plan.scratch_offset = round_up(whole.row->scratch(p, rows), 2 * kLine);
  const int64_t copies = kExpandPixels + 2 * format.rows;  // and as many sums: the product's last rows may lie past the pixels
  whole.scratch_bytes = plan.scratch_offset + (plan.most_pixels * plan.pitch + copies * plan.copy_pitch) * unit +
                        copies * format.panel * accumulate_size(p.dtype);
  whole.bytes =
      element_size(p.dtype) * (in_pixels * in_channels + out_pixels * out_channels + p.channels * (in_channels + out_channels));
  if (machine.with_reasons) {
    whole.reason = std::to_string(rows) + " rows a tile, expanded in scratch; " + product_name(*whole.row) +
                   "; depthwise stage: " + describe(*plan.block.depthwise.row);
  }
  return plan;
}

PatchPlan plan_patches(const CpuProblem& p, int64_t channels, int64_t out_channels, const IsaKernels& isa,
                       const Machine& machine) {
  // Patches overlap in L1: tiles of the fewest rows that are worth a panel.
  constexpr int64_t kLine = 64;
  PatchPlan plan;
  Plan& whole = plan.product.whole;
  whole.row = choose_row(isa, machine, Op::kSeparable, Pass::kForward, p);  // in NCHW the one that transposes comes first
  const int64_t rows = std::min(ceil_div(kMinPixels, p.out_w), p.batch * p.out_h), unit = accumulate_size(p.dtype);
  set_tiles(plan.product, {rows, ceil_div(p.batch * p.out_h, rows), 1});
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h + 1, reach_w = (p.kernel_w - 1) * p.dilation_w + 1;
  plan.row_pitch = ((p.out_w - 1) * p.stride_w + reach_w) * channels;
  plan.scratch_offset = round_up(whole.row->scratch(p, rows), 2 * kLine);
  // The last register tile reads past the last pixel.
  const int64_t past = (whole.row->pointwise.rows * p.stride_w + reach_w) * channels;
  whole.scratch_bytes = plan.scratch_offset + (rows * std::max(p.stride_h, reach_h) * plan.row_pitch + past) * unit;
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  whole.workers = workers_for(pixels * out_channels * p.channels / 16, whole.tiles, machine);
  whole.flops = counted(2.0 * pixels * p.channels * out_channels);
  whole.bytes = element_size(p.dtype) * (p.batch * channels * p.in_h * p.in_w + (pixels + p.channels) * out_channels);
  whole.prefetch_output = whole.bytes >= machine.l3_bytes / 4;
  if (machine.with_reasons) {
    whole.reason = std::to_string(rows) + " rows a tile, patches of staged input; " + product_name(*whole.row);
  }
  return plan;
}

}  // namespace dwconv
