// Built for sm_90a alone (tools/hopper.py), where wgmma exists, and launches that begin before the one before them has ended.
#include "cuda/kernels/channels_last_values.cuh"
#include "cuda/kernels/depthwise_backward/sum_parts.cuh"
#include "cuda/kernels/kernel_table.h"
#include "cuda/kernels/separable/separable_forward.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_HOPPER
#include "cuda/kernels.inc"
};

KernelGroup hopper_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
