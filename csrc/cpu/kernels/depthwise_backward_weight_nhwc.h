// Depthwise weight and bias gradient, channels last:
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y*stride_h + r*dilation_h - pad_h, ...]
//   grad_bias[c]         = sum_{n, y, x} grad_output[n, c, y, x]
//
// Lanes are channels. The sums of kFilterRows filter rows by kTaps taps stay in registers over a block of output rows; per
// kColumns outputs, grad_output is loaded once and each input vector once a filter row,
//
//   filter 3x3, stride 1, 7 columns: 7 + 3 * 9 loads for 63 FMAs in 9 chains
//
// A row of a tile is summed by itself, then added to the block's sums. A block is at most kMaxSum outputs long, then its sums are
// added to the part's partial sums, and the parts are added in order by a second stage: f32 error grows with the block and the
// number of blocks, not with the whole image. Blocks and parts are functions of the problem alone, so the bits do not depend on
// the threads. Tiles: one part, a range of the N * out_h rows. Traffic: grad_output and input once where a block's rows fit in
// L2.
#pragma once

#include "depthwise_forward_nhwc.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int64_t kMaxSum = 64;  // outputs in one running f32 sum

// acc[q][s] += sum_t grad[t] * in_q[(t * kStride + s) * step] over one tile of columns.
template <class T, class A, int kTaps, int kStride, int kFilterRows, int kColumns, bool kEdge>
DWCONV_INLINE void add_products(const T* grad, int64_t grad_step, int columns, const T* in, int64_t row_step, uint32_t valid_rows,
                                int64_t step, uint32_t valid, int lanes, Vec<A> (&acc)[kFilterRows][kTaps]) {
  Vec<A> g[kColumns];
  DWCONV_UNROLL
  for (int t = 0; t < kColumns; ++t) {
    g[t] = !kEdge || t < columns ? load_some<!kEdge>(grad + t * grad_step, lanes) : Vec<A>{};
  }
  DWCONV_UNROLL
  for (int q = 0; q < kFilterRows; ++q) {
    if (!((valid_rows >> q) & 1)) continue;
    const T* const row = in + q * row_step;
    Vec<A> sum[kTaps] = {};  // of this tile's row: a short chain, for accuracy
    DWCONV_UNROLL
    for (int i = 0; i < (kColumns - 1) * kStride + kTaps; ++i) {
      const T* at = row + i * step;
      if (kEdge) at = (valid >> i) & 1 ? at : reinterpret_cast<const T*>(kZeros);
      const Vec<A> x = load_some<!kEdge>(at, lanes);
      DWCONV_UNROLL
      for (int t = 0; t < kColumns; ++t) {
        const int s = i - t * kStride;
        if (s >= 0 && s < kTaps) sum[s] += x * g[t];
      }
    }
    DWCONV_UNROLL
    for (int s = 0; s < kTaps; ++s) acc[q][s] += sum[s];
  }
}

// What a block of rows is: `rows` output rows from y on of one image, and one vector of channels.
template <class T>
struct GradBlock {
  const T* image;  // input and grad_output of the image, at the vector's first channel
  const T* grad;
  int64_t y, rows;
  int lanes;
};

// partial[(r * kernel_w + s) * pitch] += the block's share of taps (first_r + q, first_s + s).
template <class T, class A, int kTaps, int kStride, int kFilterRows, bool kWhole>
DWCONV_INLINE void block_taps(const DepthwiseProblem& p, const GradBlock<T>& b, int64_t first_r, int64_t first_s, int64_t pitch,
                              A* partial) {
  constexpr int kColumns = kNarrowColumns;
  constexpr int kCount = (kColumns - 1) * kStride + kTaps;
  // kStride > 1 means a known stride and dilation 1; otherwise taps step by the stride, one or (dilation == stride) several.
  const int64_t tile_step = kStride > 1 ? kStride : p.stride_w;
  const int64_t tap_step = kStride > 1 ? 1 : p.stride_w;
  Vec<A> acc[kFilterRows][kTaps] = {};
  for (int64_t y = b.y; y < b.y + b.rows; ++y) {
    const int64_t origin_h = y * p.stride_h - p.pad_h + first_r * p.dilation_h;
    uint32_t valid_rows = 0;
    for (int q = 0; q < kFilterRows; ++q) {
      valid_rows |= uint32_t(static_cast<uint64_t>(origin_h + q * p.dilation_h) < static_cast<uint64_t>(p.in_h)) << q;
    }
    if (valid_rows == 0) continue;
    const T* const row = b.image + origin_h * p.in_stride_h;
    const T* const grad = b.grad + y * p.out_stride_h;
    for (int64_t x = 0; x < p.out_w; x += kColumns) {
      const int64_t first = x * tile_step - p.pad_w + first_s * p.dilation_w;
      const int columns = lanes_left(p.out_w - x, kColumns);
      const T* const in = row + first * p.in_stride_w;
      const bool inside = columns == kColumns && first >= 0 && first + (kCount - 1) * tap_step < p.in_w;
      if (kWhole && inside) {
        add_products<T, A, kTaps, kStride, kFilterRows, kColumns, false>(grad + x * p.out_stride_w, p.out_stride_w, columns, in,
                                                                         p.dilation_h * p.in_stride_h, valid_rows,
                                                                         tap_step * p.in_stride_w, 0, b.lanes, acc);
      } else {
        const uint32_t valid = valid_columns(first, tap_step, p.in_w, kCount);
        if (valid == 0) continue;
        add_products<T, A, kTaps, kStride, kFilterRows, kColumns, true>(grad + x * p.out_stride_w, p.out_stride_w, columns, in,
                                                                        p.dilation_h * p.in_stride_h, valid_rows,
                                                                        tap_step * p.in_stride_w, valid, b.lanes, acc);
      }
    }
  }
  A* const to = partial + (first_r * p.kernel_w + first_s) * pitch;
  DWCONV_UNROLL
  for (int q = 0; q < kFilterRows; ++q) {
    DWCONV_UNROLL
    for (int s = 0; s < kTaps; ++s) {
      A* const at = to + (q * p.kernel_w + s) * pitch;
      store_some<kWhole>(at, load_some<kWhole>(at, b.lanes) + acc[q][s], b.lanes);
    }
  }
}

