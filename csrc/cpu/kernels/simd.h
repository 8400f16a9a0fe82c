// The small vector type all CPU kernels are written in.
//
// One source serves every instruction set: GCC's and Clang's vector extension supplies arithmetic, comparison and
// selection at any width, and the compiler contracts a * b + c into FMA. Only what the extension cannot say well is written
// per instruction set: float16 conversion, and in simd_lanes.h masked loads and stores.
//
// Included by each file of isa/, after its target pragma, with these defined:
//   DWCONV_ISA              namespace and name (baseline, avx2, avx512, avx512_bf16, amx, neon, neon_bf16)
//   DWCONV_VECTOR_BYTES     16, 32 or 64
//   DWCONV_BASELINE, DWCONV_NEON
//   DWCONV_BFLOAT16_PAIRS   where it has AVX512_BF16 or NEON's BF16; DWCONV_AMX where it has AMX-BF16 too
#pragma once

#include <stdint.h>
#include <string.h>

#if DWCONV_VECTOR_BYTES == 16 || DWCONV_VECTOR_BYTES > DWCONV_INTRINSIC_BYTES
#define DWCONV_INTRINSICS 0
#else
#define DWCONV_INTRINSICS DWCONV_VECTOR_BYTES
#include <immintrin.h>
#endif
#if defined(DWCONV_NEON)
#include <arm_neon.h>
#endif
// Which register tiles of sums, taps and inputs go by.
#if DWCONV_VECTOR_BYTES == 64 || defined(DWCONV_NEON)
#define DWCONV_VECTOR_REGISTERS 32
#else
#define DWCONV_VECTOR_REGISTERS 16
#endif

#include "cpu/kernels/scalar_types.h"

#define DWCONV_INLINE inline __attribute__((always_inline))
#define DWCONV_NOINLINE __attribute__((noinline))
#define DWCONV_UNROLL _Pragma("GCC unroll 64")
#define DWCONV_UNROLL_4 _Pragma("GCC unroll 4")

namespace dwconv::DWCONV_ISA {

inline constexpr int64_t kCacheLine = 64;  // bytes
#if defined(DWCONV_BASELINE)
inline constexpr bool kBaseline = true;
#else
inline constexpr bool kBaseline = false;
#endif

// Prefetches the lines of memory from `begin` to `end`, which will be written.
DWCONV_INLINE void prefetch_for_write(const void* begin, const void* end) {
  for (const char* at = static_cast<const char*>(begin); at < end; at += kCacheLine) __builtin_prefetch(at, 1);
}

// Rows at equal distances in an unrolled loop: seven are within reach of one base by the address forms [base + {1, 2, 4} * p1],
// [base + {1, 2} * p3], [base + p5]; a pointer a row would not fit into the general registers. The empty asm keeps the compiler
// from making those pointers.
struct RowSteps {
  explicit DWCONV_INLINE RowSteps(int64_t bytes) : p1(bytes), p3(3 * bytes), p5(5 * bytes) {
    asm("" : "+r"(p1), "+r"(p3), "+r"(p5));
  }
  // 0 <= row < 7
  template <class T>
  DWCONV_INLINE const T* row(const T* base, int row) const {
    const int64_t bytes = row == 0 ? 0 : row == 3 ? p3 : row == 5 ? p5 : row == 6 ? 2 * p3 : row * p1;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes);
  }
  int64_t p1, p3, p5;
};

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  static constexpr int kLanes = DWCONV_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(DWCONV_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(DWCONV_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  static constexpr int kLanes = DWCONV_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(DWCONV_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(DWCONV_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
inline constexpr int kLanes = VecOf<A>::kLanes;

typedef uint32_t U32 __attribute__((vector_size(DWCONV_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(DWCONV_VECTOR_BYTES / 2)));

template <class A>
DWCONV_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // x - 0 is x, -0 included, and folds away; 0 + x would not
}

// Lane l of the result is lane Pick::lane(l) of the two vectors, one after the other.
#if defined(__clang__)
template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct ListOf : ListOf<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct ListOf<0, kLane...> {
  using type = LaneList<kLane...>;
};
template <class Pick, class V, int... kLane>
DWCONV_INLINE V shuffle_listed(V low, V high, LaneList<kLane...>) {
  return __builtin_shufflevector(low, high, Pick::lane(kLane)...);
}
template <class Pick, class V>
DWCONV_INLINE V shuffle(V low, V high) {
  return shuffle_listed<Pick>(low, high, typename ListOf<static_cast<int>(sizeof(V) / sizeof(low[0]))>::type{});
}
#else
template <class Pick, class Index, int kCount>
struct LaneIndices {
  Index index[kCount] = {};
  constexpr LaneIndices() {
    for (int l = 0; l < kCount; ++l) index[l] = Pick::lane(l);
  }
};
template <class Pick, class V>
DWCONV_INLINE V shuffle(V low, V high) {
  using Indices = decltype(low < high);
  constexpr LaneIndices<Pick, decltype(Indices{}[0] + 0), static_cast<int>(sizeof(V) / sizeof(low[0]))> kIndices;
  Indices indices;
  __builtin_memcpy(&indices, kIndices.index, sizeof indices);
  return __builtin_shuffle(low, high, indices);
}
#endif

// The smaller or larger of x and limit; x where it is NaN. (The compiler's selection takes three instructions for that.)
#if DWCONV_INTRINSICS == 64
DWCONV_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x);
}
DWCONV_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)x);
}
#elif DWCONV_INTRINSICS == 32
DWCONV_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
}
DWCONV_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)x);
}
#elif defined(DWCONV_NEON)
DWCONV_INLINE Vec<float> at_most(Vec<float> x, float limit) { return (Vec<float>)vminq_f32((float32x4_t)x, vdupq_n_f32(limit)); }
DWCONV_INLINE Vec<float> at_least(Vec<float> x, float limit) { return (Vec<float>)vmaxq_f32((float32x4_t)x, vdupq_n_f32(limit)); }
#else
DWCONV_INLINE Vec<float> at_most(Vec<float> x, float limit) { return x > limit ? broadcast(limit) : x; }
DWCONV_INLINE Vec<float> at_least(Vec<float> x, float limit) { return x < limit ? broadcast(limit) : x; }
#endif
DWCONV_INLINE Vec<double> at_most(Vec<double> x, double limit) { return x > limit ? broadcast(limit) : x; }
DWCONV_INLINE Vec<double> at_least(Vec<double> x, double limit) { return x < limit ? broadcast(limit) : x; }

