#include "kernel_table.h"
#include "kernels/depthwise_backward_weight_any.cuh"
#include "kernels/depthwise_backward_weight_large.cuh"
#include "kernels/depthwise_backward_weight_rows.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NHWC_WEIGHT
#include "kernels.inc"
};

KernelGroup nhwc_weight_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
