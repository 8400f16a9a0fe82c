#include "kernel_table.h"
#include "kernels/depthwise_backward_weight_any.cuh"
#include "kernels/depthwise_backward_weight_large.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NCHW_WEIGHT
#include "kernels.inc"
};

KernelGroup nchw_weight_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
