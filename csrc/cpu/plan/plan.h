// The CPU plans: pure functions of the problem and the machine. Nothing is run, allocated or remembered here.
#pragma once

#include "common/plan_facts.h"
#include "common/tuner.h"
#include "cpu/plan/heuristics.h"

namespace dwconv {

struct Plan : PlanFacts {
  const KernelRow* row = nullptr;
  int64_t rows_per_tile = 1;
  int64_t weight_pitch = 0;  // channels of packed weights and bias (DepthwiseArgs)
  int64_t columns = 1;       // tiles side by side: planes or vectors of them, images in channels_last
  int64_t tiles = 0;         // independent pieces of work: columns times tiles of rows
  int64_t parts = 1;         // weight gradient: partial sums, a function of the problem alone
  int64_t workers = 1;
  int64_t scratch_bytes = 0;                                                           // a worker
  bool prefetch_input = false, prefetch_output = false, prefetch_next_output = false;  // CpuProblem's
};

// The first row that fits; std::runtime_error names the rows that came nearest where none does.
Plan plan_forward(const CpuProblem& problem, const IsaKernels& isa, const Machine& machine);
// With a channel multiplier, in channels_last: of the problem over repeated channels, a few rows at a time, so that the repeated
// input stays in L2. rows_per_tile and tiles are those of the pieces.
Plan plan_forward_repeated(const CpuProblem& problem, int64_t multiplier, const IsaKernels& isa, const Machine& machine);
// The input gradient of a strided pass, problem as in BackwardInputArgs. Its row is null where the phases should run one by
// one as forward problems: in NCHW with too few planes to fill a vector.
Plan plan_backward_input(const CpuProblem& problem, const IsaKernels& isa, const Machine& machine);
Plan plan_backward_weight(const CpuProblem& problem, const IsaKernels& isa, const Machine& machine);

// What the tuner times (common/tuner.h) of a pass of the depthwise convolution: the plan's own choice, `chosen`, the other
// families' kernels and torch's convolution. The input gradient has no kernel to choose: chosen is null.
struct Way {
  ForcedRow row = {};  // none: as planned
  bool torch = false;
};
std::vector<NamedWay<Way>> ways(Pass pass, const CpuProblem& problem, const KernelRow* chosen, bool torch, const IsaKernels& isa);
// multiplier: of channels; the problem is the forward pass's, without strides of tensors.
Tuner::Subject subject(Pass pass, const CpuProblem& problem, int64_t multiplier, const Extras& extras, const IsaKernels& isa,
                       const Machine& machine);

// BatchNorm and activation; problem as in BatchNormArgs. In NCHW a tile is a channel, in channels_last one of `parts` ranges of
// pixels.
Plan plan_batch_norm(const CpuProblem& problem, bool backward, const IsaKernels& isa, const Machine& machine);

// Squeeze-and-excitation's stages (squeeze_excitation.h).
struct SqueezePlan {
  Plan means, hidden, gates;
};
SqueezePlan plan_squeeze(const CpuProblem& problem, int64_t squeezed, const IsaKernels& isa, const Machine& machine);

// LayerNorm over channels; problem as in LayerNormArgs.
Plan plan_layer_norm(const CpuProblem& problem, const IsaKernels& isa, const Machine& machine);

// One step of a causal convolution; problem as in StepArgs.
Plan plan_step(const CpuProblem& problem, const IsaKernels& isa, const Machine& machine);

struct SeparablePlan {
  Plan depthwise;      // of the first stage
  Plan whole;          // its row has the format of the pointwise weights
  int64_t splits = 1;  // ranges of output channels
};
SeparablePlan plan_separable(const CpuProblem& problem, int64_t out_channels, const IsaKernels& isa, const Machine& machine);
// A pointwise convolution, on the fused block's kernels without their first stage.
SeparablePlan plan_pointwise(const CpuProblem& problem, int64_t out_channels, const IsaKernels& isa, const Machine& machine);
// An inverted residual as one kernel, a fused block whose tiles make their own input (expanded_rows.h), where the expanded image
// is too large for the caches; not fused, it is a pointwise convolution and a block. The problem is the block's, over the
// expanded image.
struct InvertedPlan {
  bool fused = false;
  SeparablePlan block;
  int64_t scratch_offset = 0, most_pixels = 0, pitch = 0, copy_pitch = 0;  // ExpandArgs's
};
InvertedPlan plan_inverted_residual(const CpuProblem& problem, int64_t in_channels, int64_t out_channels, const IsaKernels& isa,
                                    const Machine& machine);
// A dense convolution by patches of an input of `channels`; the problem's channels are a patch's.
struct PatchPlan {
  SeparablePlan product;
  int64_t scratch_offset = 0, row_pitch = 0;  // PatchArgs's
};
PatchPlan plan_patches(const CpuProblem& problem, int64_t channels, int64_t out_channels, const IsaKernels& isa,
                       const Machine& machine);
PointwiseFormat pointwise_format(const IsaKernels& isa, DType dtype);
BlockFormat block_format(const IsaKernels& isa, DType dtype, const PointwiseFormat& pointwise, int64_t channels,
                         int64_t out_channels, int64_t kernel_h, int64_t kernel_w);

}  // namespace dwconv
