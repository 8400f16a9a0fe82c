// The rows of kernels.inc as data. Each of the kernels_*.cu files expands one group, so that they compile side by side.
#pragma once

#include "cuda/kernels/args.h"

namespace dwconv::cuda {

struct KernelRow {
  const char* name;
  const char* op;
  const char* pass;
  DType dtype;
  Layout layout;
  int32_t filter, stride;
  int32_t tensor;   // cores: 0 none, 1 a warp's mma.sync, 2 a warpgroup's wgmma
  int32_t aligned;  // only for tensors whose runs of so many bytes, of channels or of columns, lie on multiples of it; 0: for all
  int32_t first_arch, last_arch;
  const void* kernel;  // what the launcher starts: on a GPU the __global__ function, in the emulator a function of the arguments
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

#if defined(__CUDACC__)
#define DWCONV_ENTRY(Args, ...) reinterpret_cast<const void*>(&__VA_ARGS__)
#elif defined(DWCONV_EMULATOR)
#define DWCONV_ENTRY(Args, ...) reinterpret_cast<const void*>(&dwconv::cuda::emulator::call<Args, &__VA_ARGS__>)
#endif
#define DWCONV_KERNEL_ROW(name, op, pass, dtype, layout, filter, stride, tensor, aligned, first_arch, last_arch, Args, ...) \
  {#name,  #op,    #pass,   DType::dtype, Layout::layout, filter,                                                           \
   stride, tensor, aligned, first_arch,   last_arch,      DWCONV_ENTRY(Args, __VA_ARGS__)},
