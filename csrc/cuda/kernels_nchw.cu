#include "kernel_table.h"
#include "kernels/depthwise_any.cuh"
#include "kernels/depthwise_backward_weight_any.cuh"
#include "kernels/depthwise_backward_weight_large.cuh"
#include "kernels/depthwise_backward_weight_rows_nchw.cuh"
#include "kernels/depthwise_large.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_ROWS_NCHW
#include "kernels.inc"
};

KernelGroup nchw_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
