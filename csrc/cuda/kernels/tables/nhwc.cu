#include "cuda/kernels/depthwise_forward/depthwise_any.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_large.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NHWC
#include "cuda/kernels.inc"
};

KernelGroup nhwc_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
