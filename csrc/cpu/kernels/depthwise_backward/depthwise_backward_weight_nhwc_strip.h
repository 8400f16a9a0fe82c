// Depthwise weight gradient, channels last, 3x3 filters: strips of output rows, with the channels innermost
// (depthwise_backward_weight_nhwc.h has the formula and goes over the images).
//
// A tile is kStripRows output rows by kWideColumns columns or one less. It goes through the channels a vector at a time:
// grad_output and input are loaded once, and the nine sums, kept in memory, cost an addition each for kStripRows * 9 FMAs a
// column:
//
//   2 rows by 8 columns: 16 + 40 loads and 9 sums for 144 FMAs in 9 chains
//
// All pixels are read along their channels, so that prefetchers follow, and each line once a tile. With the columns innermost a
// vector of channels came back to its lines for three rows of outputs, and L1 had lost them.
//
// The sums of kStripOutputs outputs are added up apart, so that a running sum stays short (kMaxSum), kStripChannels channels
// at a time, so that they stay in L1.
#pragma once

#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kStripRows =
    DWCONV_VECTOR_REGISTERS == 32 ? 2 : 1;  // 9 sums, a tile's grad_output and an input in registers
inline constexpr int64_t kStripOutputs = 448, kStripChannels = 256;

// A tile as add_strip_vector sees it, at its first channel. `valid`, `valid_rows`: which input columns and rows the image has.
template <class T>
struct StripTile {
  const T *in, *grad;
  int64_t in_row, in_step, grad_row, grad_step;
  uint32_t valid_rows, valid;
  int columns;
};

// One vector of channels of a tile: sums[tap * pitch] += its products. The first kLeft and the last kRight columns of the input
// are in the padding; where kEdge, columns and lanes are looked at one by one.
template <class T, class A, int kStride, int kRows, int kColumns, bool kEdge, int kLeft, int kRight>
DWCONV_INLINE void add_strip_vector(const StripTile<T> tile, int64_t c, int lanes, A* sums, int64_t pitch) {
  Vec<A> g[kRows][kColumns], acc[3][3] = {};
  DWCONV_UNROLL
  for (int j = 0; j < kRows; ++j) {
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      const T* const at = tile.grad + c + j * tile.grad_row + t * tile.grad_step;
      g[j][t] = !kEdge || t < tile.columns ? load_some<!kEdge>(at, lanes) : Vec<A>{};
    }
  }
  DWCONV_UNROLL
  for (int i = 0; i < (kRows - 1) * kStride + 3; ++i) {
    if (!((tile.valid_rows >> i) & 1)) continue;
    DWCONV_UNROLL
    for (int k = kLeft; k < (kColumns - 1) * kStride + 3 - kRight; ++k) {
      const T* at = tile.in + c + i * tile.in_row + k * tile.in_step;
      if (kEdge) at = (tile.valid >> k) & 1 ? at : reinterpret_cast<const T*>(kZeros);
      const Vec<A> x = load_some<!kEdge>(at, lanes);
      DWCONV_UNROLL
      for (int j = 0; j < kRows; ++j) {
        const int r = i - j * kStride;
        if (r < 0 || r > 2) continue;
        DWCONV_UNROLL
        for (int t = 0; t < kColumns; ++t) {
          const int s = k - t * kStride;
          if (s >= 0 && s < 3 && (!kEdge || t < tile.columns)) acc[r][s] += x * g[j][t];  // no zero meets a NaN
        }
      }
    }
  }
  DWCONV_UNROLL
  for (int i = 0; i < 9; ++i) {
    A* const at = sums + c + i * pitch;
    store_some<!kEdge>(at, load_some<!kEdge>(at, lanes) + acc[i / 3][i % 3], lanes);
  }
}

// sums[tap * pitch + c] += the share of output rows [y, y + kRows) by columns [x, x + kColumns).
// Not inlined: with all of its kinds in one function the compiler runs out of registers, and it takes up to a fifth longer.
template <class T, class A, int kStride, int kRows, int kColumns>
DWCONV_NOINLINE void add_strip_tile(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t x, A* sums,
                                    int64_t pitch) {
  constexpr int kCount = (kColumns - 1) * kStride + 3, kInputRows = (kRows - 1) * kStride + 3, kVec = kLanes<A>;
  constexpr uint32_t kAll = (1u << kCount) - 1u, kFirst = 1u, kLast = 1u << (kCount - 1);
  const int64_t first_h = y * kStride - p.pad_h, first_w = x * kStride - p.pad_w;
  const StripTile<T> tile = {
      image + first_h * p.in_stride_h + first_w * p.in_stride_w,
      grad + y * p.out_stride_h + x * p.out_stride_w,
      p.in_stride_h,
      p.in_stride_w,
      p.out_stride_h,
      p.out_stride_w,
      valid_columns(first_h, 1, p.in_h, kInputRows),
      valid_columns(first_w, 1, p.in_w, kCount),
      lanes_left(p.out_w - x, kColumns),
  };
  if (tile.valid_rows == 0 || tile.valid == 0) return;
  const auto add = [=]<bool kEdge, int kLeft, int kRight>(int64_t begin, int64_t end) {  // copies: no store can change them
    for (int64_t c = begin; c < end; c += kVec) {
      add_strip_vector<T, A, kStride, kRows, kColumns, kEdge, kLeft, kRight>(tile, c, lanes_left(end - c, kVec), sums, pitch);
    }
  };
  int64_t whole = tile.columns == kColumns ? p.channels - p.channels % kVec : 0;
  if (tile.valid == kAll) {
    add.template operator()<false, 0, 0>(0, whole);
  } else if (tile.valid == (kAll & ~kFirst)) {
    add.template operator()<false, 1, 0>(0, whole);
  } else if (tile.valid == (kAll & ~kLast)) {
    add.template operator()<false, 0, 1>(0, whole);
  } else if (tile.valid == (kAll & ~kFirst & ~kLast)) {
    add.template operator()<false, 1, 1>(0, whole);
  } else {
    whole = 0;
  }
  add.template operator()<true, 0, 0>(whole, p.channels);
}

