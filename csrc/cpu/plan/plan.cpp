#include "cpu/plan/plan.h"

#include <algorithm>
#include <iterator>
#include <string_view>

namespace dwconv {

namespace {

constexpr int64_t kMinElementsAWorker = 1 << 14;  // below it a second thread costs more than it brings (a few us)
constexpr int64_t kRowTile = 4;           // rows a register tile has in NCHW and in a flat kernel; tiles are multiples of it
constexpr int64_t kLeastDirectRows = 14;  // of a tile of the direct family: two register tiles
constexpr int64_t kTilesAWorker = 8;      // enough to even out the tail
constexpr int64_t kSplitsAWorker = 4;     // the same of a fused block
constexpr int64_t kMaxParts = 32;
constexpr int64_t kPartBytes = 4 << 20;

// Channels of packed depthwise weights where channels or planes are lanes: a vector may begin at any of them.
int64_t weight_pitch(const IsaKernels& isa, DType dtype, int64_t channels) {
  const int64_t lanes = lanes_of(dtype, isa);
  return ceil_div(channels + lanes - 1, lanes) * lanes;
}

// Output rows a tile whose staged rows, `row_bytes` an input row and `out_row_bytes` an output row, fit in `cache_bytes`; but
// so many that halo rows are at most a third.
int64_t staged_rows(const CpuProblem& p, int64_t row_bytes, int64_t out_row_bytes, int64_t cache_bytes) {
  const int64_t halo = std::max<int64_t>(p.kernel_h - 1, 0) * p.dilation_h;
  const int64_t a_row = std::max<int64_t>(row_bytes * p.depth * p.stride_h + out_row_bytes, 1);
  const int64_t in_cache = (cache_bytes - halo * row_bytes * p.depth) / a_row;
  const int64_t rows = std::max({in_cache, 2 * kRowTile, ceil_div(2 * halo, p.stride_h)});
  const int64_t pieces = ceil_div(std::max<int64_t>(p.out_h, 1), rows);  // of even height
  return std::max<int64_t>(std::min(ceil_div(ceil_div(p.out_h, pieces), kRowTile) * kRowTile, p.out_h), 1);
}

// Whether a channels_last input comes from beyond L2. A forward pass does little with an element and gains by going through it
// in order first (sequential_rows.h) only where memory is slow, and not below kManyBytes a pixel, where its tiles' pieces lie
// close together as it is. The passes that do more lose less by it, and gain where it comes from L3 too.
bool should_prefetch(const CpuProblem& p, const Machine& machine, bool forward) {
  constexpr int64_t kManyBytes = 256;
  if (p.layout != Layout::kNHWC) return false;
  if (!forward) return input_bytes(p) >= machine.prefetch_threshold / 4;
  return input_bytes(p) >= machine.prefetch_threshold && p.channels * element_size(p.dtype) >= kManyBytes;
}

// Or from memory: L3 does not keep both operands from call to call. Then going through it in order pays everywhere but in the
// strided input gradient, which writes most of what it moves, and in a forward pass over long pixels, which the prefetchers
// follow by themselves.
bool prefetch_pays_from_memory(const CpuProblem& p, const Machine& machine, bool forward) {
  constexpr int64_t kLongPixel = 512;  // bytes
  if (p.layout != Layout::kNHWC || (forward && p.channels * element_size(p.dtype) >= kLongPixel)) return false;
  return comes_from_memory(p, machine);
}

// Whether tiles prefetch the lines that the next one writes: where the prefetchers bring the input (see
// default_prefetch_threshold) but the output comes from beyond L2, a store would wait for its line.
bool prefetches_output(const CpuProblem& p, const Machine& machine) {
  constexpr int64_t kManyBytes = 4 << 20;
  return p.layout == Layout::kNHWC && machine.l2_bytes >= kLargeL2 && output_bytes(p) > kManyBytes;
}

int64_t workers_for(int64_t elements, int64_t tiles, const Machine& machine) {
  return std::max<int64_t>(1, std::min({machine.threads, tiles, elements / kMinElementsAWorker}));
}

std::string describe(const KernelRow& row) {
  const std::string filter =
      row.filter ? "filter " + std::to_string(row.filter) + "x" + std::to_string(row.filter) : "any filter";
  const std::string stride = row.stride ? "stride " + std::to_string(row.stride) : "any stride";
  const char* const lanes = row.family == Family::kFlat         ? "elements of a row of pixels are lanes"
                            : row.layout == Layout::kNHWC       ? "channels are lanes"
                            : row.family == Family::kTransposed ? "planes are lanes, transposed through scratch"
                            : row.family == Family::kDirect     ? "columns are lanes, read in place"
                                                                : "columns are lanes";
  return filter + ", " + stride + "; " + lanes;
}

const char* in_order(const Plan& plan) {
  if (!plan.prefetch_input) return "";
  return plan.row->layout == Layout::kNHWC ? "; rows are read in order first" : "; the next rows are prefetched";
}

const char* product_name(const KernelRow& row) {
  return row.isa == Isa::kAmx                      ? "product on AMX tiles"
         : row.pointwise.dtype == DType::kBFloat16 ? "product of bfloat16 pairs"
                                                   : "product by multiply-adds";
}

}  // namespace

Plan plan_forward(const CpuProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p.dtype, isa);
  const int64_t planes = p.batch * p.channels;
  const int64_t unit = accumulate_size(p.dtype);
  const Family family = p.layout == Layout::kNHWC ? nhwc_family(isa, machine, p) : nchw_family(isa, Pass::kForward, p, planes);
  plan.row = choose_row(isa, machine, Op::kDepthwise, Pass::kForward, p, family);
  const int64_t elements = planes * p.out_h * p.out_w;
  if (p.layout == Layout::kNHWC) {
    plan.columns = p.batch;
    const int64_t fair = ceil_div(p.batch * p.out_h, kTilesAWorker * machine.threads),
                  row_tile = plan.row->family == Family::kFlat ? kRowTile : 2;
    plan.rows_per_tile = std::clamp<int64_t>(ceil_div(fair, row_tile) * row_tile, 1, std::max<int64_t>(p.out_h, 1));
  } else if (plan.row->family == Family::kTransposed) {
    plan.columns = ceil_div(planes, lanes);
    plan.rows_per_tile = staged_rows(p, p.in_w * lanes * unit, p.out_w * lanes * unit, machine.l1_bytes * 2);
  } else if (plan.row->family == Family::kDirect) {
    // Whole planes, but pieces of them where there are few.
    plan.columns = planes;
    const int64_t pieces = ceil_div(kTilesAWorker * machine.threads, std::max<int64_t>(planes, 1));
    constexpr int64_t kTileBytes = 64 << 10;  // of input: a wide row's strips go down the same lines and pages
    const int64_t row_bytes = std::max<int64_t>(p.in_w * p.stride_h * element_size(p.dtype), 1);
    const int64_t rows = std::min(ceil_div(p.out_h, pieces), kTileBytes / row_bytes);
    plan.rows_per_tile = std::clamp<int64_t>(rows, std::min<int64_t>(p.out_h, kLeastDirectRows), p.out_h);
  } else {
    plan.columns = planes;
    const int64_t padded_w = (p.out_w - 1) * p.stride_w + std::max<int64_t>(p.kernel_w - 1, 0) * p.dilation_w + 1;
    plan.rows_per_tile = staged_rows(p, std::max<int64_t>(padded_w, 1) * unit, 0, machine.l1_bytes / 2);
    plan.prefetch_input = plan.prefetch_output = input_bytes(p) >= machine.prefetch_threshold / 4;  // a prefetch a line
  }
  plan.weight_pitch = plan.row->weight_order == Layout::kNHWC ? weight_pitch(isa, p.dtype, p.channels) : p.channels;
  plan.tiles = ceil_div(p.out_h, plan.rows_per_tile) * plan.columns;
  plan.workers = workers_for(elements * std::max<int64_t>(p.depth, 1), plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, plan.rows_per_tile);
  const int64_t taps = p.kernel_h * p.kernel_w * p.depth;
  plan.bytes =
      element_size(p.dtype) * (planes * p.depth * p.in_h * p.in_w + p.channels * taps) + element_size(p.out_dtype) * elements;
  plan.flops = 2 * elements * taps;
  if (p.layout == Layout::kNHWC && plan.row->family != Family::kFlat) {  // the flat ones go in order
    plan.prefetch_input = plan.prefetch_output = should_prefetch(p, machine, true) || prefetch_pays_from_memory(p, machine, true);
  }
  plan.prefetch_next_output = prefetches_output(p, machine);
  if (machine.with_reasons) plan.reason = describe(*plan.row) + in_order(plan);
  return plan;
}

