// Planes to lanes and back, in registers.
//
// Four columns at a time, so that a width of 7 or 49 wastes nothing: block b of a vector (four lanes, 128 bits of float)
// gathers four columns of plane 4 b + i; four such vectors, i = 0..3, are transposed four by four within their blocks and
// are then four columns of all planes:
//
//   vector i   | plane i, columns 0-3 | plane 4 + i, columns 0-3 | ...        i = 0..3
//   column j   | planes 0-3           | planes 4-7               | ...        j = 0..3
//
// 8 shuffles for 4 kVec elements; the gathering and scattering is done by the load and store ports. float64, for which no
// speed is promised, goes element by element.
#pragma once

#include "cpu/kernels/simd.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kBlock = 4;
inline constexpr int kBlocks = kLanes<float> / kBlock;
typedef uint64_t Blocks16 __attribute__((vector_size(8 * kBlocks)));  // kBlocks blocks of four 16-bit values

DWCONV_INLINE uint64_t load_64(const void* p) {
  uint64_t bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

// Block b is from[4 b + i][offset .. offset + 4).
DWCONV_INLINE Vec<float> load_blocks(const float* const* from, int i, int64_t offset) {
#if DWCONV_INTRINSICS == 64
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from[i] + offset));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from[4 + i] + offset), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(from[8 + i] + offset), 2);
  return (Vec<float>)_mm512_insertf32x4(v, _mm_loadu_ps(from[12 + i] + offset), 3);
#elif DWCONV_INTRINSICS == 32
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(from[i] + offset));
  return (Vec<float>)_mm256_insertf128_ps(v, _mm_loadu_ps(from[4 + i] + offset), 1);
#else
  Vec<float> v;
  for (int b = 0; b < kBlocks; ++b) memcpy(reinterpret_cast<char*>(&v) + 16 * b, from[4 * b + i] + offset, 16);
  return v;
#endif
}
template <class T>
DWCONV_INLINE Vec<float> load_blocks(const T* const* from, int i, int64_t offset) {
  Blocks16 raw = {};
  DWCONV_UNROLL
  for (int b = 0; b < kBlocks; ++b) raw[b] = load_64(from[4 * b + i] + offset);
  return widen((U16)raw, T{});
}

// The way back; where not kAll, for the planes below `lanes` only.
template <bool kAll>
DWCONV_INLINE void store_blocks(float* const* to, int i, int64_t offset, Vec<float> v, int lanes) {
#if DWCONV_INTRINSICS > 0
#if DWCONV_INTRINSICS == 64
  const __m128 block[kBlocks] = {_mm512_castps512_ps128((__m512)v), _mm512_extractf32x4_ps((__m512)v, 1),
                                 _mm512_extractf32x4_ps((__m512)v, 2), _mm512_extractf32x4_ps((__m512)v, 3)};
#else
  const __m128 block[kBlocks] = {_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)};
#endif
  DWCONV_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    if (kAll || 4 * b + i < lanes) _mm_storeu_ps(to[4 * b + i] + offset, block[b]);
  }
#else
  for (int b = 0; b < kBlocks; ++b) {
    if (kAll || 4 * b + i < lanes) memcpy(to[4 * b + i] + offset, reinterpret_cast<const char*>(&v) + 16 * b, 16);
  }
#endif
}
template <bool kAll, class T>
DWCONV_INLINE void store_blocks(T* const* to, int i, int64_t offset, Vec<float> v, int lanes) {
  const Blocks16 raw = (Blocks16)narrow(v, T{});
  DWCONV_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    const uint64_t bits = raw[b];
    if (kAll || 4 * b + i < lanes) memcpy(to[4 * b + i] + offset, &bits, sizeof bits);
  }
}

// {a[p], a[q], b[p], b[q]} or {a[p], b[p], a[q], b[q]} of each block.
template <int kP, int kQ, bool kInterleave>
struct BlockLanes {
  static constexpr int lane(int l) {
    const int i = l % kBlock, second = kInterleave ? i % 2 : i / 2, q = kInterleave ? i / 2 : i % 2;
    return second * kLanes<float> + l - i + (q ? kQ : kP);
  }
};
template <int kP, int kQ, bool kInterleave>
DWCONV_INLINE Vec<float> pick(Vec<float> a, Vec<float> b) {
  return shuffle<BlockLanes<kP, kQ, kInterleave>>(a, b);
}