template <class T, class A, int kStride, int kRows>
void add_strip(const CpuProblem& p, const T* image, const T* grad, int64_t y, A* sums, int64_t pitch) {
  constexpr int kNarrow = kWideColumns - 1;
  const int64_t wide = wide_columns(p.out_w, kWideColumns, kNarrow);
  int64_t x = 0;
  for (; x < wide; x += kWideColumns) add_strip_tile<T, A, kStride, kRows, kWideColumns>(p, image, grad, y, x, sums, pitch);
  for (; x < p.out_w; x += kNarrow) add_strip_tile<T, A, kStride, kRows, kNarrow>(p, image, grad, y, x, sums, pitch);
}

// Output rows whose sums are added up apart.
DWCONV_INLINE int64_t strip_rows(const CpuProblem& p) {
  const int64_t rows = kStripOutputs / p.out_w / kStripRows * kStripRows;
  return rows > kStripRows ? rows : kStripRows;
}

// sums[c] += grad_output of some rows.
template <class T, class A>
void add_strip_bias(const CpuProblem& p, const T* grad, int64_t y, int64_t rows, A* sums) {
  constexpr int kVec = kLanes<A>, kTogether = 8;
  const auto add = [&]<int kColumns>(const T* at) {
    for (int64_t c = 0; c < p.channels; c += kVec) {
      const int lanes = lanes_left(p.channels - c, kVec);
      Vec<A> sum = load_lanes(at + c, lanes);
      DWCONV_UNROLL
      for (int t = 1; t < kColumns; ++t) sum += load_lanes(at + c + t * p.out_stride_w, lanes);
      store(sums + c, load(sums + c) + sum);
    }
  };
  for (int64_t row = y; row < y + rows; ++row) {
    const T* const at = grad + row * p.out_stride_h;
    int64_t x = 0;
    for (; x + kTogether <= p.out_w; x += kTogether) add.template operator()<kTogether>(at + x * p.out_stride_w);
    for (; x < p.out_w; ++x) add.template operator()<1>(at + x * p.out_stride_w);
  }
}

template <class A>
DWCONV_INLINE void add_to_partial(const A* sums, int64_t channels, A* partial) {
  constexpr int kVec = kLanes<A>;
  int64_t c = 0;
  for (; c + kVec <= channels; c += kVec) store(partial + c, load(partial + c) + load(sums + c));
  if (c == channels) return;
  const int lanes = static_cast<int>(channels - c);
  store_lanes(partial + c, load_lanes(partial + c, lanes) + load(sums + c), lanes);
}

template <class A>
constexpr int64_t kStripPitch = kStripChannels + kCacheLine / static_cast<int64_t>(sizeof(A));  // the sums in sets of their own
template <class A>
constexpr int64_t kStripScratch = 10 * kStripPitch<A> * static_cast<int64_t>(sizeof(A));  // bytes: of the taps and the bias

// partial[tap * channels + c] and partial_bias[c] += the share of output rows [y, y + rows), at most strip_rows; either may be
// null. sums: kStripScratch bytes.
template <class T, class A, int kStride>
void accumulate_strip(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, A* partial, A* partial_bias,
                      A* sums) {
  constexpr int64_t kPitch = kStripPitch<A>;
  A* const bias_sums = sums + 9 * kPitch;
  CpuProblem q = p;
  for (int64_t c = 0; c < p.channels; c += kStripChannels) {
    q.channels = p.channels - c < kStripChannels ? p.channels - c : kStripChannels;
    for (int row = 0; row < 10; ++row) {
      for (int64_t i = 0; i < q.channels; i += kLanes<A>) store(sums + row * kPitch + i, Vec<A>{});
    }
    if (partial_bias != nullptr) {
      add_strip_bias<T, A>(q, grad + c, y, rows, bias_sums);
      add_to_partial<A>(bias_sums, q.channels, partial_bias + c);
    }
    if (partial == nullptr) continue;
    const int64_t end = y + rows;
    int64_t row = y;
    for (; row + kStripRows <= end; row += kStripRows) {
      add_strip<T, A, kStride, kStripRows>(q, image + c, grad + c, row, sums, kPitch);
    }
    if constexpr (kStripRows > 1) {
      for (; row < end; ++row) add_strip<T, A, kStride, 1>(q, image + c, grad + c, row, sums, kPitch);
    }
    for (int tap = 0; tap < 9; ++tap) add_to_partial<A>(sums + tap * kPitch, q.channels, partial + tap * p.channels + c);
  }
}

}  // namespace dwconv::DWCONV_ISA