// ---- whole vectors -------------------------------------------------------------------------------------------------

// A bfloat16 is the upper half of a float32: one permutation, where an extension and a shift are two.
#if DWCONV_INTRINSICS == 64
DWCONV_INLINE Vec<float> widen(U16 raw, BFloat16) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr Words kUpper = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)kUpper, _mm512_castsi256_si512((__m256i)raw));
}
#elif DWCONV_INTRINSICS == 32
DWCONV_INLINE Vec<float> widen(U16 raw, BFloat16) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  constexpr uint8_t kZero = 0x80;
  constexpr Bytes kUpper = {kZero, kZero, 0, 1, kZero, kZero, 2,  3,  kZero, kZero, 4,  5,  kZero, kZero, 6,  7,
                            kZero, kZero, 8, 9, kZero, kZero, 10, 11, kZero, kZero, 12, 13, kZero, kZero, 14, 15};
  return (Vec<float>)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)raw), (__m256i)kUpper);
}
#elif defined(DWCONV_NEON)
DWCONV_INLINE Vec<float> widen(U16 raw, BFloat16) { return (Vec<float>)vshll_n_u16((uint16x4_t)raw, 16); }
#else
DWCONV_INLINE Vec<float> widen(U16 raw, BFloat16) {
  const U32 bits = __builtin_convertvector(raw, U32) << 16;
  return (Vec<float>)bits;
}
#endif

#if DWCONV_INTRINSICS == 64 && defined(DWCONV_BFLOAT16_PAIRS)
DWCONV_INLINE U16 narrow(Vec<float> v, BFloat16) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
#elif defined(DWCONV_NEON) && defined(DWCONV_BFLOAT16_PAIRS)
DWCONV_INLINE U16 narrow(Vec<float> v, BFloat16) { return (U16)vcvt_bf16_f32((float32x4_t)v); }
#elif defined(DWCONV_NEON)
DWCONV_INLINE U16 narrow(Vec<float> v, BFloat16) {  // the upper halves of a sum are one instruction
  const uint32x4_t bits = (uint32x4_t)v, odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint16x4_t is_number = vmovn_u32(vceqq_f32((float32x4_t)v, (float32x4_t)v));
  return (U16)vbsl_u16(is_number, rounded, vdup_n_u16(0x7fc0));
}
#else
DWCONV_INLINE U16 narrow(Vec<float> v, BFloat16) {
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 result = (v != v) ? U32{} + 0x7fc0u : rounded;
  return __builtin_convertvector(result, U16);
}
#endif

