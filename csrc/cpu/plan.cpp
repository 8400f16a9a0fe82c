#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace dwconv {

namespace {

constexpr int64_t kMinElementsAWorker = 1 << 14;  // below it a second thread costs more than it brings (a few us)
constexpr int64_t kRowTile = 4;                   // rows an NCHW register tile has; tiles are multiples of it
constexpr int64_t kTilesAWorker = 8;              // enough to even out the tail
constexpr int64_t kMaxParts = 32;
constexpr int64_t kPartBytes = 4 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool fits(const KernelRow& row, const char* op, const char* pass, const DepthwiseProblem& p, std::string* why_not) {
  if (std::string(row.op) != op || std::string(row.pass) != pass || row.dtype != p.dtype ||
      row.out_dtype != p.out_dtype || row.layout != p.layout) {
    return false;
  }
  const auto mismatch = [&](int32_t kernel, int64_t have_kernel, int32_t stride, int64_t have_stride, int64_t dilation) {
    return (kernel != 0 && (kernel != have_kernel || dilation != 1)) || (stride != 0 && stride != have_stride);
  };
  if (mismatch(row.kernel_h, p.kernel_h, row.stride_h, p.stride_h, p.dilation_h) ||
      mismatch(row.kernel_w, p.kernel_w, row.stride_w, p.stride_w, p.dilation_w)) {
    *why_not += std::string(" ") + row.name + "(filter " + std::to_string(row.kernel_h) + "x" +
                std::to_string(row.kernel_w) + ", stride " + std::to_string(row.stride_h) + "x" +
                std::to_string(row.stride_w) + ")";
    return false;
  }
  return true;
}

const KernelRow* choose(const IsaKernels& isa, const char* op, const char* pass, const DepthwiseProblem& p) {
  std::string nearest;
  for (int32_t i = 0; i < isa.table.count; ++i) {
    if (fits(isa.table.rows[i], op, pass, p, &nearest)) return &isa.table.rows[i];
  }
  throw std::runtime_error(std::string(op) + ": no " + pass + " kernel for " + dtype_name(p.dtype) + " " +
                           layout_name(p.layout) + "; nearest:" + (nearest.empty() ? " none" : nearest));
}

int64_t lanes_of(const DepthwiseProblem& p, const IsaKernels& isa) {
  return isa.table.vector_bytes / accumulate_size(p.dtype);
}

// Output rows whose staged input stays in half of L1, but enough of them that halo rows are at most a third.
int64_t staged_rows(const DepthwiseProblem& p, const Machine& machine) {
  const int64_t padded_w = (p.out_w - 1) * p.stride_w + std::max<int64_t>(p.kernel_w - 1, 0) * p.dilation_w + 1;
  const int64_t row_bytes = std::max<int64_t>(padded_w, 1) * accumulate_size(p.dtype) * p.depth;
  const int64_t halo = std::max<int64_t>(p.kernel_h - 1, 0) * p.dilation_h;
  const int64_t in_cache = (machine.l1_bytes / 2 / row_bytes - halo) / p.stride_h;
  const int64_t rows = std::max({in_cache, 2 * kRowTile, ceil_div(2 * halo, p.stride_h)});
  return std::min(ceil_div(rows, kRowTile) * kRowTile, p.out_h);
}

int64_t workers_for(int64_t elements, int64_t tiles, const Machine& machine) {
  return std::max<int64_t>(1, std::min({machine.threads, tiles, elements / kMinElementsAWorker}));
}

std::string describe(const KernelRow& row) {
  if (row.kernel_h == 0 && row.kernel_w == 0) return "general kernel, any filter, stride and dilation";
  return "specialised for filter " + (row.kernel_h ? std::to_string(row.kernel_h) : std::string("any")) + "x" +
         (row.kernel_w ? std::to_string(row.kernel_w) : std::string("any"));
}

}  // namespace

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
int64_t accumulate_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
const char* dtype_name(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}
const char* layout_name(Layout layout) { return layout == Layout::kNHWC ? "channels_last" : "NCHW"; }

Plan plan_forward(const DepthwiseProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  plan.row = choose(isa, "depthwise_conv2d", "forward", p);
  const int64_t elements = p.batch * p.channels * p.out_h * p.out_w;
  if (p.layout == Layout::kNHWC) {
    plan.rows_per_tile =
        std::clamp<int64_t>(p.batch * p.out_h / (kTilesAWorker * machine.threads), 1, std::max<int64_t>(p.out_h, 1));
  } else {
    plan.rows_per_tile = std::max<int64_t>(staged_rows(p, machine), 1);
  }
  plan.tiles = p.batch * ceil_div(p.out_h, plan.rows_per_tile) * (p.layout == Layout::kNCHW ? p.channels : 1);
  plan.workers = workers_for(elements * std::max<int64_t>(p.depth, 1), plan.tiles, machine);
  plan.scratch_bytes = isa.forward_scratch(p, plan.rows_per_tile, lanes_of(p, isa)) * accumulate_size(p.dtype);
  const int64_t taps = p.kernel_h * p.kernel_w * p.depth;
  plan.bytes = element_size(p.dtype) * (p.batch * p.channels * p.depth * p.in_h * p.in_w + p.channels * taps) +
               element_size(p.out_dtype) * elements;
  plan.flops = 2 * elements * taps;
  plan.reason = describe(*plan.row);
  return plan;
}

