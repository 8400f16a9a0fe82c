#include "cuda/kernels/depthwise_step/depthwise_step.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_DEPTHWISE_STEP
#include "cuda/kernels.inc"
};

KernelGroup depthwise_step_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
