#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_lines.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_lines.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_LINES
#include "cuda/kernels.inc"
};

KernelGroup lines_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
