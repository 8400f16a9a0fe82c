#include "kernel_table.h"
#include "kernels/depthwise_any.cuh"
#include "kernels/depthwise_large.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_NCHW
#include "kernels.inc"
};

KernelGroup nchw_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
