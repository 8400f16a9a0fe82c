#include "cuda/kernels/depthwise_backward/depthwise_backward_rows.cuh"
#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_any.cuh"
#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_large.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NHWC_WEIGHT
#include "cuda/kernels.inc"
};

KernelGroup nhwc_weight_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
