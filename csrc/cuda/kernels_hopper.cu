// Built for sm_90a alone (setup.py), where wgmma exists.
#include "kernel_table.h"
#include "kernels/separable_forward.cuh"

namespace dwconv::cuda {

static const KernelRow kRows[] = {
#define DWCONV_GROUP_HOPPER
#include "kernels.inc"
};

KernelGroup hopper_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace dwconv::cuda