Plan plan_backward_weight(const DepthwiseProblem& p, const IsaKernels& isa, const Machine& machine) {
  Plan plan;
  plan.row = choose(isa, "depthwise_conv2d", "backward_weight", p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t elements = p.batch * p.channels * p.out_h * p.out_w;
  // The parts must not depend on the threads: the order of the sums does.
  if (p.layout == Layout::kNHWC) {
    const int64_t affordable = kPartBytes / std::max<int64_t>(taps * p.channels * accumulate_size(p.dtype), 1);
    plan.parts = std::clamp<int64_t>(std::min(affordable, p.batch * p.out_h / 4), 1, kMaxParts);
    plan.tiles = plan.parts;
  } else {
    plan.parts = std::clamp<int64_t>(std::min(ceil_div(4 * kMaxParts, p.channels), p.batch), 1, kMaxParts);
    plan.tiles = plan.parts * p.channels;
    // The staged tile also bounds the length of one f32 sum, so it is sized by a fixed L1, not this machine's.
    plan.rows_per_tile = std::max<int64_t>(staged_rows(p, {32 << 10, 0, 1}), 1);
  }
  plan.workers = workers_for(elements, plan.tiles, machine);
  plan.scratch_bytes = isa.backward_weight_scratch(p, plan.rows_per_tile, lanes_of(p, isa)) * accumulate_size(p.dtype);
  plan.bytes = element_size(p.dtype) * (p.batch * p.channels * p.in_h * p.in_w + elements + p.channels * taps);
  plan.flops = 2 * elements * taps;
  plan.reason = "partial sums over " + std::to_string(plan.parts) + " fixed parts, added in order";
  return plan;
}

SeparablePlan plan_separable(const DepthwiseProblem& problem, int64_t out_channels, const IsaKernels& isa,
                             const Machine& machine) {
  SeparablePlan plan;
  Plan& whole = plan.whole;
  whole.row = choose(isa, "separable_conv2d", "forward", problem);
  const int64_t unit = accumulate_size(problem.dtype);
  plan.panel = problem.dtype == DType::kFloat64 ? isa.table.panel_doubles : isa.table.panel_floats;
  // As many rows as keep the depthwise tile in a quarter of L2, fewer where the threads would starve.
  const int64_t row_bytes = std::max<int64_t>(problem.out_w * problem.channels * unit, 1);
  const int64_t in_cache = std::max<int64_t>(machine.l2_bytes / 4 / row_bytes, 1);
  const int64_t fair = ceil_div(problem.batch * problem.out_h, kTilesAWorker * machine.threads);
  const int64_t enough_pixels = ceil_div(4 * plan.panel, std::max<int64_t>(problem.out_w, 1));
  const int64_t starving = ceil_div(problem.batch * problem.out_h, machine.threads);
  whole.rows_per_tile =
      std::clamp<int64_t>(std::min(in_cache, std::max(fair, std::min(enough_pixels, starving))), 1, std::max<int64_t>(problem.out_h, 1));
  whole.tiles = problem.batch * ceil_div(problem.out_h, whole.rows_per_tile);

  DepthwiseProblem tile = problem;
  tile.batch = 1;
  tile.out_h = std::min(whole.rows_per_tile, problem.out_h);
  tile.out_dtype = problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  plan.depthwise = plan_forward(tile, isa, {machine.l1_bytes, machine.l2_bytes, 1});

  const int64_t pixels = whole.rows_per_tile * problem.out_w;
  const int64_t out_pixels = problem.batch * problem.out_h * problem.out_w;
  whole.workers = workers_for(out_pixels * out_channels * problem.channels / 16, whole.tiles, machine);
  plan.depthwise.scratch_bytes = ceil_div(plan.depthwise.scratch_bytes, 64) * 64;
  whole.scratch_bytes =
      plan.depthwise.scratch_bytes + isa.separable_scratch(problem.channels, pixels, plan.panel) * unit;
  whole.flops = 2 * out_pixels * problem.channels * (problem.kernel_h * problem.kernel_w + out_channels);
  whole.bytes = element_size(problem.dtype) * (problem.batch * problem.channels * problem.in_h * problem.in_w +
                                               out_pixels * out_channels + problem.channels * out_channels);
  whole.reason = std::to_string(whole.rows_per_tile) + " rows a tile; depthwise stage: " + plan.depthwise.reason;
  return plan;
}

}  // namespace dwconv
