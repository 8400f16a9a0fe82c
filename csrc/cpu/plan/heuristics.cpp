#include "cpu/plan/heuristics.h"

#include <algorithm>
#include <limits>
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

// What a family would take for an output element, in units of one multiply-add of a full vector:
//   (taps * tap + element + row / width) * lanes
// tap: of the filter; element: staging or transposition; row: the start of a row of outputs; lanes: idle ones are paid for like
// busy ones, and what else slows all of it. All heuristics are such costs, fitted to the families' times at 7 to 112 columns, 8
// to 512 channels, filters 1x1 to 31x31, stride 1 and 2.
struct Cost {
  double tap = 1, element = 0, row = 0, lanes = 1;

  double of(double taps, int64_t width) const { return (taps * tap + element + row / std::max<int64_t>(width, 1)) * lanes; }
};
struct Candidate {
  Family family;
  double cost;
};
// The first of equals.
Family cheapest(std::initializer_list<Candidate> candidates) {
  return std::min_element(candidates.begin(), candidates.end(), [](auto& a, auto& b) { return a.cost < b.cost; })->family;
}
constexpr double kNone = std::numeric_limits<double>::infinity();  // where the family has no kernel for it

// Vectors times their lanes over the n elements in them.
double with_idle(int64_t n, int64_t lanes) {
  n = std::max<int64_t>(n, 1);
  return static_cast<double>(round_up(n, lanes)) / static_cast<double>(n);
}

// NCHW: planes as lanes (transposed), or output columns as lanes, staged (rows) or read in place (direct). Each of the two
// transposed tensors costs an element its transposition, more where they are large; a strided row is staged in phases, more than
// two of them element by element.
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

// channels_last: elements of a row of pixels as lanes (flat), where channels as lanes take 1 for all taps.
constexpr Cost kFlat64 = {.tap = 0.84, .row = 0.84 * 5}, kFlat64Converted = {.tap = 1.02, .row = 1.02 * 4};
constexpr Cost kFlatNarrow = {.tap = 1.1, .row = 1.1 * 8};

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
  // The flat ones treat a row of pixels as one array. (Where strides are not given, pixels are dense.)
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

bool has_row(const IsaKernels& isa, Op op, Pass pass, const CpuProblem& p, Family family) {
  return first_row(isa, op, pass, p, [&](const KernelRow& row) { return row.family == family && fits(row, p); }) != nullptr;
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

std::vector<const KernelRow*> fitting_rows(const IsaKernels& isa, Op op, Pass pass, const CpuProblem& p) {
  std::vector<const KernelRow*> rows;
  first_row(isa, op, pass, p, [&](const KernelRow& row) {
    const bool known = std::any_of(rows.begin(), rows.end(), [&](const KernelRow* r) { return r->family == row.family; });
    if (!known && fits(row, p)) rows.push_back(&row);
    return false;
  });
  return rows;
}

Family nhwc_family(const IsaKernels& isa, const Machine& machine, const CpuProblem& p) {
  const int64_t lanes = lanes_of(p.dtype, isa);
  const bool wide = set_of(p.dtype, isa).vector_bytes == 64, converted = element_size(p.dtype) != accumulate_size(p.dtype);
  Cost flat = !wide ? kFlatNarrow : converted ? kFlat64Converted : kFlat64;
  // From memory the order of addresses counts (sequential_rows.h makes up for some of it).
  if (comes_from_memory(p, machine)) flat.lanes = converted ? 0.85 : 0.75;
  Cost channels = {.lanes = with_idle(p.channels, lanes)};
  if (!wide && p.channels % lanes != 0) channels.lanes *= converted ? 3 : 1.2;  // vectors in part go through a buffer
  const bool has_flat = has_row(isa, Op::kDepthwise, Pass::kForward, p, Family::kFlat);
  return cheapest({{Family::kChannels, channels.of(1, p.out_w)}, {Family::kFlat, has_flat ? flat.of(1, p.out_w) : kNone}});
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
    return Cost{cost.tap * tap, staging, cost.row_start, with_idle(p.out_w, lanes)}.of(taps, p.out_w);
  };
  const double transposition = (is_large(p) ? costs.transpose_large : costs.transpose) * (1 + inputs);
  const Cost transposed = {unrolled ? costs.transposed_tap : 1, transposition, 0, with_idle(planes, lanes)};
  const bool has_direct = wide && has_row(isa, Op::kDepthwise, pass, p, Family::kDirect);
  return cheapest({{Family::kRows, in_rows(costs.rows, unrolled ? 1 : kNotUnrolled)},
                   {Family::kTransposed, transposed.of(taps, p.out_w)},
                   {Family::kDirect, has_direct ? in_rows(unrolled ? costs.direct : costs.direct_any, 1) : kNone}});
}

const KernelRow* block_row(const CpuProblem& p, Family stage_family, const IsaKernels& isa, const Machine& machine) {
  const KernelRow* const row = choose_row(isa, machine, Op::kSeparable, Pass::kForward, p);
  const bool forced = machine.forced.name != nullptr && row->name == std::string_view(machine.forced.name);
  if (forced || p.layout == Layout::kNHWC || stage_family == Family::kTransposed) return row;
  const KernelRow* const direct = first_row(isa, Op::kSeparable, Pass::kForward, p, [&](const KernelRow& r) {
    return r.family == Family::kDirect && fits(r, p) && r.isa == row->isa;
  });
  // Pixels as lanes are idle where rows end; of whole images: which kernel runs, and with it the order of sums, must not depend
  // on the threads. The other kernel transposes.
  const Cost pixels = {.lanes = with_idle(p.out_h * p.out_w, lanes_of(p.dtype, isa))}, transposing = {.lanes = 20.0 / 19};
  return direct != nullptr && pixels.of(1, p.out_w) <= transposing.of(1, p.out_w) ? direct : row;
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
