// What the CUDA kernels share: types, conversions, global accesses, barriers, asynchronous copies, matrix instructions.
// Torch-free. The kernels name nothing of CUDA's own but what target.cuh wraps, so that the very same sources run on whatever
// gives the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "cuda/kernels/args.h"

namespace dwconv::cuda {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// V values that move in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T value[V];
};

constexpr int kChunkBytes = 16;  // of the widest global access, and of an asynchronous copy
template <class T>
constexpr int kChunkValues = kChunkBytes / static_cast<int>(sizeof(T));
constexpr int kWarp = 32;

}  // namespace dwconv::cuda

#include "cuda/kernels/target.cuh"

namespace dwconv::cuda {

DWCONV_DEVICE float to_accumulate(float v) { return v; }
DWCONV_DEVICE double to_accumulate(double v) { return v; }
DWCONV_DEVICE float to_accumulate(__half v) { return __half2float(v); }
DWCONV_DEVICE float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
DWCONV_DEVICE T from_accumulate(accumulate_t<T> v) {
  return v;
}
template <>
DWCONV_DEVICE __half from_accumulate<__half>(float v) {
  return __float2half_rn(v);
}
template <>
DWCONV_DEVICE __nv_bfloat16 from_accumulate<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
DWCONV_DEVICE T zero() {
  return from_accumulate<T>(accumulate_t<T>(0));
}

// One value from memory that the launch only reads.
template <class T>
DWCONV_DEVICE accumulate_t<T> load_one(const T* from) {
  return to_accumulate(load<1>(from).value[0]);
}

template <class T, int V>
DWCONV_DEVICE void widen(const Packed<T, V>& packed, accumulate_t<T> (&to)[V]) {
  const Vector<T, V> vector = unpacked(packed);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_accumulate(vector.value[v]);
}

// A bias, of the accumulation type where it is wide, else of T.
template <class T>
DWCONV_DEVICE accumulate_t<T> load_bias(const void* bias, int64_t channel, bool wide) {
  using A = accumulate_t<T>;
  if (std::is_same_v<T, A> || wide) return load_one(static_cast<const A*>(bias) + channel);
  return load_one(static_cast<const T*>(bias) + channel);
}

// The greater and the lesser of two values: NaN where a is one; b is none.
template <class A>
DWCONV_DEVICE A greater(A a, A b) {
#if defined(__CUDA_ARCH__) && DWCONV_HAS_AMPERE
  if constexpr (std::is_same_v<A, float>) {
    asm("max.NaN.f32 %0, %0, %1;\n" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return a < b ? b : a;
}
template <class A>
DWCONV_DEVICE A lesser(A a, A b) {
#if defined(__CUDA_ARCH__) && DWCONV_HAS_AMPERE
  if constexpr (std::is_same_v<A, float>) {
    asm("min.NaN.f32 %0, %0, %1;\n" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return b < a ? b : a;
}

DWCONV_DEVICE int least(int a, int b) { return a < b ? a : b; }
DWCONV_DEVICE int most(int a, int b) { return a > b ? a : b; }

// n / d for 0 <= n and 0 < d: the device divides numbers of 64 bits in a hundred instructions, of 32 in twenty.
DWCONV_DEVICE int64_t divided(int64_t n, int64_t d) {
  const bool small = ((n | d) >> 32) == 0;
  return small ? static_cast<int64_t>(static_cast<uint32_t>(n) / static_cast<uint32_t>(d)) : n / d;
}
DWCONV_DEVICE int slabs_of(const Tiling& t) { return static_cast<int>(t.slabs); }  // not more than blocks

DWCONV_DEVICE int quotient(int n, const Divisor& d) { return d.quotient(n); }

// Where a block of a channels_last kernel is.
struct TileOfBlock {
  int slab, tile_x, tile_y, n;
};
DWCONV_DEVICE TileOfBlock tile_of_block(const DepthwiseTileArgs& args, int block) {
  const int tile = quotient(block, args.slabs);
  const int line = quotient(tile, args.tiles_w), n = quotient(line, args.tiles_h);
  return {block - tile * args.slabs.divisor, tile - line * args.tiles_w.divisor, line - n * args.tiles_h.divisor, n};
}

}  // namespace dwconv::cuda