Plan plan_forward_repeated(const CpuProblem& p, int64_t multiplier, const IsaKernels& isa, const Machine& machine) {
  constexpr int64_t kPieceBytes = 256 << 10;  // of repeated input
  Plan plan = plan_forward(p, isa, machine);
  const int64_t row_bytes = p.in_w * p.channels * element_size(p.dtype);
  const int64_t reach = (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t affordable = (kPieceBytes / std::max<int64_t>(row_bytes, 1) - reach) / p.stride_h;
  plan.rows_per_tile = std::min(std::max({affordable, ceil_div(reach, p.stride_h), int64_t{2}}), p.out_h);
  plan.columns = p.batch;
  plan.tiles = p.batch * ceil_div(p.out_h, plan.rows_per_tile);
  plan.workers = std::min(plan.workers, plan.tiles);
  plan.scratch_bytes = std::min((plan.rows_per_tile - 1) * p.stride_h + reach, p.in_h) * row_bytes;
  plan.prefetch_input = plan.prefetch_output = plan.prefetch_next_output = false;
  plan.bytes -= input_bytes(p) - input_bytes(p) / multiplier;
  if (machine.with_reasons) {
    plan.reason = describe(*plan.row) + "; each channel " + std::to_string(multiplier) + " times, a few rows at a time";
  }
  return plan;
}

Plan plan_backward_input(const CpuProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p.dtype, isa);
  const int64_t planes = p.batch * p.channels;
  const int64_t unit = accumulate_size(p.dtype);
  const bool forced = machine.forced.name != nullptr && machine.forced.pass == Pass::kBackwardInput;
  if (nchw_family(isa, Pass::kBackwardInput, p, planes) == Family::kRows && !forced) return plan;
  plan.row = choose_row(isa, machine, Op::kDepthwise, Pass::kBackwardInput, p);
  const int64_t phase_rows = ceil_div(p.out_h, p.stride_h);
  if (p.layout == Layout::kNHWC) {
    plan.columns = p.batch;
    plan.rows_per_tile = std::clamp<int64_t>(p.batch * phase_rows / (kTilesAWorker * machine.threads), 1, phase_rows);
  } else {
    plan.columns = ceil_div(planes, lanes);
    const int64_t row_bytes = lanes * unit * (p.in_w * p.depth + std::min(p.stride_h, p.out_h) * p.out_w);
    const int64_t halo = (p.kernel_h - 1) * p.dilation_h / p.stride_h + 1;
    const int64_t in_cache = machine.l1_bytes * 2 / std::max<int64_t>(row_bytes, 1);
    const int64_t pieces = ceil_div(phase_rows, std::max<int64_t>({in_cache, 2 * halo, 2}));  // of even height
    plan.rows_per_tile = ceil_div(phase_rows, pieces);
  }
  plan.weight_pitch = weight_pitch(isa, p.dtype, p.channels);
  plan.tiles = ceil_div(phase_rows, plan.rows_per_tile) * plan.columns;
  plan.workers = workers_for(planes * p.out_h * p.out_w, plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, plan.rows_per_tile);
  const int64_t taps = p.kernel_h * p.kernel_w * p.depth;
  plan.bytes = element_size(p.dtype) * (planes * (p.depth * p.in_h * p.in_w + p.out_h * p.out_w) + p.channels * taps);
  plan.flops = 2 * planes * p.in_h * p.in_w * taps;
  plan.prefetch_input = plan.prefetch_output = should_prefetch(p, machine, false);
  plan.prefetch_next_output = prefetches_output(p, machine);
  if (machine.with_reasons) {
    plan.reason = describe(*plan.row) + "; " + std::to_string(p.stride_h * p.stride_w) + " phases of stride 1" + in_order(plan);
  }
  return plan;
}

