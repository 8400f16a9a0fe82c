#include "kernel_table.h"
#include "kernels/separable_forward.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_SEPARABLE
#include "kernels.inc"
};

KernelGroup separable_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
