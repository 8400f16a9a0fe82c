#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_rows_nchw.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NCHW_ROWS
#include "cuda/kernels.inc"
};

KernelGroup nchw_rows_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
