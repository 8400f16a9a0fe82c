// What several files and instruction sets call of the float32 and float64 kernels: compiled once, in the set DWCONV_CORES, whose
// vectors are as wide. NCHW's transposed planes and staged 16-bit elements run through them.
#pragma once

#include "../../problem.h"
#include "../tiles.h"

#if !defined(DWCONV_CORES)
#define DWCONV_CORES DWCONV_ISA
#endif

namespace dwconv::DWCONV_CORES {

// depthwise_forward_nhwc.h
template <class T, int kKernel, int kStride>
void depthwise_forward_nhwc(const DepthwiseArgs& args, void* scratch, Tiles tiles);

// depthwise_backward_weight_nhwc.h
template <class T, int kKernel, int kStride, class A>
void accumulate_rows(const DepthwiseProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, int64_t pitch, A* partial,
                     A* partial_bias);

}  // namespace dwconv::DWCONV_CORES

namespace dwconv::DWCONV_ISA {
namespace cores = dwconv::DWCONV_CORES;
}