Plan plan_backward_weight(const CpuProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p.dtype, isa);
  const int64_t unit = accumulate_size(p.dtype);
  plan.row =
      choose_row(isa, machine, Op::kDepthwise, Pass::kBackwardWeight, p, nchw_family(isa, Pass::kBackwardWeight, p, p.channels));
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t elements = p.batch * p.channels * p.out_h * p.out_w;
  // The parts must depend neither on the threads nor on the caches: the order of the sums does.
  if (p.layout == Layout::kNHWC) {
    const int64_t affordable = kPartBytes / std::max<int64_t>(taps * p.channels * unit, 1);
    plan.parts = std::clamp<int64_t>(std::min(affordable, p.batch * p.out_h / 4), 1, kMaxParts);
    plan.tiles = plan.parts;
  } else {
    plan.columns = plan.row->family == Family::kTransposed ? ceil_div(p.channels, lanes) : p.channels;
    plan.parts = std::clamp<int64_t>(std::min(ceil_div(kMaxParts, plan.columns), p.batch), 1, kMaxParts);
    plan.tiles = plan.parts * plan.columns;
    plan.rows_per_tile = plan.row->family == Family::kTransposed
                             ? staged_rows(p, p.in_w * lanes * unit, p.out_w * lanes * unit, 96 << 10)
                             : staged_rows(p, (p.in_w + 2 * p.pad_w) * unit, 0, 16 << 10);
  }
  plan.workers = workers_for(elements, plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, plan.rows_per_tile);
  plan.bytes = element_size(p.dtype) * (p.batch * p.channels * p.in_h * p.in_w + elements + p.channels * taps);
  plan.flops = 2 * elements * taps;
  plan.prefetch_input = p.layout == Layout::kNHWC
                            ? should_prefetch(p, machine, false) || prefetch_pays_from_memory(p, machine, false)
                            : plan.row->family == Family::kRows && input_bytes(p) >= machine.prefetch_threshold / 4;
  if (machine.with_reasons) {
    plan.reason = describe(*plan.row) + "; partial sums over " + std::to_string(plan.parts) + " fixed parts, added in order" +
                  in_order(plan);
  }
  return plan;
}

