#include "cuda/kernels/inverted_residual/inverted_residual.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_INVERTED
#include "cuda/kernels.inc"
};

KernelGroup inverted_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
