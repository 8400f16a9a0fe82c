#include "cpu/plan/heuristics.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dwconv {

int64_t input_bytes(const CpuProblem& p) { return element_size(p.dtype) * p.batch * p.depth * p.channels * p.in_h * p.in_w; }
int64_t output_bytes(const CpuProblem& p) { return element_size(p.out_dtype) * p.batch * p.channels * p.out_h * p.out_w; }
bool comes_from_memory(const CpuProblem& p, const Machine& machine) {
  return input_bytes(p) + output_bytes(p) >= machine.l3_bytes / 2;
}

const IsaKernels& set_of(DType dtype, const IsaKernels& isa) {
  // A set has all of a dtype's depthwise kernels or none; the forward pass's come first.
  const auto has = [&](const KernelTable& table) {
    return std::any_of(table.rows, table.rows + table.count,
                       [&](const KernelRow& row) { return row.dtype == dtype && row.depthwise != nullptr; });
  };
  const IsaKernels* set = &isa;
  while (set->base != nullptr && !has(set->tables.front())) set = set->base;
  return *set;
}
int64_t lanes_of(DType dtype, const IsaKernels& isa) { return set_of(dtype, isa).vector_bytes / accumulate_size(dtype); }

namespace {

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
constexpr NchwCosts kForward = {5, 7, 1.25, {1, 3, 50, 150, 150}, {}, {}};
constexpr NchwCosts kBackwardWeight = {7, 7, 1.25, {1, 8, 50, 150, 130}, {}, {}};
constexpr NchwCosts kForward64 = {10, 20, 1, {1, 20, 80, 150, 380}, {0.86, 0.1, 16, 0, 60}, {1.2, 5, 0, 0, 160}};
constexpr NchwCosts kBackwardWeight64 = {10, 20, 1.2, {3.2, 3, 100, 200, 320}, {1.25, 4, 0, 0, 200}, {}};

// A function of the problem alone, not of the caches: in the weight gradient the sums' order depends on it.
bool is_large(const CpuProblem& p) {
  constexpr int64_t kLarge = 16 << 20;
  return input_bytes(p) + output_bytes(p) >= kLarge;
}

bool is_for(const KernelRow& row, Op op, Pass pass, const CpuProblem& p) {
  return row.dtype == p.dtype && row.layout == p.layout && row.op == op && row.pass == pass;
}

bool fits(const KernelRow& row, const CpuProblem& p) {
  const bool filter =
      row.filter == 0 || (row.filter == p.kernel_h && row.filter == p.kernel_w && p.dilation_h == 1 && p.dilation_w == 1);
  const bool stride = row.stride == 0 || (row.stride == p.stride_h && row.stride == p.stride_w);
  // The direct kernels write dense rows, not a phase of a strided input gradient, and read one plane for one of the output.
  const bool dense = p.out_stride_w <= 1 && p.out_stride_h <= p.out_w;  // rows too: what is written past one is the next
  const bool direct = dense && p.depth == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  // The flat ones know rows of pixels as rows of numbers. (Where strides are not given, pixels lie close together.)
  const auto close = [&](int64_t stride) { return stride == 0 || stride == p.channels; };
  const bool flat = p.depth == 1 && p.out_dtype == p.dtype && close(p.in_stride_w) && close(p.out_stride_w);
  return filter && stride && (direct || row.family != Family::kDirect) && (flat || row.family != Family::kFlat);
}

// The first row of the set, or of those below it, that `wanted` takes.
template <class Wanted>
const KernelRow* first_row(const IsaKernels& isa, Op op, Pass pass, const CpuProblem& p, Wanted wanted) {
  for (const IsaKernels* set = &isa; set != nullptr; set = set->base) {
    for (const KernelTable& table : set->tables) {
      for (const KernelRow* row = table.rows; row < table.rows + table.count; ++row) {
        if (is_for(*row, op, pass, p) && wanted(*row)) return row;
      }
    }
  }
  return nullptr;
}

}  // namespace

const KernelRow* choose_row(const IsaKernels& isa, const Machine& machine, Op op, Pass pass, const CpuProblem& p,
                            std::optional<Family> family) {
  const ForcedRow& forced = machine.forced;
  const KernelRow* found = nullptr;
  if (forced.name != nullptr) {
    found = first_row(isa, op, pass, p, [&](const KernelRow& row) {
      return row.name == std::string_view(forced.name) && forced.filter == row.filter && forced.stride == row.stride &&
             fits(row, p);
    });
  }
  if (found == nullptr) {
    found = first_row(isa, op, pass, p, [&](const KernelRow& row) { return fits(row, p) && (!family || row.family == *family); });
  }
  if (found != nullptr) return found;
  std::string nearest;
  first_row(isa, op, pass, p, [&](const KernelRow& row) {
    nearest +=
        std::string(" ") + row.name + "(filter " + std::to_string(row.filter) + ", stride " + std::to_string(row.stride) + ")";
    return false;
  });
  throw std::runtime_error(std::string(op_name(op)) + ": no " + pass_name(pass) + " kernel for " + dtype_name(p.dtype) + " " +
                           layout_name(p.layout) + "; nearest:" + (nearest.empty() ? " none" : nearest));
}

namespace {

// Of an output element in a flat kernel, where one whose lanes are channels takes 1: inside a row, and what a row's ends cost in
// elements. Fitted to 3x3 filters over rows of 7 to 112 pixels of 8 to 512 channels.
struct FlatCost {
  double element, row_ends;
};
constexpr FlatCost kFlat64 = {0.84, 5}, kFlat64Converted = {1.02, 4}, kFlatNarrow = {1.1, 8};

}  // namespace

