#include "cuda/kernels/depthwise_norm/depthwise_norm_backward_nchw.cuh"
#include "cuda/kernels/depthwise_norm/depthwise_rows_statistics.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_DEPTHWISE_NORM
#include "cuda/kernels.inc"
};

KernelGroup depthwise_norm_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
