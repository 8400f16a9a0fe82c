// Vectors in part, and lanes of two: the first lanes of a row's end, lanes whose bit is set, shifts across vectors.
#pragma once

#include "cpu/kernels/simd.h"

namespace dwconv::DWCONV_ISA {

DWCONV_INLINE int lanes_left(int64_t left, int lanes) { return left < lanes ? static_cast<int>(left) : lanes; }

// ---- the first `lanes` lanes, 1 <= lanes <= kLanes; absent lanes load as zero and are not touched -----------------------

#if DWCONV_INTRINSICS == 64
DWCONV_INLINE Vec<float> load_lanes(const float* p, int lanes) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1u), p);
}
DWCONV_INLINE Vec<double> load_lanes(const double* p, int lanes) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes) - 1u), p);
}
template <class T>
DWCONV_INLINE Vec<float> load_lanes(const T* p, int lanes) {
  return widen((U16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes) - 1u), p), T{});
}
DWCONV_INLINE void store_lanes(float* p, Vec<float> v, int lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes) - 1u), (__m512)v);
}
DWCONV_INLINE void store_lanes(double* p, Vec<double> v, int lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << lanes) - 1u), (__m512d)v);
}
template <class T>
DWCONV_INLINE void store_lanes(T* p, Vec<float> v, int lanes) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << lanes) - 1u), (__m256i)narrow(v, T{}));
}
#else
// Out of line: the loops in each of a register tile's places would be most of what the compiler has to translate.
template <class T>
DWCONV_NOINLINE auto load_part(const T* p, int lanes) {
  T buffer[kLanes<typename AccumulateType<T>::type>] = {};
  for (int i = 0; i < lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T, class V>
DWCONV_NOINLINE void store_part(T* p, V v, int lanes) {
  T buffer[kLanes<typename AccumulateType<T>::type>];
  store(buffer, v);
  for (int i = 0; i < lanes; ++i) p[i] = buffer[i];
}
template <class T>
DWCONV_INLINE auto load_lanes(const T* p, int lanes) {
  if (__builtin_expect(lanes == kLanes<typename AccumulateType<T>::type>, 1)) return load(p);
  return load_part(p, lanes);
}
template <class T, class V>
DWCONV_INLINE void store_lanes(T* p, V v, int lanes) {
  if (__builtin_expect(lanes == kLanes<typename AccumulateType<T>::type>, 1)) return store(p, v);
  store_part(p, v, lanes);
}
#if DWCONV_INTRINSICS == 32
DWCONV_INLINE __m256i lane_mask(int lanes) {
  alignas(32) static const int32_t ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones_then_zeros + 8 - lanes));
}
DWCONV_INLINE Vec<float> load_lanes(const float* p, int lanes) { return (Vec<float>)_mm256_maskload_ps(p, lane_mask(lanes)); }
// A masked store is tens of micro-operations on AMD's Zen 2 and 3; most that come here are whole.
DWCONV_INLINE void store_lanes(float* p, Vec<float> v, int lanes) {
  if (__builtin_expect(lanes == 8, 1)) return store(p, v);
  _mm256_maskstore_ps(p, lane_mask(lanes), (__m256)v);
}
#endif
#endif

// Whole vectors where kWhole, else the first `lanes`.
template <bool kWhole, class T>
DWCONV_INLINE auto load_some(const T* p, int lanes) {
  if constexpr (kWhole) {
    return load(p);
  } else {
    return load_lanes(p, lanes);
  }
}
template <bool kWhole, class T, class V>
DWCONV_INLINE void store_some(T* p, V v, int lanes) {
  if constexpr (kWhole) {
    store(p, v);
  } else {
    store_lanes(p, v, lanes);
  }
}

// ---- lanes whose bit is set --------------------------------------------------------------------------------------------

// in_register: what the compiler would otherwise read from memory again wherever it is used.
#if DWCONV_INTRINSICS == 64
using LaneMask = __mmask16;
template <class V>
DWCONV_INLINE V in_register(V v) {
  asm("" : "+v"(v));
  return v;
}
#else
using LaneMask = uint32_t;
template <class V>
DWCONV_INLINE V in_register(V v) {
  return v;
}
#endif

