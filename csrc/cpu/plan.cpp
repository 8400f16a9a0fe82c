#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>

namespace dwconv {

namespace {

constexpr int64_t kMinElementsAWorker = 1 << 14;  // below it a second thread costs more than it brings (a few us)
constexpr int64_t kRowTile = 4;                   // rows an NCHW register tile has; tiles are multiples of it
constexpr int64_t kLeastDirectRows = 14;          // of a tile of the direct family: two register tiles
constexpr int64_t kTilesAWorker = 8;              // enough to even out the tail
constexpr int64_t kSplitsAWorker = 4;             // the same of a fused block
constexpr int64_t kMaxParts = 32;
constexpr int64_t kPartBytes = 4 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which of NCHW's families: planes as lanes (transposed), or output columns as lanes, staged (rows) or read in place (direct).
// Costs of an output element in units of one multiply-add of a full vector, fitted to the families' times at 7 to 112 columns,
// filters 1x1 to 31x31, stride 1 and 2. Idle lanes are paid for like busy ones; each of the two transposed tensors costs an
// element its transposition, more where they are large; a strided row is staged in phases, more than two of them element by
// element; and with columns as lanes each row costs its start.
struct RowsCost {
  double tap, stage, stage_halves, stage_elements, row_start;
};
struct NchwCosts {
  double transpose, transpose_large, transposed_tap;  // with the 16 registers of narrower sets a tile loads its taps anew
  RowsCost rows;
  RowsCost direct, direct_any;  // of 64-byte sets: squares, any other filter
};
constexpr NchwCosts kForward = {7, 7, 1.25, {1, 6, 50, 150, 120}, {}, {}};
constexpr NchwCosts kBackwardWeight = {7, 7, 1.25, {1, 8, 50, 150, 130}, {}, {}};
constexpr NchwCosts kForward64 = {10, 20, 1, {1, 20, 80, 150, 380}, {0.86, 0.1, 16, 0, 60}, {1.2, 5, 0, 0, 160}};
constexpr NchwCosts kBackwardWeight64 = {10, 20, 1.2, {3.2, 3, 100, 200, 320}, {1.25, 4, 0, 0, 200}, {}};

// A function of the problem alone, not of the caches: in the weight gradient the sums' order depends on it.
bool is_large(const DepthwiseProblem& p) {
  constexpr int64_t kLarge = 16 << 20;
  return element_size(p.dtype) * p.batch * p.channels * (p.depth * p.in_h * p.in_w + p.out_h * p.out_w) >= kLarge;
}

bool is_of(const KernelRow& row, std::string_view family) {
  return std::string_view(row.name).find(family) != std::string_view::npos;
}
bool is_transposed(const KernelRow& row) { return is_of(row, "_transposed"); }
bool is_direct(const KernelRow& row) { return is_of(row, "_direct"); }
bool is_rows(const KernelRow& row) { return is_of(row, "_rows"); }

// A plan is made at every call and looks at many rows: numbers first, no strings.
bool is_for(const KernelRow& row, std::string_view op, std::string_view pass, const DepthwiseProblem& p) {
  return row.dtype == p.dtype && row.out_dtype == p.out_dtype && row.layout == p.layout && row.op == op && row.pass == pass;
}

bool takes_filter(const KernelRow& row, const DepthwiseProblem& p) {
  const bool filter =
      row.filter == 0 || (row.filter == p.kernel_h && row.filter == p.kernel_w && p.dilation_h == 1 && p.dilation_w == 1);
  const bool stride = row.stride == 0 || (row.stride == p.stride_h && row.stride == p.stride_w);
  // The direct kernels write dense rows, not a phase of a strided input gradient, and read one plane for one of the output.
  const bool dense = p.out_stride_w <= 1 && p.out_stride_h <= p.out_w;  // rows too: what is written past one is the next
  const bool direct = dense && p.depth == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  return filter && stride && (direct || !is_direct(row));
}

// The first row of the set, or of those below it, that `wanted` takes.
template <class Wanted>
const KernelRow* first_row(const IsaKernels& isa, std::string_view op, std::string_view pass, const DepthwiseProblem& p,
                           Wanted wanted) {
  for (const IsaKernels* set = &isa; set != nullptr; set = set->base) {
    for (int32_t i = 0; i < set->table.count; ++i) {
      const KernelRow& row = set->table.rows[i];
      if (is_for(row, op, pass, p) && wanted(row)) return &row;
    }
  }
  return nullptr;
}

const KernelRow* choose(const IsaKernels& isa, const Machine& machine, std::string_view op, std::string_view pass,
                        const DepthwiseProblem& p, std::string_view family = "") {
  const ForcedRow& forced = machine.forced;
  const KernelRow* found = nullptr;
  if (forced.name != nullptr) {
    found = first_row(isa, op, pass, p, [&](const KernelRow& row) {
      return row.name == std::string_view(forced.name) && forced.filter == row.filter && forced.stride == row.stride &&
             takes_filter(row, p);
    });
  }
  if (found == nullptr) {
    found = first_row(isa, op, pass, p, [&](const KernelRow& row) { return takes_filter(row, p) && is_of(row, family); });
  }
  if (found != nullptr) return found;
  std::string nearest;
  first_row(isa, op, pass, p, [&](const KernelRow& row) {
    nearest +=
        std::string(" ") + row.name + "(filter " + std::to_string(row.filter) + ", stride " + std::to_string(row.stride) + ")";
    return false;
  });
  throw std::runtime_error(std::string(op) + ": no " + std::string(pass) + " kernel for " + dtype_name(p.dtype) + " " +
                           layout_name(p.layout) + "; nearest:" + (nearest.empty() ? " none" : nearest));
}

int64_t lanes_of(DType dtype, const IsaKernels& isa) { return isa.table.vector_bytes / accumulate_size(dtype); }
int64_t lanes_of(const DepthwiseProblem& p, const IsaKernels& isa) { return lanes_of(p.dtype, isa); }

// Channels of packed depthwise weights where channels or planes are lanes: a vector may begin at any of them.
int64_t weight_pitch(const IsaKernels& isa, DType dtype, int64_t channels) {
  const int64_t lanes = lanes_of(dtype, isa);
  return ceil_div(channels + lanes - 1, lanes) * lanes;
}

// `planes`: what the transposed family has to fill its vectors with.
const char* nchw_family(const IsaKernels& isa, std::string_view pass, const DepthwiseProblem& p, int64_t planes) {
  if (p.layout == Layout::kNHWC) return "";
  const int64_t lanes = lanes_of(p, isa);
  const bool wide = isa.table.vector_bytes == 64;
  // A strided input gradient's rows are written element by element, for which the narrow sets' costs stand everywhere.
  const NchwCosts& costs = pass == "backward_weight"   ? wide ? kBackwardWeight64 : kBackwardWeight
                           : wide && pass == "forward" ? kForward64
                                                       : kForward;
  constexpr double kNotUnrolled = 1.1;
  const auto idle = [&](int64_t n) {
    return static_cast<double>(ceil_div(std::max<int64_t>(n, 1), lanes) * lanes) / std::max<int64_t>(n, 1);
  };
  const double taps = static_cast<double>(p.kernel_h * p.kernel_w * p.depth);
  const double inputs = static_cast<double>(p.stride_h * p.stride_w);  // an output
  const bool unrolled = p.kernel_h == p.kernel_w && p.kernel_h <= 7 && p.kernel_h % 2 == 1 && p.dilation_h * p.dilation_w == 1;
  const bool halves = p.stride_h == 2 && p.stride_w == 2;
  const auto in_rows = [&](const RowsCost& cost, double tap) {
    const double staging = inputs == 1 ? cost.stage : halves ? cost.stage_halves : cost.stage_elements;
    return (taps * cost.tap * tap + staging + cost.row_start / std::max<int64_t>(p.out_w, 1)) * idle(p.out_w);
  };
  const double transposition = (is_large(p) ? costs.transpose_large : costs.transpose) * (1 + inputs);
  const double transposed = (taps * (unrolled ? costs.transposed_tap : 1) + transposition) * idle(planes);
  const double rows = in_rows(costs.rows, unrolled ? 1 : kNotUnrolled);
  const auto direct = [&](const KernelRow& row) { return is_direct(row) && takes_filter(row, p); };
  if (wide && in_rows(unrolled ? costs.direct : costs.direct_any, 1) < std::min(rows, transposed) &&
      first_row(isa, "depthwise_conv2d", pass, p, direct) != nullptr) {
    return "_direct";
  }
  return transposed < rows ? "_transposed" : "_rows";
}

// Output rows a tile whose staged rows, `row_bytes` an input row and `out_row_bytes` an output row, fit in `cache_bytes`; but
// so many that halo rows are at most a third.
int64_t staged_rows(const DepthwiseProblem& p, int64_t row_bytes, int64_t out_row_bytes, int64_t cache_bytes) {
  const int64_t halo = std::max<int64_t>(p.kernel_h - 1, 0) * p.dilation_h;
  const int64_t a_row = std::max<int64_t>(row_bytes * p.depth * p.stride_h + out_row_bytes, 1);
  const int64_t in_cache = (cache_bytes - halo * row_bytes * p.depth) / a_row;
  const int64_t rows = std::max({in_cache, 2 * kRowTile, ceil_div(2 * halo, p.stride_h)});
  const int64_t pieces = ceil_div(std::max<int64_t>(p.out_h, 1), rows);  // of even height
  return std::max<int64_t>(std::min(ceil_div(ceil_div(p.out_h, pieces), kRowTile) * kRowTile, p.out_h), 1);
}

int64_t input_bytes(const DepthwiseProblem& p) {
  return element_size(p.dtype) * p.batch * p.depth * p.channels * p.in_h * p.in_w;
}

int64_t output_bytes(const DepthwiseProblem& p) { return element_size(p.out_dtype) * p.batch * p.channels * p.out_h * p.out_w; }

// Whether a channels_last input comes from a far cache. A forward pass does little with an element and gains by going through it
// in order first (far_rows.h) only where memory is slow, and not below kManyBytes a pixel, where its tiles' pieces lie close
// together as it is. The passes that do more lose less by it, and gain from a far cache's latency too.
bool is_far(const DepthwiseProblem& p, const Machine& machine, bool forward) {
  constexpr int64_t kManyBytes = 256;
  if (p.layout != Layout::kNHWC) return false;
  if (!forward) return input_bytes(p) >= machine.near_bytes / 4;
  return input_bytes(p) >= machine.near_bytes && p.channels * element_size(p.dtype) >= kManyBytes;
}

// Or from memory: L3 does not keep both operands from call to call. Then going through it in order pays everywhere but in the
// strided input gradient, which writes most of what it moves, and in a forward pass over long pixels, which the prefetchers
// follow by themselves.
bool is_in_memory(const DepthwiseProblem& p, const Machine& machine, bool forward) {
  constexpr int64_t kLongPixel = 512;  // bytes
  if (p.layout != Layout::kNHWC || (forward && p.channels * element_size(p.dtype) >= kLongPixel)) return false;
  return input_bytes(p) + output_bytes(p) >= machine.l3_bytes / 2;
}

// Whether tiles ask for the lines that the next one writes: where the prefetchers bring the input (see nearby_bytes) but
// the output comes from beyond L2, a store would wait for its line.
bool expects_output(const DepthwiseProblem& p, const Machine& machine) {
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
  const char* const lanes = row.layout == Layout::kNHWC ? "channels are lanes"
                            : is_transposed(row)        ? "planes are lanes, transposed through scratch"
                            : is_direct(row)            ? "columns are lanes, read in place"
                                                        : "columns are lanes";
  return filter + ", " + stride + "; " + lanes;
}

const char* in_order(const Plan& plan) {
  if (!plan.far_input) return "";
  return plan.row->layout == Layout::kNHWC ? "; rows are read in order first" : "; the next rows are asked for early";
}

const char* product_name(const KernelRow& row) {
  return row.isa == Isa::kAmx                      ? "product on AMX tiles"
         : row.pointwise.dtype == DType::kBFloat16 ? "product of bfloat16 pairs"
                                                   : "product by multiply-adds";
}

}  // namespace

int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
int64_t accumulate_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
const char* dtype_name(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}
const char* layout_name(Layout layout) { return layout == Layout::kNHWC ? "channels_last" : "NCHW"; }

Plan plan_forward(const DepthwiseProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p, isa);
  const int64_t planes = p.batch * p.channels;
  const int64_t unit = accumulate_size(p.dtype);
  plan.row = choose(isa, machine, "depthwise_conv2d", "forward", p, nchw_family(isa, "forward", p, planes));
  const int64_t elements = planes * p.out_h * p.out_w;
  if (p.layout == Layout::kNHWC) {
    plan.columns = p.batch;
    const int64_t fair = ceil_div(p.batch * p.out_h, kTilesAWorker * machine.threads);
    plan.rows_per_tile = std::clamp<int64_t>(ceil_div(fair, 2) * 2, 1, std::max<int64_t>(p.out_h, 1));
  } else if (is_transposed(*plan.row)) {
    plan.columns = ceil_div(planes, lanes);
    plan.rows_per_tile = staged_rows(p, p.in_w * lanes * unit, p.out_w * lanes * unit, machine.l1_bytes * 2);
  } else if (is_direct(*plan.row)) {
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
    plan.far_input = plan.far_output =
        input_bytes(p) >= machine.near_bytes / 4;  // the next rows are asked for: a prefetch a line
  }
  plan.weight_pitch = plan.row->weight_order == Layout::kNHWC ? weight_pitch(isa, p.dtype, p.channels) : p.channels;
  plan.tiles = ceil_div(p.out_h, plan.rows_per_tile) * plan.columns;
  plan.workers = workers_for(elements * std::max<int64_t>(p.depth, 1), plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, plan.rows_per_tile);
  const int64_t taps = p.kernel_h * p.kernel_w * p.depth;
  plan.bytes =
      element_size(p.dtype) * (planes * p.depth * p.in_h * p.in_w + p.channels * taps) + element_size(p.out_dtype) * elements;
  plan.flops = 2 * elements * taps;
  if (p.layout == Layout::kNHWC) {
    plan.far_input = plan.far_output = is_far(p, machine, true) || is_in_memory(p, machine, true);
  }
  plan.next_output = expects_output(p, machine);
  if (machine.with_reasons) plan.reason = describe(*plan.row) + in_order(plan);
  return plan;
}

