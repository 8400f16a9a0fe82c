#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_any.cuh"
#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_large.cuh"
#include "cuda/kernels/depthwise_backward/sum_parts.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NCHW_WEIGHT
#include "cuda/kernels.inc"
};

KernelGroup nchw_weight_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
