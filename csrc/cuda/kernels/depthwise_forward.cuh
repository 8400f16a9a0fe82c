// Depthwise forward, one thread an output element, both layouts, any filter, stride, dilation and channel multiplier:
//
//   out[n, o, y, x] = bias[o] + sum_{r, s} w[o, r, s] * in[n, o / multiplier, y*stride_h + r*dilation_h - pad_h, ...]
//
// Consecutive threads take consecutive elements of the output (channels in NHWC, columns in NCHW), so that stores and,
// at stride 1, loads coalesce; re-reads of the halo come from L1/L2. Weights are read in their own order [o][r][s].
// The plain kernel: right for every problem, and the reference for specialised ones.
// Traffic: input and output once where L1/L2 hold the filter's rows. The grid strides over the output, any size.
#pragma once

#include "../../problem.h"
#include "device.cuh"

namespace dwconv::cuda {

struct ForwardArgs {
  DepthwiseProblem problem;
  int64_t multiplier;
  int64_t out_elements;
  const void* input;
  const void* weight;
  const void* bias;
  void* output;
};

template <class T, class Index>
__device__ inline typename Accumulate<T>::type forward_element(const ForwardArgs& args, Index n, Index o, Index y, Index x) {
  using A = typename Accumulate<T>::type;
  const DepthwiseProblem& p = args.problem;
  const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + (o / Index(args.multiplier)) * p.in_stride_c;
  const T* const filter = static_cast<const T*>(args.weight) + o * Index(p.kernel_h) * Index(p.kernel_w);
  A sum = args.bias != nullptr ? to_accumulate(static_cast<const T*>(args.bias)[o]) : A(0);
  const int64_t origin_h = int64_t(y) * p.stride_h - p.pad_h;
  const int64_t origin_w = int64_t(x) * p.stride_w - p.pad_w;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    const int64_t row = origin_h + r * p.dilation_h;
    if (row < 0 || row >= p.in_h) continue;
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t column = origin_w + s * p.dilation_w;
      if (column < 0 || column >= p.in_w) continue;
      sum += to_accumulate(filter[r * p.kernel_w + s]) * to_accumulate(image[row * p.in_stride_h + column * p.in_stride_w]);
    }
  }
  return sum;
}

// Index: uint32_t where every element count and offset fits, else uint64_t.
template <class T, class Index>
__global__ void depthwise_forward_nhwc(ForwardArgs args) {
  const DepthwiseProblem& p = args.problem;
  const Index channels = Index(p.channels) * Index(args.multiplier);
  const Index step = Index(gridDim.x) * blockDim.x;
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < Index(args.out_elements); i += step) {
    const Index o = i % channels, pixel = i / channels;
    const Index x = pixel % Index(p.out_w), line = pixel / Index(p.out_w);
    const Index y = line % Index(p.out_h), n = line / Index(p.out_h);
    from_accumulate(forward_element<T, Index>(args, n, o, y, x), static_cast<T*>(args.output) + i);
  }
}

template <class T, class Index>
__global__ void depthwise_forward_nchw(ForwardArgs args) {
  const DepthwiseProblem& p = args.problem;
  const Index channels = Index(p.channels) * Index(args.multiplier);
  const Index step = Index(gridDim.x) * blockDim.x;
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < Index(args.out_elements); i += step) {
    const Index x = i % Index(p.out_w), line = i / Index(p.out_w);
    const Index y = line % Index(p.out_h), plane = line / Index(p.out_h);
    const Index o = plane % channels, n = plane / channels;
    from_accumulate(forward_element<T, Index>(args, n, o, y, x), static_cast<T*>(args.output) + i);
  }
}

}  // namespace dwconv::cuda
