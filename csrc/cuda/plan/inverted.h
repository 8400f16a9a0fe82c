// The plan of an inverted residual: one kernel, or a pointwise convolution and a fused block.
#pragma once

#include "cuda/kernels/inverted_residual/inverted_args.h"
#include "cuda/plan/plan.h"

namespace dwconv::cuda {

struct InvertedPlan : PlanFacts {
  bool fused = false;
  LaunchPlan block;           // where fused
  InvertedResidualArgs args;  // all but the pointers, the activations and what of the expansion's weights is aligned
};

// The problem is the expanded image's, with the strides of the input that is expanded, of in_channels.
InvertedPlan plan_inverted_residual(const Request& request, int64_t in_channels, int64_t out_channels,
                                    const SeparableAlignment& alignment, const Gpu& gpu);

}  // namespace dwconv::cuda