Plan plan_backward_input(const DepthwiseProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p, isa);
  const int64_t planes = p.batch * p.channels;
  const int64_t unit = accumulate_size(p.dtype);
  const std::string family = nchw_family(isa, "backward_input", p, planes);
  const bool forced =
      machine.forced.name != nullptr && std::string(machine.forced.name).find("backward_input") != std::string::npos;
  if (family == "_rows" && !forced) return plan;
  plan.row = choose(isa, machine, "depthwise_conv2d", "backward_input", p);
  const int64_t phase_rows = ceil_div(p.out_h, p.stride_h);
  if (p.layout == Layout::kNHWC) {
    plan.columns = p.batch;
    plan.rows_per_tile = std::clamp<int64_t>(p.batch * phase_rows / (kTilesAWorker * machine.threads), 1, phase_rows);
  } else {
    plan.columns = ceil_div(planes, lanes);
    const int64_t row_bytes = lanes * unit * (p.in_w * p.depth + p.stride_h * p.out_w);
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
  plan.far_input = plan.far_output = is_far(p, machine, false);
  plan.next_output = expects_output(p, machine);
  if (machine.with_reasons) {
    plan.reason = describe(*plan.row) + "; " + std::to_string(p.stride_h * p.stride_w) + " phases of stride 1" + in_order(plan);
  }
  return plan;
}

