// What several files and instruction sets call of one another's kernels, and is compiled once. float32 and float64, through which
// NCHW's transposed planes run, are those of the set DWCONV_CORES, whose vectors are as wide.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tiles.h"

#if !defined(DWCONV_CORES)
#define DWCONV_CORES DWCONV_ISA
#endif

// depthwise_forward_nhwc.h and depthwise_backward_weight_nhwc.h
#define DWCONV_DECLARE_CORES                                                                                                   \
  template <class T, int kKernel, int kStride>                                                                                 \
  void depthwise_forward_nhwc(const DepthwiseArgs& args, void* scratch, Tiles tiles);                                          \
  template <class T, int kKernel, int kStride, class A>                                                                        \
  void accumulate_rows(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, int64_t pitch, A* partial, \
                       A* partial_bias);

namespace dwconv::DWCONV_CORES {
DWCONV_DECLARE_CORES
}
namespace dwconv::DWCONV_ISA {
DWCONV_DECLARE_CORES
namespace cores = dwconv::DWCONV_CORES;

template <class T, int kKernel, int kStride>
DWCONV_INLINE void forward_core(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  if constexpr (sizeof(T) == 2) {
    depthwise_forward_nhwc<T, kKernel, kStride>(args, scratch, tiles);
  } else {
    cores::depthwise_forward_nhwc<T, kKernel, kStride>(args, scratch, tiles);
  }
}
}  // namespace dwconv::DWCONV_ISA
#undef DWCONV_DECLARE_CORES