// sum + the products of the pairs' low values + those of their high values.
#if DWCONV_INTRINSICS == 64 && defined(DWCONV_BFLOAT16_PAIRS)
DWCONV_INLINE Vec<float> add_products(Vec<float> sum, U32 a, U32 b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(DWCONV_NEON) && defined(DWCONV_BFLOAT16_PAIRS)
DWCONV_INLINE Vec<float> add_products(Vec<float> sum, U32 a, U32 b) {
  return (Vec<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#else
DWCONV_INLINE Vec<float> add_products(Vec<float> sum, U32 a, U32 b) {
  sum += (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
  return sum + (Vec<float>)(a & 0xffff0000u) * (Vec<float>)(b & 0xffff0000u);
}
#endif

#if DWCONV_INTRINSICS == 64
DWCONV_INLINE Vec<float> widen(U16 raw, Float16) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(-1), (__m256i)raw);  // the plain one warns in GCC 12
}
DWCONV_INLINE U16 narrow(Vec<float> v, Float16) {
  return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif DWCONV_INTRINSICS == 32
DWCONV_INLINE Vec<float> widen(U16 raw, Float16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)raw); }
DWCONV_INLINE U16 narrow(Vec<float> v, Float16) {
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(DWCONV_NEON)
DWCONV_INLINE Vec<float> widen(U16 raw, Float16) { return (Vec<float>)vcvt_f32_f16((float16x4_t)raw); }
DWCONV_INLINE U16 narrow(Vec<float> v, Float16) { return (U16)vcvt_f16_f32((float32x4_t)v); }
#else
DWCONV_INLINE Vec<float> widen(U16 raw, Float16) {  // see to_accumulate(Float16)
  const U32 bits = __builtin_convertvector(raw, U32);
  const U32 magnitude = (bits & 0x7fffu) << 13;
  const U32 scaled = (U32)((Vec<float>)magnitude * 0x1p112f);
  const U32 special = magnitude | 0x7f800000u;
  const U32 value = ((bits & 0x7c00u) == 0x7c00u) ? special : scaled;
  return (Vec<float>)(value | ((bits & 0x8000u) << 16));
}
DWCONV_INLINE U16 narrow(Vec<float> v, Float16) {  // see from_accumulate(float, Float16*)
  const U32 bits = (U32)v;
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const U32 subnormal = (U32)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  U32 half = (magnitude < 0x38800000u) ? subnormal : normal;
  half = (magnitude >= 0x47800000u) ? U32{} + 0x7c00u : half;
  half = (magnitude > 0x7f800000u) ? U32{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), U16);
}
#endif

DWCONV_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DWCONV_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
DWCONV_INLINE Vec<float> load(const T* p) {
  U16 raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return widen(raw, T{});
}

DWCONV_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
DWCONV_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T>
DWCONV_INLINE void store(T* p, Vec<float> v) {
  const U16 raw = narrow(v, T{});
  __builtin_memcpy(p, &raw, sizeof raw);
}

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// Halves to halves, a fixed order: a sum has the same bits wherever it is taken.
template <class A, int kCount>
DWCONV_INLINE A sum_halves(const A* values) {
  if constexpr (kCount == 2) {
    return values[0] + values[1];
  } else {
    typedef A Half __attribute__((vector_size(kCount / 2 * sizeof(A))));
    Half low, high;
    __builtin_memcpy(&low, values, sizeof low);
    __builtin_memcpy(&high, values + kCount / 2, sizeof high);
    A sums[kCount / 2];
    const Half sum = low + high;
    __builtin_memcpy(sums, &sum, sizeof sum);
    return sum_halves<A, kCount / 2>(sums);
  }
}
template <class A>
DWCONV_INLINE A sum_all(Vec<A> v) {
  A values[kLanes<A>];
  store(values, v);
  return sum_halves<A, kLanes<A>>(values);
}
DWCONV_INLINE float sum_lanes(Vec<float> v) { return sum_all<float>(v); }
DWCONV_INLINE double sum_lanes(Vec<double> v) { return sum_all<double>(v); }

}  // namespace dwconv::DWCONV_ISA