Plan plan_batch_norm(const CpuProblem& p, bool backward, const IsaKernels& isa, const Machine& machine) {
  constexpr int64_t kLeastPixels = 512;  // of a part
  Plan plan;
  plan.row = choose_row(isa, machine, Op::kBatchNorm, backward ? Pass::kBackward : Pass::kForward, p);
  const int64_t pixels = p.batch * p.in_h * p.in_w, elements = pixels * p.channels;
  // As in the weight gradient, the parts depend on the problem alone.
  if (p.layout == Layout::kNHWC) plan.parts = std::clamp<int64_t>(pixels / kLeastPixels, 1, kMaxParts);
  plan.tiles = p.layout == Layout::kNHWC ? plan.parts : p.channels;
  plan.workers = workers_for(elements, plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, 1);
  plan.bytes = element_size(p.dtype) * elements * (backward ? 3 : 2);
  plan.flops = elements * (backward ? 10 : 6);  // but for the activation's own
  if (machine.with_reasons) {
    plan.reason = p.layout == Layout::kNHWC
                      ? "channels are lanes; sums of " + std::to_string(plan.parts) + " ranges of pixels first"
                      : "a channel a tile, its sums first; pixels are lanes";
  }
  return plan;
}

SqueezePlan plan_squeeze(const CpuProblem& p, int64_t squeezed, const IsaKernels& isa, const Machine& machine) {
  SqueezePlan both;
  Plan& plan = both.means;
  plan.row = choose_row(isa, machine, Op::kSqueezeExcitation, Pass::kForward, p);
  plan.columns = p.layout == Layout::kNHWC ? ceil_div(p.channels, kMeanVectors * lanes_of(p.dtype, isa)) : p.channels;
  plan.tiles = p.batch * plan.columns;
  plan.workers = workers_for(p.batch * p.channels * p.in_h * p.in_w, plan.tiles, machine);
  const int64_t weights = 2 * p.channels * squeezed;
  plan.bytes = input_bytes(p) + weights * accumulate_size(p.dtype) + p.batch * p.channels * element_size(p.dtype);
  plan.flops = p.batch * (p.channels * p.in_h * p.in_w + 2 * weights);
  if (machine.with_reasons) plan.reason = describe(*plan.row);
  both.gates.row = plan.row;
  both.gates.tiles = p.batch;
  both.gates.workers = std::min(plan.workers, p.batch);
  return both;
}

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
  constexpr int64_t kMinPixels = 98, kMiddleBytes = 256 << 10;
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
  whole.flops = 2 * out_pixels * problem.channels * (problem.kernel_h * problem.kernel_w + out_channels);
  whole.bytes = element_size(problem.dtype) * (problem.batch * problem.channels * problem.in_h * problem.in_w +
                                               out_pixels * out_channels + problem.channels * out_channels);
  // Prefetching the next tile's input during the product costs little, and pays before memory itself is read.
  const bool beyond_l3 = problem.layout == Layout::kNHWC && whole.bytes >= machine.l3_bytes / 4;
  whole.prefetch_input = whole.prefetch_output = should_prefetch(problem, machine, false) || beyond_l3;
  if (machine.with_reasons) {
    whole.reason = std::to_string(whole.rows_per_tile) + " rows by 1/" + std::to_string(plan.splits) +
                   " of the output channels a tile; " + product_name(*whole.row) + (of_planes ? ", pixels are lanes" : "") +
                   "; depthwise stage: " + describe(*plan.depthwise.row) +
                   (whole.prefetch_input ? "; the next tile's input is prefetched" : "");
  }
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
  whole.flops = 2 * pixels * p.channels * out_channels;
  whole.bytes = element_size(p.dtype) * (pixels * (p.channels + out_channels) + p.channels * out_channels);
  const bool beyond_l3 = p.layout == Layout::kNHWC && whole.bytes >= machine.l3_bytes / 4;
  whole.prefetch_input = whole.prefetch_output = should_prefetch(p, machine, false) || beyond_l3;
  if (machine.with_reasons) {
    whole.reason = std::to_string(whole.rows_per_tile) + " rows by 1/" + std::to_string(plan.splits) +
                   " of the output channels a tile; " + product_name(*whole.row) + (of_planes ? ", pixels are lanes" : "") +
                   (whole.prefetch_input ? "; the next tile's input is prefetched" : "");
  }
  return plan;
}

