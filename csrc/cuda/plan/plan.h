// From a problem and a GPU to kernels, tiles and launches: pure functions, no CUDA, no torch.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/plan_facts.h"
#include "common/tuner.h"
#include "cuda/kernels/depthwise_norm/args.h"
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

enum class Fusion { kByCost, kAlways, kNever };
// Who computes: the kernel of the plan or, where that was measured to be faster, torch's own convolution.
enum class Source { kHeuristics, kOurs, kTorch };

// What a plan has to use where it can: a candidate of the tuner's, or what tests and measurements force.
struct Forced {
  const KernelRow* row = nullptr;
  Fusion fusion = Fusion::kByCost;
  int32_t rank = 0;  // of the tile among those of a problem, by the cost model, cheapest first; the last where there are fewer
  Source source = Source::kHeuristics;

  bool operator==(const Forced&) const = default;
};
Forced& forced();  // of all requests

// What an op wants done. Alignment is a fact of the tensors' addresses and strides.
struct Request {
  DepthwiseProblem problem;
  int64_t multiplier = 1;
  // Bytes of the runs, up to 16, of which the channels (channels_last) or the rows (NCHW) of input and output are made, and on
  // multiples of which they lie: a power of two.
  int32_t aligned = 0;
  bool allow_tf32 = false;
  Forced forced = dwconv::cuda::forced();
};

// forward, and backward_input as args.h says. Fills all of args but the pointers and `flipped`.
LaunchPlan plan_depthwise(Pass pass, const Request& request, const Gpu& gpu, DepthwiseTileArgs* args);

// First stage of the weight gradient, and the second, where there are several parts, of so many weights and biases.
LaunchPlan plan_backward_weight(const Request& request, const Gpu& gpu, BackwardWeightTileArgs* args);
// Both gradients in one launch, the input's as a forward pass of grad_output. No row where they are better apart.
LaunchPlan plan_backward(const Request& to_input, const Request& to_weight, const Gpu& gpu, BackwardTileArgs* args);
LaunchPlan plan_sum_parts(DType dtype, int64_t weights, int64_t biases, int32_t parts, const Gpu& gpu, SumPartsArgs* args);

// One step of a stream (StepArgs).
LaunchPlan plan_step(DType dtype, int64_t outputs, int64_t taps, int64_t dilation);
LaunchPlan plan_activation(DType dtype, int64_t count, const Gpu& gpu);
// Of `pixels` an image.
LaunchPlan plan_transpose(const DepthwiseProblem& problem, int64_t pixels, const Gpu& gpu, TransposeArgs* args);

// The fused block, or the depthwise and the pointwise convolution one after the other where that is expected to be faster.
struct SeparablePlan : PlanFacts {
  bool fused = true;
  LaunchPlan depthwise;  // where not fused
  DepthwiseTileArgs depthwise_args;
  LaunchPlan transpose;  // in NCHW
  TransposeArgs transpose_args;
  LaunchPlan block;  // fused, or the pointwise convolution
  SeparableBlockArgs block_args;
  double seconds = 0;
};
struct SeparableAlignment {
  bool input = false, middle = false, output = false, weight = false;
  int32_t rows = 0;  // NCHW: as Request::aligned, of the input and of the depthwise kernel's output

  bool operator==(const SeparableAlignment&) const = default;
};
SeparablePlan plan_separable(const Request& request, int64_t out_channels, const SeparableAlignment& alignment, const Gpu& gpu);

// BatchNorm and activation of dense tensors, of which dtype, layout, batch, channels, in_h and in_w count; forward or backward.
// aligned: as Request::aligned, of all of them.
struct BatchNormPlan : PlanFacts {
  LaunchPlan sums, join, values;
  BatchNormArgs sums_args, values_args;  // all but pointers, eps, count and activation
};
// kJoinStatistics or kJoinGradSums, in the accumulation type; kJoinMeans.
LaunchPlan plan_join_parts(Pass pass, DType dtype, int64_t channels, const Gpu& gpu);
BatchNormPlan plan_batch_norm(Pass pass, const DepthwiseProblem& problem, int32_t aligned, const Gpu& gpu);