template <class T, class A, int kKernel, int kStride, bool kWhole>
void block_weight(const DepthwiseProblem& p, const GradBlock<T>& b, int64_t pitch, A* partial) {
  if constexpr (kKernel == 3) {
    block_taps<T, A, 3, kStride, 3, kWhole>(p, b, 0, 0, pitch, partial);
  } else if constexpr (kKernel > 0) {
    int64_t r = 0;
    for (; r + 2 <= kKernel; r += 2) block_taps<T, A, kKernel, kStride, 2, kWhole>(p, b, r, 0, pitch, partial);
    for (; r < kKernel; ++r) block_taps<T, A, kKernel, kStride, 1, kWhole>(p, b, r, 0, pitch, partial);
  } else {
    const int64_t sliding_end = p.dilation_w == p.stride_w ? p.kernel_w : 0;
    for (int64_t r = 0; r < p.kernel_h; ++r) {
      int64_t s = 0;
      for (; s + 8 <= sliding_end; s += 8) block_taps<T, A, 8, 1, 1, kWhole>(p, b, r, s, pitch, partial);
      for (; s + 4 <= sliding_end; s += 4) block_taps<T, A, 4, 1, 1, kWhole>(p, b, r, s, pitch, partial);
      for (; s + 2 <= sliding_end; s += 2) block_taps<T, A, 2, 1, 1, kWhole>(p, b, r, s, pitch, partial);
      for (; s < p.kernel_w; ++s) block_taps<T, A, 1, 1, 1, kWhole>(p, b, r, s, pitch, partial);
    }
  }
}

template <class T, class A, bool kWhole>
void block_bias(const DepthwiseProblem& p, const GradBlock<T>& b, A* partial) {
  Vec<A> sum[2] = {};
  for (int64_t y = b.y; y < b.y + b.rows; ++y) {
    const T* const grad = b.grad + y * p.out_stride_h;
    int64_t x = 0;
    for (; x + 2 <= p.out_w; x += 2) {
      sum[0] += load_some<kWhole>(grad + x * p.out_stride_w, b.lanes);
      sum[1] += load_some<kWhole>(grad + (x + 1) * p.out_stride_w, b.lanes);
    }
    if (x < p.out_w) sum[0] += load_some<kWhole>(grad + x * p.out_stride_w, b.lanes);
  }
  store_some<kWhole>(partial, load_some<kWhole>(partial, b.lanes) + (sum[0] + sum[1]), b.lanes);
}

// Output rows [y, y + rows) of one image, all channels, into partial[tap * pitch + c] and partial_bias[c].
template <class T, int kKernel, int kStride, class A>
void accumulate_rows(const DepthwiseProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, int64_t pitch, A* partial,
                     A* partial_bias) {
  constexpr int kVec = kLanes<A>;
  const int64_t block = p.out_w < kMaxSum ? kMaxSum / p.out_w : 1;
  for (int64_t end = y + rows; y < end; y += block) {
    for (int64_t c = 0; c < p.channels; c += kVec) {
      const int lanes = lanes_left(p.channels - c, kVec);
      const GradBlock<T> b = {image + c, grad + c, y, y + block < end ? block : end - y, lanes};
      if (lanes == kVec) {
        if (partial != nullptr) block_weight<T, A, kKernel, kStride, true>(p, b, pitch, partial + c);
        if (partial_bias != nullptr) block_bias<T, A, true>(p, b, partial_bias + c);
      } else {
        if (partial != nullptr) block_weight<T, A, kKernel, kStride, false>(p, b, pitch, partial + c);
        if (partial_bias != nullptr) block_bias<T, A, false>(p, b, partial_bias + c);
      }
    }
  }
}

template <class A>
DWCONV_INLINE void clear(A* values, int64_t count) {
  if (values != nullptr) memset(values, 0, count * sizeof(A));
}

// kKernel == 0: any filter, stride and dilation.
template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nhwc(const BackwardWeightArgs& args, void*, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  const DepthwiseProblem& p = args.problem;
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t part = tile_begin; part < tile_end; ++part) {
    A* const partial = args.partial ? static_cast<A*>(args.partial) + part * taps * p.channels : nullptr;
    A* const bias = args.partial_bias ? static_cast<A*>(args.partial_bias) + part * p.channels : nullptr;
    clear(partial, taps * p.channels);
    clear(bias, p.channels);
    const int64_t end = total_rows * (part + 1) / args.parts;
    for (int64_t row = total_rows * part / args.parts; row < end;) {
      const int64_t n = row / p.out_h, y = row % p.out_h;
      const int64_t rows = end - row < p.out_h - y ? end - row : p.out_h - y;
      accumulate_rows<T, kKernel, kStride>(p, static_cast<const T*>(args.input) + n * p.in_stride_n,
                                           static_cast<const T*>(args.grad_output) + n * p.out_stride_n, y, rows, p.channels,
                                           partial, bias);
      row += rows;
    }
  }
}

template <class T>
int64_t depthwise_backward_weight_nhwc_scratch(const DepthwiseProblem&, int64_t) {
  return 0;
}

}  // namespace dwconv::DWCONV_ISA
