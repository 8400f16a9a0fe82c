// Built for sm_90a alone (tools/hopper.py), where wgmma exists.
#include "cuda/kernels/separable/separable_forward.cuh"
#include "cuda/kernels/kernel_table.h"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_HOPPER
#include "cuda/kernels.inc"
};

KernelGroup hopper_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
