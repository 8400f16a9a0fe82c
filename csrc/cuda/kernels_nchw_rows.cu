#include "kernel_table.h"
#include "kernels/depthwise_backward_weight_rows_nchw.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NCHW_ROWS
#include "kernels.inc"
};

KernelGroup nchw_rows_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
