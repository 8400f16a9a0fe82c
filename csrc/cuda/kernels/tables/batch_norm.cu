#include "cuda/kernels/batch_norm/batch_norm_values.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_BATCH_NORM
#include "cuda/kernels.inc"
};

KernelGroup batch_norm_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
