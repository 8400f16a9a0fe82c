#include "kernel_table.h"
#include "kernels/depthwise_any.cuh"
#include "kernels/depthwise_large.cuh"
#include "kernels/depthwise_rows.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NHWC
#include "kernels.inc"
};

KernelGroup nhwc_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