// Backward of a depthwise convolution and the BatchNorm and activation after it, both layers' tensors dense, in the problem's
// layout: in one pass, or BatchNorm's second sweep and then the two gradients of the convolution.
struct DepthwiseNormPlan : PlanFacts {
  bool fused = false;
  LaunchPlan launch;
  DepthwiseNormArgs args;  // all but what norm has of tensors, eps, count and activation, and pointers
};
DepthwiseNormPlan plan_depthwise_norm(const Request& request, const Gpu& gpu);

// The convolution's forward pass, whose tiles leave the statistics of so many parts, of the batch or of each image, or 0 where
// these are a sweep of their own.
struct DepthwiseStatisticsPlan : LaunchPlan {
  int32_t parts = 0;
  DepthwiseStatisticsArgs args;
};
DepthwiseStatisticsPlan plan_depthwise_statistics(const Request& request, bool by_image, const Gpu& gpu);

// A pointwise convolution: in NCHW its input's values are put in channels_last first, hence the problem is one without stride
// whose input's strides are that of channels_last, taken as far apart as the stride says, and whose in_h and in_w are the whole
// input's.
struct PointwisePlan : LaunchPlan {
  LaunchPlan transpose;  // in NCHW
  TransposeArgs transpose_args;
  SeparableBlockArgs args;
};
PointwisePlan plan_pointwise(const Request& request, int64_t out_channels, const SeparableAlignment& alignment, const Gpu& gpu);

const std::vector<const KernelRow*>& kernel_table();

// What the tuner times (common/tuner.h), the plan's own choice first, torch's convolution last where `torch` says that it may be.
// Of a depthwise convolution: the plan's kernel with its two cheapest tiles, and the next kernel that fits. Of a block: fused and
// not, with the two cheapest tiles of each. Of a convolution with BatchNorm: together and apart.
struct Work {
  Op op = Op::kDepthwise;
  Pass pass = Pass::kForward;         // of the convolution
  Pass kernel_pass = Pass::kForward;  // also where the input gradient is the forward pass of grad_output
  Request request;
  Extras extras;
  bool torch = false;
  int64_t out_channels = 0;  // of a block
  SeparableAlignment alignment = {};
};
// The input gradient of the forward problem in a request: at stride and dilation 1 the forward pass of grad_output with the
// flipped filter and padding K - 1 - P. All but the strides of tensors.
void turn_to_input(Work* work);
std::vector<NamedWay<Forced>> ways(const Work& work, const Gpu& gpu);
Tuner::Subject subject(const Work& work, const Gpu& gpu);

// A range of problems that torch's own convolution was measured to compute faster (faster_in_torch.cpp).
struct FasterInTorch;
// Null where nothing is known. kBackward: both gradients; its request is the weight's.
const FasterInTorch* faster_in_torch(const Work& work, const Gpu& gpu);
std::string describe(const FasterInTorch& range);

// --- shared by the plan's files ------------------------------------------------------------------------------------------

// The candidate of a rank, of those offered.
template <class Candidate>
class Ranking {
 public:
  explicit Ranking(int32_t rank) : rank_(static_cast<size_t>(rank)) {}
  void offer(const Candidate& candidate) {
    if (rank_ > 0 || kept_.empty()) {
      kept_.push_back(candidate);
    } else if (candidate.seconds < kept_.front().seconds) {
      kept_.front() = candidate;
    }
  }
  const Candidate* chosen() {
    if (kept_.empty()) return nullptr;
    std::stable_sort(kept_.begin(), kept_.end(), [](const auto& a, const auto& b) { return a.seconds < b.seconds; });
    return &kept_[std::min(rank_, kept_.size() - 1)];
  }

 private:
  size_t rank_;
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

// The kernels of a matrix product to choose from: for each kind of matrix unit the first row that fits, the multiply-adds only
// where there is no other; or the forced row alone.
std::vector<const KernelRow*> matrix_kernels(Op op, Pass pass, const Request& request, const Gpu& gpu);

// Input rows or columns that tiles of so many outputs read along an axis, summed over all of them: of very many in proportion to
// the first, so that a plan of any image takes no longer.
double reads(int64_t in, int64_t out, int64_t tile, int64_t reach, int64_t stride, int64_t pad);
constexpr int64_t kTilesLookedAt = 4096;

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