Family nhwc_family(const IsaKernels& isa, const Machine& machine, const CpuProblem& p) {
  const int64_t lanes = lanes_of(p.dtype, isa), channels = std::max<int64_t>(p.channels, 1);
  const bool wide = set_of(p.dtype, isa).vector_bytes == 64, converted = element_size(p.dtype) != accumulate_size(p.dtype);
  const FlatCost& cost = !wide ? kFlatNarrow : converted ? kFlat64Converted : kFlat64;
  double flat = cost.element * (1 + cost.row_ends / std::max<int64_t>(p.out_w, 1));
  // From memory the order of addresses counts (sequential_rows.h makes up for some of it).
  if (comes_from_memory(p, machine)) flat *= converted ? 0.85 : 0.75;
  double of_channels = static_cast<double>(ceil_div(channels, lanes) * lanes) / channels;
  if (!wide && channels % lanes != 0) of_channels *= converted ? 3 : 1.2;  // vectors in part go through a buffer
  const auto wanted = [&](const KernelRow& row) { return row.family == Family::kFlat && fits(row, p); };
  const bool found = flat < of_channels && first_row(isa, Op::kDepthwise, Pass::kForward, p, wanted) != nullptr;
  return found ? Family::kFlat : Family::kChannels;
}

Family nchw_family(const IsaKernels& isa, Pass pass, const CpuProblem& p, int64_t planes) {
  if (p.layout == Layout::kNHWC) return Family::kChannels;
  const int64_t lanes = lanes_of(p.dtype, isa);
  const bool wide = set_of(p.dtype, isa).vector_bytes == 64;
  // A strided input gradient's rows are written element by element, for which the narrow sets' costs stand everywhere.
  const NchwCosts& costs = pass == Pass::kBackwardWeight    ? wide ? kBackwardWeight64 : kBackwardWeight
                           : wide && pass == Pass::kForward ? kForward64
                                                            : kForward;
  constexpr double kNotUnrolled = 1.1;
  const auto idle = [&](int64_t n) {
    return static_cast<double>(ceil_div(std::max<int64_t>(n, 1), lanes) * lanes) / std::max<int64_t>(n, 1);
  };
  const double taps = static_cast<double>(p.kernel_h * p.kernel_w * p.depth);
  const double inputs = static_cast<double>(p.stride_h) * static_cast<double>(p.stride_w);  // an output
  // Staged rows have a copy of the padding between far outputs, and the input gradient a plan for each phase.
  constexpr double kManyInputs = 64;
  if (inputs > kManyInputs) return Family::kTransposed;
  const bool unrolled = p.dtype != DType::kFloat64 && p.kernel_h == p.kernel_w && p.kernel_h <= 7 && p.kernel_h % 2 == 1 &&
                        p.dilation_h * p.dilation_w == 1;
  const bool halves = p.stride_h == 2 && p.stride_w == 2;
  const auto in_rows = [&](const RowsCost& cost, double tap) {
    const double staging = inputs == 1 ? cost.stage : halves ? cost.stage_halves : cost.stage_elements;
    return (taps * cost.tap * tap + staging + cost.row_start / std::max<int64_t>(p.out_w, 1)) * idle(p.out_w);
  };
  const double transposition = (is_large(p) ? costs.transpose_large : costs.transpose) * (1 + inputs);
  const double transposed = (taps * (unrolled ? costs.transposed_tap : 1) + transposition) * idle(planes);
  const double rows = in_rows(costs.rows, unrolled ? 1 : kNotUnrolled);
  const auto direct = [&](const KernelRow& row) { return row.family == Family::kDirect && fits(row, p); };
  if (wide && in_rows(unrolled ? costs.direct : costs.direct_any, 1) < std::min(rows, transposed) &&
      first_row(isa, Op::kDepthwise, pass, p, direct) != nullptr) {
    return Family::kDirect;
  }
  return transposed < rows ? Family::kTransposed : Family::kRows;
}

namespace {

// A block whose lanes are pixels has idle ones where its rows end. Of whole images: which kernel runs, and with it the order of
// sums, must not depend on the threads.
bool fills_lanes(const CpuProblem& p, int64_t lanes) {
  const int64_t pixels = p.out_h * p.out_w;
  return 20 * pixels >= 19 * ceil_div(pixels, lanes) * lanes;
}

}  // namespace

const KernelRow* block_row(const CpuProblem& p, Family stage_family, const IsaKernels& isa, const Machine& machine) {
  const KernelRow* const row = choose_row(isa, machine, Op::kSeparable, Pass::kForward, p);
  const bool forced = machine.forced.name != nullptr && row->name == std::string_view(machine.forced.name);
  if (forced || p.layout == Layout::kNHWC || stage_family == Family::kTransposed || !fills_lanes(p, lanes_of(p.dtype, isa)))
    return row;
  const KernelRow* const direct = first_row(isa, Op::kSeparable, Pass::kForward, p, [&](const KernelRow& r) {
    return r.family == Family::kDirect && fits(r, p) && r.isa == row->isa;
  });
  return direct != nullptr ? direct : row;
}

const KernelRow* plane_stage_row(const CpuProblem& stage, Family family, const IsaKernels& isa, const Machine& machine) {
  const auto of_family = [&](Family wanted, const Machine& here) {
    return choose_row(isa, here, Op::kDepthwise, Pass::kForward, stage, wanted);
  };
  const KernelRow* const row = of_family(family == Family::kTransposed ? Family::kRows : family, machine);
  if (row->family != Family::kTransposed) return row;
  Machine unforced = machine;
  unforced.forced = {};
  return of_family(Family::kRows, unforced);
}

}  // namespace dwconv