// load_masked: the others are zero, their memory is not touched. store_masked: they are not written. add_masked: sum + a * b;
// they keep their sum, whatever a and b hold there. keep_lanes: the others become zero.
#if DWCONV_INTRINSICS == 64
DWCONV_INLINE Vec<float> load_masked(const float* p, LaneMask lanes) { return (Vec<float>)_mm512_maskz_loadu_ps(lanes, p); }
DWCONV_INLINE Vec<double> load_masked(const double* p, LaneMask lanes) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p);
}
template <class T>
DWCONV_INLINE Vec<float> load_masked(const T* p, LaneMask lanes) {
  return widen((U16)_mm256_maskz_loadu_epi16(lanes, p), T{});
}
DWCONV_INLINE void store_masked(float* p, Vec<float> v, LaneMask lanes) { _mm512_mask_storeu_ps(p, lanes, (__m512)v); }
DWCONV_INLINE void store_masked(double* p, Vec<double> v, LaneMask lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), (__m512d)v);
}
template <class T>
DWCONV_INLINE void store_masked(T* p, Vec<float> v, LaneMask lanes) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)narrow(v, T{}));
}
DWCONV_INLINE Vec<float> add_masked(Vec<float> sum, Vec<float> a, Vec<float> b, LaneMask lanes) {
  return (Vec<float>)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, lanes);
}
DWCONV_INLINE Vec<double> add_masked(Vec<double> sum, Vec<double> a, Vec<double> b, LaneMask lanes) {
  return (Vec<double>)_mm512_mask3_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum, static_cast<__mmask8>(lanes));
}
DWCONV_INLINE Vec<float> keep_lanes(Vec<float> v, LaneMask lanes) { return (Vec<float>)_mm512_maskz_mov_ps(lanes, (__m512)v); }
DWCONV_INLINE Vec<double> keep_lanes(Vec<double> v, LaneMask lanes) {
  return (Vec<double>)_mm512_maskz_mov_pd(static_cast<__mmask8>(lanes), (__m512d)v);
}
#else
template <class T>
DWCONV_NOINLINE auto load_masked(const T* p, LaneMask lanes) {
  constexpr int n = kLanes<typename AccumulateType<T>::type>;
  T buffer[n] = {};
  for (int i = 0; i < n; ++i) {
    if ((lanes >> i) & 1) buffer[i] = p[i];
  }
  return load(buffer);
}
template <class T, class V>
DWCONV_NOINLINE void store_masked(T* p, V v, LaneMask lanes) {
  constexpr int n = kLanes<typename AccumulateType<T>::type>;
  T buffer[n];
  store(buffer, v);
  for (int i = 0; i < n; ++i) {
    if ((lanes >> i) & 1) p[i] = buffer[i];
  }
}
template <class V>
DWCONV_INLINE V add_masked(V sum, V a, V b, LaneMask lanes) {
  const V all = sum + a * b;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(sum[0])); ++i) {
    if ((lanes >> i) & 1) sum[i] = all[i];
  }
  return sum;
}
template <class V>
DWCONV_INLINE V keep_lanes(V v, LaneMask lanes) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) {
    if (!((lanes >> i) & 1)) v[i] = 0;
  }
  return v;
}
#endif

// ---- lanes of two vectors, one after the other ------------------------------------------------------------------------

// Lane l is lane kFirst + kStep * l of the two.
template <int kFirst, int kStep>
struct EveryLane {
  static constexpr int lane(int l) { return kFirst + kStep * l; }
};
template <int kFirst, int kStep, class V>
DWCONV_INLINE V lanes_of(V low, V high) {
  return shuffle<EveryLane<kFirst, kStep>>(low, high);
}

// Lanes kShift and up of `low`, then the first of `high`.
template <int kShift, class V>
DWCONV_INLINE V shift_in(V low, V high) {
#if DWCONV_INTRINSICS == 64
  if constexpr (kShift == 0) return low;
  if constexpr (sizeof(low[0]) == 4) return (V)_mm512_alignr_epi32((__m512i)high, (__m512i)low, kShift);
  return (V)_mm512_alignr_epi64((__m512i)high, (__m512i)low, kShift & 7);
#else
  return lanes_of<kShift, 1>(low, high);
#endif
}

// 2 * kLanes elements from p on: those at even places, and those at odd ones.
template <class T, class V>
DWCONV_INLINE void load_halves(const T* p, V& even, V& odd) {
  const V low = load(p), high = load(p + sizeof(V) / sizeof(low[0]));
  even = lanes_of<0, 2>(low, high);
  odd = lanes_of<1, 2>(low, high);
}
DWCONV_INLINE void load_halves(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  U32 pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  even = (Vec<float>)(pairs << 16);
  odd = (Vec<float>)(pairs & 0xffff0000u);
}

// Of the even places those whose bit is set in the first mask, of the odd ones in the second; no other is touched. For a tensor's
// ends, where it is seldom needed.
template <class T, class V>
DWCONV_NOINLINE void load_halves_masked(const T* p, LaneMask even_lanes, LaneMask odd_lanes, V& even, V& odd) {
  constexpr int kCount = static_cast<int>(sizeof(V) / sizeof(even[0]));
  T pairs[2 * kCount] = {};
  for (int l = 0; l < kCount; ++l) {
    if ((even_lanes >> l) & 1) pairs[2 * l] = p[2 * l];
    if ((odd_lanes >> l) & 1) pairs[2 * l + 1] = p[2 * l + 1];
  }
  load_halves(pairs, even, odd);
}

}  // namespace dwconv::DWCONV_ISA
