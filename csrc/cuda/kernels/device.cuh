// What the CUDA kernels share: accumulation types and conversions. Torch-free.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace dwconv::cuda {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ inline float to_accumulate(float v) { return v; }
__device__ inline double to_accumulate(double v) { return v; }
__device__ inline float to_accumulate(__half v) { return __half2float(v); }
__device__ inline float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void from_accumulate(float v, float* out) { *out = v; }
__device__ inline void from_accumulate(double v, double* out) { *out = v; }
__device__ inline void from_accumulate(float v, __half* out) { *out = __float2half_rn(v); }
__device__ inline void from_accumulate(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }

}  // namespace dwconv::cuda
