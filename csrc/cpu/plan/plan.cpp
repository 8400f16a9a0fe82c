#include <algorithm>
#include <cmath>

#include "cpu/plan/parts.h"

namespace dwconv {

namespace {

constexpr int64_t kRowTile = 4;           // rows a register tile has in NCHW and in a flat kernel; tiles are multiples of it
constexpr int64_t kLeastDirectRows = 14;  // of a tile of the direct family: two register tiles
constexpr int64_t kTilesAWorker = 8;      // enough to even out the tail
constexpr int64_t kMaxParts = 32;
constexpr int64_t kPartBytes = 4 << 20;

// Output rows a tile whose staged rows, `row_bytes` an input row and `out_row_bytes` an output row, fit in `cache_bytes`; but
// so many that halo rows are at most a third.
int64_t staged_rows(const CpuProblem& p, int64_t row_bytes, int64_t out_row_bytes, int64_t cache_bytes) {
  // In doubles: 64 bits need not hold a filter as large as an image times its rows.
  const double halo = 1.0 * std::max<int64_t>(p.kernel_h - 1, 0) * p.dilation_h;
  const double a_row = std::max(1.0 * row_bytes * p.depth * p.stride_h + out_row_bytes, 1.0);
  const double in_cache = std::trunc((cache_bytes - halo * row_bytes * p.depth) / a_row);
  const double rows = std::max({in_cache, 2.0 * kRowTile, std::ceil(2 * halo / p.stride_h)});
  const int64_t out_h = std::max<int64_t>(p.out_h, 1);
  const int64_t pieces = rows < out_h ? ceil_div(out_h, static_cast<int64_t>(rows)) : 1;  // of even height
  return std::max<int64_t>(std::min(ceil_div(ceil_div(p.out_h, pieces), kRowTile) * kRowTile, p.out_h), 1);
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

const char* in_order(const Plan& plan) {
  if (!plan.prefetch_input) return "";
  return plan.row->layout == Layout::kNHWC ? "; rows are read in order first" : "; the next rows are prefetched";
}

}  // namespace

// Channels of packed depthwise weights where channels or planes are lanes: a vector may begin at any of them.
int64_t weight_pitch(const IsaKernels& isa, DType dtype, int64_t channels) {
  const int64_t lanes = lanes_of(dtype, isa);
  return ceil_div(channels + lanes - 1, lanes) * lanes;
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

constexpr int64_t kMinElementsAWorker = 1 << 14;  // below it a second thread costs more than it brings (a few us)

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
  plan.flops = counted(2.0 * elements * taps);
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
  plan.flops = counted(2.0 * planes * p.in_h * p.in_w * taps);
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
    const int64_t rows = p.batch * p.out_h, wanted = std::max(rows / 4, std::min(rows, rows * p.out_w / 1024));
    plan.parts = std::clamp<int64_t>(std::min(affordable, wanted), 1, kMaxParts);
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
  plan.flops = counted(2.0 * elements * taps);
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
  SqueezePlan stages;
  const int64_t lanes = lanes_of(p.dtype, isa), blocks = ceil_div(p.channels, kMeanVectors * lanes);
  Plan& plan = stages.means;
  plan.row = choose_row(isa, machine, Op::kSqueezeExcitation, Pass::kForward, p);
  plan.columns = p.layout == Layout::kNHWC ? blocks : p.channels;
  plan.tiles = p.batch * plan.columns;
  plan.workers = workers_for(p.batch * p.channels * p.in_h * p.in_w, plan.tiles, machine);
  const int64_t weights = 2 * p.channels * squeezed;
  plan.bytes = input_bytes(p) + (weights + p.batch * p.channels) * element_size(p.dtype);
  plan.flops = counted(1.0 * p.batch * p.channels * p.in_h * p.in_w + 2.0 * p.batch * weights);
  if (machine.with_reasons) plan.reason = describe(*plan.row);
  for (Plan* const layer : {&stages.hidden, &stages.gates}) {
    layer->row = plan.row;
    layer->tiles = p.batch * (layer == &stages.hidden ? ceil_div(squeezed, lanes) : blocks);
    layer->workers = workers_for(p.batch * p.channels * squeezed, layer->tiles, machine);
  }
  return stages;
}

Plan plan_layer_norm(const CpuProblem& p, const IsaKernels& isa, const Machine& machine) {
  constexpr int64_t kTileElements = 8 << 10;
  Plan plan;
  plan.row = choose_row(isa, machine, Op::kLayerNorm, Pass::kForward, p);
  const int64_t rows = p.batch * p.in_h, row = p.in_w * p.channels;
  plan.rows_per_tile = std::clamp<int64_t>(kTileElements / row, 1, rows);
  plan.tiles = ceil_div(rows, plan.rows_per_tile);
  plan.workers = workers_for(rows * row, plan.tiles, machine);
  plan.bytes = element_size(p.dtype) * 2 * rows * row;
  plan.flops = rows * row * 8;
  if (machine.with_reasons) plan.reason = describe(*plan.row);
  return plan;
}

Plan plan_step(const CpuProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  plan.row = choose_row(isa, machine, Op::kDepthwiseStep, Pass::kForward, p);
  const int64_t channels = p.batch * p.channels, window = (p.kernel_w - 1) * p.dilation_w;
  plan.tiles = p.batch * ceil_div(p.channels, kStepChannels);
  plan.workers = workers_for(channels * (p.kernel_w + window), plan.tiles, machine);
  plan.bytes = element_size(p.dtype) * (channels * (2 + 2 * window) + p.channels * p.kernel_w);
  plan.flops = 2 * channels * p.kernel_w;
  if (machine.with_reasons) plan.reason = describe(*plan.row);
  return plan;
}

}  // namespace dwconv
