// The rows of kernels.inc as data. Each of the kernels_*.cu files expands one group, so that they compile side by side.
#pragma once

#include "cuda/kernels/args.h"

namespace dwconv::cuda {

struct KernelRow {
  const char* name;
  Op op;
  Pass pass;
  DType dtype;
  Layout layout;
  int32_t filter, stride;
  int32_t tensor;   // cores: 0 none, 1 a warp's mma.sync, 2 a warpgroup's wgmma
  int32_t aligned;  // only for tensors whose runs of so many bytes, of channels or of columns, lie on multiples of it; 0: for all
  int32_t first_arch, last_arch;
  const void* kernel;  // what the launcher starts: the __global__ function
};

struct KernelGroup {
  const KernelRow* rows;
  int32_t count;
};

KernelGroup nhwc_kernels();
KernelGroup nhwc_weight_kernels();
KernelGroup nchw_rows_kernels();
KernelGroup nchw_kernels();
KernelGroup nchw_weight_kernels();
KernelGroup separable_kernels();
KernelGroup hopper_kernels();  // where DWCONV_HOPPER is defined

}  // namespace dwconv::cuda

// DWCONV_ENTRY makes a kernel of what the launcher starts (kernels/target.cuh).
#define DWCONV_KERNEL_ROW(name, op, pass, dtype, layout, filter, stride, tensor, aligned, first_arch, last_arch, Args, ...) \
  {#name,  Op::op, Pass::pass, DType::dtype, Layout::layout, filter,                                                        \
   stride, tensor, aligned,    first_arch,   last_arch,      DWCONV_ENTRY(Args, __VA_ARGS__)},