Plan plan_backward_weight(const DepthwiseProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  const int64_t lanes = lanes_of(p, isa);
  const int64_t unit = accumulate_size(p.dtype);
  plan.row = choose(isa, machine, "depthwise_conv2d", "backward_weight", p, nchw_family(isa, "backward_weight", p, p.channels));
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t elements = p.batch * p.channels * p.out_h * p.out_w;
  // The parts must depend neither on the threads nor on the caches: the order of the sums does.
  if (p.layout == Layout::kNHWC) {
    const int64_t affordable = kPartBytes / std::max<int64_t>(taps * p.channels * unit, 1);
    plan.parts = std::clamp<int64_t>(std::min(affordable, p.batch * p.out_h / 4), 1, kMaxParts);
    plan.tiles = plan.parts;
  } else {
    plan.columns = is_transposed(*plan.row) ? ceil_div(p.channels, lanes) : p.channels;
    plan.parts = std::clamp<int64_t>(std::min(ceil_div(kMaxParts, plan.columns), p.batch), 1, kMaxParts);
    plan.tiles = plan.parts * plan.columns;
    plan.rows_per_tile = is_transposed(*plan.row) ? staged_rows(p, p.in_w * lanes * unit, p.out_w * lanes * unit, 96 << 10)
                                                  : staged_rows(p, (p.in_w + 2 * p.pad_w) * unit, 0, 16 << 10);
  }
  plan.workers = workers_for(elements, plan.tiles, machine);
  plan.scratch_bytes = plan.row->scratch(p, plan.rows_per_tile);
  plan.bytes = element_size(p.dtype) * (p.batch * p.channels * p.in_h * p.in_w + elements + p.channels * taps);
  plan.flops = 2 * elements * taps;
  plan.far_input = p.layout == Layout::kNHWC ? is_far(p, machine, false) || is_in_memory(p, machine, false)
                                             : is_rows(*plan.row) && input_bytes(p) >= machine.near_bytes / 4;
  if (machine.with_reasons) {
    plan.reason = describe(*plan.row) + "; partial sums over " + std::to_string(plan.parts) + " fixed parts, added in order" +
                  in_order(plan);
  }
  return plan;
}

