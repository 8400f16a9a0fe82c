// From a problem and a GPU to kernels, tiles and launches: pure functions, no CUDA, no torch.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/plan_facts.h"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

// The facts of a GPU that decide tiles.
struct Gpu {
  int32_t arch = 90;  // 10 * major + minor
  int32_t sm_count = 132;
  int64_t shared_per_block = 227 << 10;
  int64_t shared_per_sm = 228 << 10;
  int64_t l2_bytes = 50 << 20;
  double bytes_per_second = 3.0e12;
  double clock = 1.7e9;  // Hz

  bool operator==(const Gpu&) const = default;
};

struct Launch {
  const KernelRow* row = nullptr;
  int64_t blocks = 0;
  int32_t threads = 0;
  int64_t shared_bytes = 0;
  int32_t blocks_per_sm = 1;  // that its registers hold
};

struct LaunchPlan : PlanFacts {
  Launch launch;
  double seconds = 0;  // by the cost model, for comparing plans only
};

// What an op wants done. Alignment is a fact of the tensors' addresses and strides.
struct Request {
  DepthwiseProblem problem;
  int64_t multiplier = 1;
  // Bytes of the runs, up to 16, of which the channels (channels_last) or the rows (NCHW) of input and output are made, and on
  // multiples of which they lie: a power of two.
  int32_t aligned = 0;
  bool allow_tf32 = false;
};

// forward, and backward_input as args.h says. Fills all of args but the pointers and `flipped`.
LaunchPlan plan_depthwise(Pass pass, const Request& request, const Gpu& gpu, DepthwiseTileArgs* args);

// First stage of the weight gradient, and the second, where there are several parts, of so many weights and biases.
LaunchPlan plan_backward_weight(const Request& request, const Gpu& gpu, BackwardWeightTileArgs* args);
// Both gradients in one launch, the input's as a forward pass of grad_output. No row where they are better apart.
LaunchPlan plan_backward(const Request& to_input, const Request& to_weight, const Gpu& gpu, BackwardTileArgs* args);
LaunchPlan plan_sum_parts(DType dtype, int64_t weights, int64_t biases, int32_t parts, const Gpu& gpu, SumPartsArgs* args);

LaunchPlan plan_activation(DType dtype, int64_t count, const Gpu& gpu);
LaunchPlan plan_transpose(const DepthwiseProblem& problem, const Gpu& gpu, TransposeArgs* args);  // of its output

// The fused block, or the depthwise and the pointwise convolution one after the other where that is expected to be faster.
struct SeparablePlan : PlanFacts {
  bool fused = true;
  LaunchPlan depthwise;  // where not fused
  DepthwiseTileArgs depthwise_args;
  LaunchPlan transpose;  // in NCHW
  TransposeArgs transpose_args;
  LaunchPlan block;  // fused, or the pointwise convolution
  SeparableBlockArgs block_args;
};
struct SeparableAlignment {
  bool input = false, middle = false, output = false, weight = false;
  int32_t rows = 0;  // NCHW: as Request::aligned, of the input and of the depthwise kernel's output

  bool operator==(const SeparableAlignment&) const = default;
};
SeparablePlan plan_separable(const Request& request, int64_t out_channels, const SeparableAlignment& alignment, const Gpu& gpu);

// Every kernel; and, for tests, one that is used wherever it can be (null: none), and whether blocks are fused.
const std::vector<const KernelRow*>& kernel_table();
const KernelRow*& forced_row();
enum class Fusion { kByCost, kAlways, kNever };
Fusion& forced_fusion();
// For measuring the cost model: the tile of this rank among those of a problem, cheapest first; the last where there are fewer.
int32_t& forced_rank();

// --- shared by the plan's files ------------------------------------------------------------------------------------------

// The candidate of the forced rank, of those offered.
template <class Candidate>
class Ranking {
 public:
  void offer(const Candidate& candidate) {
    if (forced_rank() > 0 || kept_.empty()) {
      kept_.push_back(candidate);
    } else if (candidate.seconds < kept_.front().seconds) {
      kept_.front() = candidate;
    }
  }
  const Candidate* chosen() {
    if (kept_.empty()) return nullptr;
    std::stable_sort(kept_.begin(), kept_.end(), [](const auto& a, const auto& b) { return a.seconds < b.seconds; });
    return &kept_[std::min<size_t>(forced_rank(), kept_.size() - 1)];
  }

 private:
  std::vector<Candidate> kept_;
};

// The kernel of a pass that has one for each dtype: the forced one, else the first for this GPU.
const KernelRow* row_of(Pass pass, DType dtype, const Gpu& gpu);

// The longest run, up to 16 bytes, of which all these lengths are made: a power of two.
inline int32_t whole_runs(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (int64_t each : bytes) all |= each;
  return static_cast<int32_t>(all & -all);
}

// Why a row cannot take a problem, or null.
const char* misfit(const KernelRow& row, Op op, Pass pass, const DepthwiseProblem& p, int64_t multiplier, const Gpu& gpu);

// The time of a launch whose blocks each move and compute the given amounts: the GPU's bandwidth and arithmetic, or an
// SM's share of them where there are too few blocks.
struct BlockCost {
  double bytes;  // between the block and L2
  double flops;
  double flop_rate;     // of an SM, per second
  double total_bytes;   // of all blocks, from memory: what several blocks read comes from L2 after the first
  double waits = 1;     // of a block for memory, one after the other
  bool direct = false;  // global memory to registers: what is on its way depends on the number of threads
  double width = 1;     // of a thread's work, in that of two channels: one of four keeps an SM as busy as two of two
};
constexpr double kLaunchSeconds = 1.5e-6;  // to start a kernel
double launch_seconds(const Launch& launch, const BlockCost& cost, const Gpu& gpu);
double scalar_rate(DType dtype, const Gpu& gpu);  // flops of an SM
double tensor_rate(DType dtype, const Gpu& gpu);

}  // namespace dwconv::cuda