DWCONV_INLINE void transpose_blocks(Vec<float> (&v)[kBlock]) {
  const Vec<float> low01 = pick<0, 1, true>(v[0], v[1]), high01 = pick<2, 3, true>(v[0], v[1]);
  const Vec<float> low23 = pick<0, 1, true>(v[2], v[3]), high23 = pick<2, 3, true>(v[2], v[3]);
  v[0] = pick<0, 1, false>(low01, low23);
  v[1] = pick<2, 3, false>(low01, low23);
  v[2] = pick<0, 1, false>(high01, high23);
  v[3] = pick<2, 3, false>(high01, high23);
}

// to[i * kVec + l] = from[l][offset + i], i < count. from has kVec planes, whole vectors of them.
template <class T, class A>
void piece_to_lanes(const T* const* from, int64_t offset, int64_t count, A* to) {
  constexpr int kVec = kLanes<A>;
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    for (; i + kBlock <= count; i += kBlock) {
      Vec<float> v[kBlock];
      DWCONV_UNROLL
      for (int j = 0; j < kBlock; ++j) v[j] = load_blocks(from, j, offset + i);
      transpose_blocks(v);
      DWCONV_UNROLL
      for (int j = 0; j < kBlock; ++j) store(to + (i + j) * kVec, v[j]);
    }
  }
  for (; i < count; ++i) {
    for (int l = 0; l < kVec; ++l) to[i * kVec + l] = to_accumulate(from[l][offset + i]);
  }
}

// `rows` rows of `columns` elements of each plane, row_stride apart, into a channels-last image of kVec channels. Lanes past
// `lanes` repeat the first plane.
template <class T, class A>
DWCONV_INLINE void planes_to_lanes(const T** from, int64_t offset, int lanes, int64_t rows, int64_t columns, int64_t row_stride,
                                   A* to) {
  for (int l = lanes; l < kLanes<A>; ++l) from[l] = from[0];
  if (row_stride == columns) columns *= rows, rows = 1;
  for (int64_t y = 0; y < rows; ++y) {
    piece_to_lanes<T, A>(from, offset + y * row_stride, columns, to + y * columns * kLanes<A>);
  }
}

// Whole blocks of columns of lanes_to_piece, for step 1; returns how many columns were done.
template <bool kAll, class O>
DWCONV_INLINE int64_t blocks_to_planes(const float* from, int64_t pitch, int lanes, int64_t count, int64_t offset, O* const* to,
                                       const O* const* add) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    Vec<float> v[kBlock];
    DWCONV_UNROLL
    for (int j = 0; j < kBlock; ++j) v[j] = load(from + (i + j) * pitch);
    transpose_blocks(v);
    DWCONV_UNROLL
    for (int j = 0; j < kBlock; ++j) {
      if (add != nullptr) v[j] += load_blocks(add, j, offset + i);
      store_blocks<kAll>(to, j, offset + i, v[j], lanes);
    }
  }
  return i;
}

// to[l][offset + i * step] = from[i * pitch + l] (+ add[l][...]), i < count, l < lanes. add has kVec planes where it has any.
template <class O, class A>
void lanes_to_piece(const A* from, int64_t pitch, int lanes, int64_t count, int64_t offset, int64_t step, O* const* to,
                    const O* const* add = nullptr) {
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (step == 1) {
      i = lanes == kLanes<A> ? blocks_to_planes<true>(from, pitch, lanes, count, offset, to, add)
                             : blocks_to_planes<false>(from, pitch, lanes, count, offset, to, add);
    }
  }
  for (; i < count; ++i) {
    for (int l = 0; l < lanes; ++l) {
      A value = from[i * pitch + l];
      if (add != nullptr) value += to_accumulate(add[l][offset + i * step]);
      from_accumulate(value, to[l] + offset + i * step);
    }
  }
}

// The way back; columns of the planes are column_stride apart.
template <class O, class A>
DWCONV_INLINE void lanes_to_planes(const A* from, int lanes, int64_t rows, int64_t columns, int64_t row_stride,
                                   int64_t column_stride, O* const* to) {
  if (column_stride == 1 && row_stride == columns) columns *= rows, rows = 1;
  for (int64_t y = 0; y < rows; ++y) {
    lanes_to_piece<O, A>(from + y * columns * kLanes<A>, kLanes<A>, lanes, columns, y * row_stride, column_stride, to);
  }
}

}  // namespace dwconv::DWCONV_ISA
