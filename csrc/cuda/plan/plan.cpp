#include "cuda/plan/plan.h"

#include <algorithm>
#include <cmath>

namespace dwconv::cuda {

const std::vector<const KernelRow*>& kernel_table() {
  static const std::vector<const KernelRow*> rows = [] {
    std::vector<const KernelRow*> all;
    const KernelGroup groups[] = {
#if defined(DWCONV_HOPPER)
        hopper_kernels(),
#endif
        lines_kernels(), nhwc_kernels(), nhwc_weight_kernels(),
        // The rows of planes come before the staged kernels, which take what they do not.
        nchw_rows_kernels(), nchw_kernels(), nchw_weight_kernels(), separable_kernels(), batch_norm_kernels(),
        depthwise_norm_kernels(), depthwise_step_kernels(), inverted_kernels()};
    for (const KernelGroup& group : groups) {
      for (int32_t i = 0; i < group.count; ++i) all.push_back(group.rows + i);
    }
    return all;
  }();
  return rows;
}

const KernelRow* row_of(Pass pass, DType dtype, const Gpu& gpu) {
  const auto fits = [&](const KernelRow* row) {
    return row->pass == pass && row->dtype == dtype && gpu.arch >= row->first_arch && gpu.arch <= row->last_arch;
  };
  if (forced().row != nullptr && fits(forced().row)) return forced().row;
  const auto found = std::find_if(kernel_table().begin(), kernel_table().end(), fits);
  return found != kernel_table().end() ? *found : nullptr;
}

LaunchPlan plan_step(DType dtype, int64_t outputs, int64_t taps, int64_t dilation) {
  LaunchPlan plan;
  for (const KernelRow* row : kernel_table()) {
    if (row->op == Op::kDepthwiseStep && row->dtype == dtype) plan.launch.row = row;
  }
  plan.launch.threads = kStepThreads;
  plan.launch.blocks = ceil_div(outputs, kStepThreads);
  plan.bytes = outputs * element_size(dtype) * (2 + 2 * (taps - 1) * dilation);
  plan.flops = outputs * 2 * taps;
  plan.reason = "a thread a channel";
  return plan;
}

Forced& forced() {
  static Forced all;
  return all;
}

const char* misfit(const KernelRow& row, Op op, Pass pass, const DepthwiseProblem& p, int64_t multiplier, const Gpu& gpu) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (row.op != op) return "another op";
  if (row.pass != pass) return "another pass";
  if (row.dtype != p.dtype) return "another dtype";
  if (row.layout != p.layout) return "another layout";
  if (gpu.arch < row.first_arch || gpu.arch > row.last_arch) return "another architecture";
  const bool unit_stride = p.stride_h == 1 && p.stride_w == 1, undilated = p.dilation_h == 1 && p.dilation_w == 1;
  if (row.filter > 0) {
    const bool line = row.family == Family::kLines;
    if (p.kernel_h != (line ? 1 : row.filter) || p.kernel_w != row.filter) return "another filter";
    if (line && (p.pad_h != 0 || p.pad_w < 0 || p.pad_w >= row.filter || p.out_h != p.in_h)) return "another padding";
    if (p.stride_h != row.stride || p.stride_w != row.stride) return "another stride";
    if (!undilated) return "dilated";
  } else if (row.stride == 1 && !(unit_stride && undilated)) {
    return "strided or dilated";
  } else if (row.family == Family::kLargeLines && p.kernel_h != 1) {
    return "several rows";
  }
  const bool any = row.filter == 0 && row.stride == 0;
  if (!any && multiplier > 1) return "a channel multiplier";
  if (row.family == Family::kRows && row.layout == Layout::kNCHW && 2 * p.pad_w + 1 != p.kernel_w) return "another padding";
  if (!any && p.layout == Layout::kNHWC && (p.in_stride_w >= kMost || p.out_stride_w >= kMost)) return "too wide a pixel";
  return nullptr;
}

double reads(int64_t in, int64_t out, int64_t tile, int64_t reach, int64_t stride, int64_t pad) {
  double total = 0;
  const int64_t tiles = ceil_div(out, tile), looked = std::min(tiles, kTilesLookedAt);
  for (int64_t first = 0; first < looked * tile; first += tile) {
    const int64_t begin = std::max<int64_t>(first * stride - pad, 0);
    const int64_t end = std::min((std::min(first + tile, out) - 1) * stride - pad + reach, in);
    total += static_cast<double>(std::max<int64_t>(end - begin, 0));
  }
  return total * static_cast<double>(tiles) / static_cast<double>(looked);
}

double scalar_rate(DType dtype, const Gpu& gpu) {
  const double lanes = gpu.arch < 80 ? 64 : 128;  // float32 multiply-adds a clock
  return 2 * lanes * gpu.clock * (dtype != DType::kFloat64 ? 1.0 : gpu.arch == 80 || gpu.arch == 90 ? 0.5 : 1.0 / 32);
}

// mma.sync reaches about 60 % of a Hopper GPU's wgmma rate.
double tensor_rate(DType dtype, const Gpu& gpu) {
  const double half = gpu.arch == 90 ? 2500 : gpu.arch == 80 || gpu.arch >= 100 ? 2048 : 1024;
  return half * gpu.clock / (dtype == DType::kFloat32 ? 2 : 1);
}

double launch_seconds(const Launch& launch, const BlockCost& cost, const Gpu& gpu) {
  constexpr double kBlockSeconds = 1.2e-6;  // to fill and drain a block
  // L2 feeds an SM at about 1.3 times its share of the memory's bandwidth.
  const double per_sm = 1.3 * gpu.bytes_per_second / gpu.sm_count;
  const int64_t by_shared = gpu.shared_per_sm / (launch.shared_bytes + 1024);
  const int64_t by_threads = 2048 / std::max<int64_t>(launch.threads, 32);
  const double resident =
      static_cast<double>(std::max<int64_t>(std::min<int64_t>({by_shared, by_threads, launch.blocks_per_sm, 32}), 1));
  const double rounds = std::ceil(static_cast<double>(launch.blocks) / gpu.sm_count);
  const double busiest = std::min(resident, rounds);  // blocks on the busiest SM at a time
  // Blocks that share an SM move data for one another while they compute; one alone does one after the other.
  constexpr double kBusyThreads = 512;  // of an SM, to hide the latency of arithmetic and, without staging, of memory
  const double occupancy = std::min(1.0, cost.width * launch.threads * busiest / kBusyThreads);
  const double moves = cost.bytes / per_sm / (cost.direct ? occupancy : 1.0);
  const double computes = cost.flops / (cost.flop_rate * occupancy);
  const double exposed = std::min(moves, computes) / busiest;
  const double busy = rounds * (std::max(moves, computes) + exposed) + std::ceil(rounds / resident) * kBlockSeconds * cost.waits;
  // Nothing here tells some large blocks from more small ones that take as long, but these leave fewer SMs idle.
  constexpr double kIdleSeconds = 4e-6;
  const double idle = std::max(0.0, 1.0 - static_cast<double>(launch.blocks) / gpu.sm_count);
  return kLaunchSeconds + std::max(busy, cost.total_bytes / gpu.bytes_per_second) + kIdleSeconds * idle;
}

}  // namespace dwconv::cuda
