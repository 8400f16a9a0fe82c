// Planes to lanes and back: kVec x kVec transpositions in registers.
#pragma once

#include "simd.h"

namespace dwconv::DWCONV_ISA {

// One stage of the butterfly: rows i and i + kStep exchange the elements whose index has bit kStep set.
template <class V, class Index, int kCount, int kStep>
DWCONV_INLINE void exchange(V (&row)[kCount]) {
  Index low, high;
  for (int j = 0; j < kCount; ++j) {
    low[j] = j & kStep ? j - kStep + kCount : j;
    high[j] = j & kStep ? j + kCount : j + kStep;
  }
  DWCONV_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (i & kStep) continue;
    const V a = row[i], b = row[i + kStep];
    row[i] = __builtin_shuffle(a, b, low);
    row[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

template <class A>
DWCONV_INLINE void transpose(Vec<A> (&row)[kLanes<A>]) {
  typedef typename VecOf<A>::mask Index;
  constexpr int kCount = kLanes<A>;
  if constexpr (kCount > 8) exchange<Vec<A>, Index, kCount, 8>(row);
  if constexpr (kCount > 4) exchange<Vec<A>, Index, kCount, 4>(row);
  if constexpr (kCount > 2) exchange<Vec<A>, Index, kCount, 2>(row);
  exchange<Vec<A>, Index, kCount, 1>(row);
}

// to[i * kVec + l] = from[l][offset + i], i < count; lanes from `lanes` on become zero.
template <class T, class A>
void piece_to_lanes(const T* const* from, int64_t offset, int lanes, int64_t count, A* to) {
  constexpr int kVec = kLanes<A>;
  for (int64_t i = 0; i < count; i += kVec) {
    Vec<A> row[kVec];
    const int columns = lanes_left(count - i, kVec);
    if (lanes == kVec && columns == kVec) {
      DWCONV_UNROLL
      for (int l = 0; l < kVec; ++l) row[l] = load(from[l] + offset + i);
      transpose<A>(row);
      DWCONV_UNROLL
      for (int j = 0; j < kVec; ++j) store(to + (i + j) * kVec, row[j]);
    } else {
      DWCONV_UNROLL
      for (int l = 0; l < kVec; ++l) row[l] = l < lanes ? load_lanes(from[l] + offset + i, columns) : Vec<A>{};
      transpose<A>(row);
      DWCONV_UNROLL
      for (int j = 0; j < kVec; ++j) {
        if (j < columns) store(to + (i + j) * kVec, row[j]);
      }
    }
  }
}

// `rows` rows of `columns` elements of each plane, row_stride apart, into a channels-last image of kVec channels.
template <class T, class A>
DWCONV_INLINE void planes_to_lanes(const T* const* from, int64_t offset, int lanes, int64_t rows, int64_t columns,
                                   int64_t row_stride, A* to) {
  if (row_stride == columns) columns *= rows, rows = 1;
  for (int64_t y = 0; y < rows; ++y) {
    piece_to_lanes<T, A>(from, offset + y * row_stride, lanes, columns, to + y * columns * kLanes<A>);
  }
}

// to[l][offset + i * step] = from[i * pitch + l] (+ add[l][...]), i < count, l < lanes.
template <class O, class A>
void lanes_to_piece(const A* from, int64_t pitch, int lanes, int64_t count, int64_t offset, int64_t step, O* const* to,
                    const O* const* add = nullptr) {
  constexpr int kVec = kLanes<A>;
  if (step != 1) {  // a phase of a strided input gradient
    for (int64_t i = 0; i < count; ++i) {
      for (int l = 0; l < lanes; ++l) from_accumulate(from[i * pitch + l], to[l] + offset + i * step);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kVec) {
    Vec<A> row[kVec];
    const int columns = lanes_left(count - i, kVec);
    if (lanes == kVec && columns == kVec) {
      DWCONV_UNROLL
      for (int j = 0; j < kVec; ++j) row[j] = load(from + (i + j) * pitch);
      transpose<A>(row);
      if (add != nullptr) {
        DWCONV_UNROLL
        for (int l = 0; l < kVec; ++l) row[l] += load(add[l] + offset + i);
      }
      DWCONV_UNROLL
      for (int l = 0; l < kVec; ++l) store(to[l] + offset + i, row[l]);
    } else {
      DWCONV_UNROLL
      for (int j = 0; j < kVec; ++j) row[j] = j < columns ? load(from + (i + j) * pitch) : Vec<A>{};
      transpose<A>(row);
      DWCONV_UNROLL
      for (int l = 0; l < kVec; ++l) {
        if (l >= lanes) continue;
        if (add != nullptr) row[l] += load_lanes(add[l] + offset + i, columns);
        store_lanes(to[l] + offset + i, row[l], columns);
      }
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