InvertedPlan plan_inverted_residual(const CpuProblem& p, int64_t in_channels, int64_t out_channels, const IsaKernels& isa,
                                    const Machine& machine) {
  constexpr int64_t kLine = 64, kLarge = 8 << 20;  // bytes of the expanded image; below, caches serve the two ops as well
  InvertedPlan plan;
  Plan& whole = plan.block.whole;
  whole.row = choose_row(isa, machine, Op::kSeparable, Pass::kForward, p);  // in NCHW the one that transposes comes first
  const PointwiseFormat& format = whole.row->pointwise;
  const int64_t unit = accumulate_size(p.dtype), lanes = kLine / unit;
  plan.pitch = round_up(p.channels, lanes);
  if (plan.pitch * unit % 1024 == 0) plan.pitch += lanes;
  plan.copy_pitch = round_up(in_channels, lanes) + lanes;
  const int64_t in_row = p.in_w * plan.pitch * unit, middle_row = p.out_w * (p.channels + 2 * lanes) * unit;
  // The expanded rows and the depthwise result share L2 with panels and output; several tiles a worker even out the end.
  const int64_t budget = machine.l2_bytes * 5 / 8, reach = (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t affordable = (budget - (reach - p.stride_h) * in_row) / std::max<int64_t>(p.stride_h * in_row + middle_row, 1);
  const int64_t fair = ceil_div(p.batch * p.out_h, kSplitsAWorker * machine.threads);
  const int64_t rows = std::clamp<int64_t>(std::min(affordable, fair), 1, p.batch * p.out_h);
  const int64_t expanded = p.batch * p.channels * p.in_h * p.in_w * element_size(p.dtype);
  const bool forced = machine.forced.name != nullptr && whole.row->name == std::string_view(machine.forced.name);
  const bool stages = whole.row->family != Family::kDirect && format.depth_multiple == 1;
  plan.fused = stages && affordable >= 1 && (expanded >= std::min(kLarge, machine.l3_bytes / 4) || forced);
  if (!plan.fused) return plan;

  CpuProblem stage = p;
  stage.batch = 1;
  stage.layout = Layout::kNHWC;
  stage.dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  stage.out_dtype = format.dtype;
  stage.in_stride_w = plan.pitch, stage.out_stride_w = 2 * p.channels;  // whatever they are, pixels do not lie close together
  plan.block.depthwise = plan_forward(stage, set_of(p.dtype, isa), machine);
  set_tiles(plan.block, {rows, ceil_div(p.batch * p.out_h, rows), 1});
  const int64_t out_pixels = p.batch * p.out_h * p.out_w, in_pixels = p.batch * p.in_h * p.in_w;
  whole.workers = workers_for(out_pixels * out_channels * p.channels / 16, whole.tiles, machine);
  plan.most_pixels = std::min((std::min(rows, p.out_h) - 1) * p.stride_h + reach, p.in_h) * p.in_w;
  plan.scratch_offset = round_up(whole.row->scratch(p, rows), 2 * kLine);
  whole.scratch_bytes =
      plan.scratch_offset + (plan.most_pixels * plan.pitch + kExpandPixels * (plan.copy_pitch + format.panel)) * unit;
  whole.flops = 2 * (in_pixels * in_channels * p.channels + out_pixels * p.channels * (p.kernel_h * p.kernel_w + out_channels));
  whole.bytes =
      element_size(p.dtype) * (in_pixels * in_channels + out_pixels * out_channels + p.channels * (in_channels + out_channels));
  if (machine.with_reasons) {
    whole.reason = std::to_string(rows) + " rows a tile, expanded in scratch; " + product_name(*whole.row) +
                   "; depthwise stage: " + describe(*plan.block.depthwise.row);
  }
  return plan;
}

}  // namespace dwconv
