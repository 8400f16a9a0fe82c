// The rows of kernels.inc as data. Each file of kernels/tables/ expands one group, so that they compile side by side.
#pragma once

#include "cuda/kernels/args.h"

namespace dwconv::cuda {

// How a kernel goes about it.
enum class Family : int32_t {
  kTiles = 0,   // a tile is staged in shared memory
  kRows,        // threads walk down rows, without staging
  kLines,       // filters of one row: threads walk along lines, without staging
  kLarge,       // any filter at stride 1, a few taps at a time
  kLargeLines,  // the same, for filters of one row
  kAny,         // anything, from global memory
  kBlock,       // the fused block, or the pointwise convolution alone
  kElements,    // value by value: sums of parts, activations, transpositions, BatchNorm
};
// What multiplies matrices.
enum class Cores : int32_t { kScalar = 0, kWarp, kWarpgroup };  // multiply-adds, a warp's mma.sync, a warpgroup's wgmma

struct KernelRow {
  const char* name;
  Op op;
  Pass pass;
  DType dtype;
  Layout layout;
  int32_t filter, stride;
  Family family;
  Cores cores;
  int32_t aligned;  // only for tensors whose runs of so many bytes, of channels or of columns, lie on multiples of it; 0: for all
  int32_t first_arch, last_arch;
  const void* kernel;  // what the launcher starts: the __global__ function
};

struct KernelGroup {
  const KernelRow* rows;
  int32_t count;
};

KernelGroup lines_kernels();
KernelGroup nhwc_kernels();
KernelGroup nhwc_weight_kernels();
KernelGroup nchw_rows_kernels();
KernelGroup nchw_kernels();
KernelGroup nchw_weight_kernels();
KernelGroup separable_kernels();
KernelGroup batch_norm_kernels();
KernelGroup depthwise_norm_kernels();
KernelGroup depthwise_step_kernels();
KernelGroup inverted_kernels();
KernelGroup hopper_kernels();  // where DWCONV_HOPPER is defined

}  // namespace dwconv::cuda

// DWCONV_ENTRY makes a kernel of what the launcher starts (kernels/target.cuh).
#define DWCONV_KERNEL_ROW(name, op, pass, family, dtype, layout, filter, stride, cores, aligned, first_arch, last_arch, Args, \
                          ...)                                                                                                \
  {#name,                                                                                                                     \
   Op::op,                                                                                                                    \
   Pass::pass,                                                                                                                \
   DType::dtype,                                                                                                              \
   Layout::layout,                                                                                                            \
   filter,                                                                                                                    \
   stride,                                                                                                                    \
   Family::family,                                                                                                            \
   Cores::cores,                                                                                                              \
   aligned,                                                                                                                   \
   first_arch,                                                                                                                \
   last_arch,                                                                                                                 \
   DWCONV_ENTRY(Args, __VA_ARGS__)},