Plan plan_batch_norm(const DepthwiseProblem& p, bool backward, const IsaKernels& isa, const Machine& machine) {
  constexpr int64_t kLeastPixels = 512;  // of a part
  Plan plan;
  plan.row = choose(isa, machine, "batch_norm_act", backward ? "backward" : "forward", p);
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

PointwiseFormat pointwise_format(const IsaKernels& isa, DType dtype) {
  DepthwiseProblem any;
  any.dtype = any.out_dtype = dtype;
  return choose(isa, {}, "separable_conv2d", "forward", any)->pointwise;  // both layouts' rows have the same
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
BlockTiles block_tiles(const DepthwiseProblem& p, int64_t out_channels, const PointwiseFormat& format, bool of_planes,
                       const Machine& machine) {
  // The tile's depthwise result shares L2 with a panel; where the weights outgrow L2 it is as large as L2 allows, since they
  // are read once a tile. At least kMinPixels, for the panel's reuse.
  constexpr int64_t kMinPixels = 98, kComfortable = 256 << 10;
  const int64_t unit = element_size(format.dtype);
  const int64_t weight_bytes = p.channels * out_channels * unit;
  const int64_t row_bytes = std::max<int64_t>(p.out_w * p.channels * unit, 1);
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t images = of_planes ? std::max<int64_t>(p.batch, 1) : 1, rows = total_rows / images;
  const int64_t budget =
      of_planes || weight_bytes > machine.l2_bytes / 2 ? machine.l2_bytes / 2 : std::min(kComfortable, machine.l2_bytes / 4);
  const int64_t least = ceil_div(kMinPixels, std::max<int64_t>(p.out_w, 1));
  const int64_t most = std::max(budget / row_bytes, least);
  // Threads share the rows while each has kMinPixels, enough work with a panel for the next one to come from memory meanwhile;
  // else they split the outputs, and each does the whole depthwise stage.
  const int64_t panels = ceil_div(out_channels, format.panel);
  const bool few_rows = total_rows < machine.threads * least;
  BlockTiles tiles;
  tiles.splits = few_rows ? std::clamp<int64_t>(machine.threads / std::max<int64_t>(total_rows / most, 1), 1, panels) : 1;
  const int64_t sharers = ceil_div(ceil_div(machine.threads, tiles.splits), images);
  const int64_t pieces = ceil_div(ceil_div(std::max<int64_t>(rows, 1), most), sharers) * sharers;
  tiles.rows_per_tile = std::max<int64_t>(ceil_div(rows, pieces), 1);
  // Several tiles a worker, so that there is something to take from a slow one: ranges of outputs of the same rows, whose
  // depthwise result a worker keeps from tile to tile.
  tiles.row_tiles = images * ceil_div(rows, tiles.rows_per_tile);
  const int64_t shared =
      machine.threads > 1 ? ceil_div(kSplitsAWorker * machine.threads, std::max<int64_t>(tiles.row_tiles, 1)) : 1;
  tiles.splits = std::clamp(shared, tiles.splits, panels);
  return tiles;
}

// A block whose lanes are pixels has idle ones where its rows end. Of whole images: which kernel runs, and with it the order of
// sums, must not depend on the threads.
bool fills_lanes(const DepthwiseProblem& p, int64_t lanes) {
  const int64_t pixels = p.out_h * p.out_w;
  return 20 * pixels >= 19 * ceil_div(pixels, lanes) * lanes;
}

// In NCHW the kernel that reads and writes planes in place, where there is one, or the one that transposes.
const KernelRow* block_row(const DepthwiseProblem& p, std::string_view stage_family, const IsaKernels& isa,
                           const Machine& machine) {
  const KernelRow* const row = choose(isa, machine, "separable_conv2d", "forward", p);
  const bool forced = machine.forced.name != nullptr && row->name == std::string_view(machine.forced.name);
  if (forced || p.layout == Layout::kNHWC || stage_family == "_transposed" || !fills_lanes(p, lanes_of(p, isa))) return row;
  const KernelRow* const direct = first_row(isa, "separable_conv2d", "forward", p, [&](const KernelRow& r) {
    return is_direct(r) && takes_filter(r, p) && r.isa == row->isa;
  });
  return direct != nullptr ? direct : row;
}

// The depthwise stage within planes: a kernel whose lanes are columns.
const KernelRow* plane_stage_row(const DepthwiseProblem& stage, std::string_view family, const IsaKernels& isa,
                                 const Machine& machine) {
  const auto of_family = [&](std::string_view wanted, const Machine& here) {
    return choose(isa, here, "depthwise_conv2d", "forward", stage, wanted);
  };
  const KernelRow* const row = of_family(family == "_transposed" ? "_rows" : family, machine);
  if (!is_transposed(*row)) return row;
  Machine unforced = machine;
  unforced.forced = {};
  return of_family("_rows", unforced);
}

}  // namespace

SeparablePlan plan_separable(const DepthwiseProblem& problem, int64_t out_channels, const IsaKernels& isa,
                             const Machine& machine) {
  SeparablePlan plan;
  Plan& whole = plan.whole;
  DepthwiseProblem stage = problem;
  stage.batch = 1;
  const char* const family = nchw_family(isa, "forward", stage, stage.channels);
  whole.row = block_row(problem, family, isa, machine);
  const bool of_planes = is_direct(*whole.row);
  const PointwiseFormat& format = whole.row->pointwise;
  const BlockTiles tiles = block_tiles(problem, out_channels, format, of_planes, machine);
  if (of_planes) {
    plan.depthwise.row = plane_stage_row(stage, family, isa, machine);
    plan.depthwise.weight_pitch = problem.channels;
    plan.depthwise.scratch_bytes = plan.depthwise.row->scratch(stage, tiles.rows_per_tile);
  } else {
    stage.layout = Layout::kNHWC;
    stage.out_dtype = format.dtype;
    if (problem.layout == Layout::kNCHW) stage.dtype = problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    plan.depthwise = plan_forward(stage, isa, machine);
  }
  plan.splits = tiles.splits;
  whole.rows_per_tile = tiles.rows_per_tile;
  whole.columns = plan.splits;
  whole.tiles = tiles.row_tiles * plan.splits;

  const int64_t out_pixels = problem.batch * problem.out_h * problem.out_w;
  whole.workers = workers_for(out_pixels * out_channels * problem.channels / 16, whole.tiles, machine);
  whole.scratch_bytes = whole.row->scratch(problem, whole.rows_per_tile) + (of_planes ? plan.depthwise.scratch_bytes : 0);
  whole.flops = 2 * out_pixels * problem.channels * (problem.kernel_h * problem.kernel_w + out_channels);
  whole.bytes = element_size(problem.dtype) * (problem.batch * problem.channels * problem.in_h * problem.in_w +
                                               out_pixels * out_channels + problem.channels * out_channels);
  // Asking for the next tile's input in the course of the product costs little, and pays before memory itself is read.
  const bool beyond_l3 = problem.layout == Layout::kNHWC && whole.bytes >= machine.l3_bytes / 4;
  whole.far_input = whole.far_output = is_far(problem, machine, false) || beyond_l3;
  if (machine.with_reasons) {
    whole.reason = std::to_string(whole.rows_per_tile) + " rows by 1/" + std::to_string(plan.splits) +
                   " of the output channels a tile; " + product_name(*whole.row) + (of_planes ? ", pixels are lanes" : "") +
                   "; depthwise stage: " + describe(*plan.depthwise.row) +
                   (whole.far_input ? "; the next tile's input is asked for early" : "");
  }
  return plan;
}

}  // namespace dwconv
