#include "cuda/kernels/kernel_table.h"
#include "cuda/kernels/separable/separable_forward.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_SEPARABLE
#include "cuda/kernels.inc"
};

KernelGroup separable_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
