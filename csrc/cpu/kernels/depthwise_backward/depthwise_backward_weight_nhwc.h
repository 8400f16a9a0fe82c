// Depthwise weight and bias gradient, channels last:
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y*stride_h + r*dilation_h - pad_h, ...]
//   grad_bias[c]         = sum_{n, y, x} grad_output[n, c, y, x]
//
// Lanes are channels. 3x3 filters go by strips (depthwise_backward_weight_nhwc_strip.h), but for the few channels of NCHW's
// transposed planes. With all others the sums of kFilterRows filter rows by kTaps taps stay in registers over a block of output
// rows; per kColumns outputs, grad_output is loaded once and each input vector once a filter row,
//
//   filter 5x5, stride 1, 7 columns: 7 + 2 * 11 loads for 70 FMAs in 10 chains
//
// A row of a tile is summed by itself, then added to the block's sums. A block is at most kMaxSum outputs long, then its sums are
// added to the part's partial sums, and the parts are added in order by a second stage: f32 error grows with the block and the
// number of blocks, not with the whole image. Blocks and parts are functions of the problem alone, so the bits do not depend on
// the threads. Tiles: one part, a range of the N * out_h rows. Traffic: grad_output and input once where a block's rows fit in
// L2.
#pragma once

#include "cpu/kernels/cores.h"
#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nhwc_strip.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/stage_lines.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int64_t kMaxSum = 64;  // outputs in one running f32 sum

// acc[q][s] += sum_t grad[t] * in_q[(t * kStride + s) * step] over one tile of columns; the first kLeft and the last kRight
// columns of the input are in the padding.
// kWhole: all lanes of the vector are channels.
template <class T, class A, int kTaps, int kStride, int kFilterRows, int kColumns, bool kEdge, bool kWhole, int kLeft = 0,
          int kRight = 0>
DWCONV_INLINE void add_products(const T* grad, int64_t grad_step, int columns, const T* in, int64_t row_step, uint32_t valid_rows,
                                int64_t step, uint32_t valid, int lanes, Vec<A> (&acc)[kFilterRows][kTaps]) {
  Vec<A> g[kColumns];
  DWCONV_UNROLL
  for (int t = 0; t < kColumns; ++t) {
    g[t] = !kEdge || t < columns ? load_some<kWhole>(grad + t * grad_step, lanes) : Vec<A>{};
  }
  DWCONV_UNROLL
  for (int q = 0; q < kFilterRows; ++q) {
    if (!((valid_rows >> q) & 1)) continue;
    const T* const row = in + q * row_step;
    Vec<A> sum[kTaps] = {};  // of this tile's row: a short chain, for accuracy
    DWCONV_UNROLL
    for (int i = kLeft; i < (kColumns - 1) * kStride + kTaps - kRight; ++i) {
      const T* at = row + i * step;
      if (kEdge) at = (valid >> i) & 1 ? at : reinterpret_cast<const T*>(kZeros);
      const Vec<A> x = load_some<kWhole>(at, lanes);
      DWCONV_UNROLL
      for (int t = 0; t < kColumns; ++t) {
        const int s = i - t * kStride;
        if (s >= 0 && s < kTaps && (!kEdge || t < columns)) sum[s] += x * g[t];  // no zero meets a NaN
      }
    }
    DWCONV_UNROLL
    for (int s = 0; s < kTaps; ++s) acc[q][s] += sum[s];
  }
}

// What a block of rows is: `rows` output rows from y on of one image, and one vector of channels. Where channels are left over,
// the last vector lies over the one before and its first `done` lanes are not added again; only fewer channels than a vector has
// lanes (kWhole is false) are read lane by lane.
template <class T>
struct GradBlock {
  const T* image;  // input and grad_output of the image, at the vector's first channel
  const T* grad;
  int64_t y, rows;
  int lanes, done;
};

// to[lane] += values[lane], of the block's lanes.
template <bool kWhole, class T, class A>
DWCONV_INLINE void add_lanes(const GradBlock<T>& b, Vec<A> values, A* to) {
  if (kWhole && b.done > 0) values = keep_lanes(values, static_cast<LaneMask>(~((1u << b.done) - 1u)));
  store_some<kWhole>(to, load_some<kWhole>(to, b.lanes) + values, b.lanes);
}

// A tile of output columns [x, x + kColumns) of row y, and the filter taps it meets.
template <class T>
struct GradTile {
  const T* grad;  // at column 0
  const T* in;    // the input row of the first filter row, at column 0
  int64_t x, first_s;
  uint32_t valid_rows;
};

template <class T, class A, int kTaps, int kStride, int kFilterRows, int kColumns, bool kWhole>
DWCONV_INLINE void add_tile(const CpuProblem& p, const GradTile<T>& tile, int lanes, Vec<A> (&acc)[kFilterRows][kTaps]) {
  constexpr int kCount = (kColumns - 1) * kStride + kTaps;
  constexpr uint32_t kAll = (1u << kCount) - 1u, kFirst = 1u, kLast = 1u << (kCount - 1);
  // kStride > 1 means a known stride and dilation 1; otherwise taps step by the stride, one or (dilation == stride) several.
  const int64_t tile_step = kStride > 1 ? kStride : p.stride_w;
  const int64_t tap_step = kStride > 1 ? 1 : p.stride_w;
  const int64_t first = tile.x * tile_step - p.pad_w + tile.first_s * p.dilation_w;
  const int columns = lanes_left(p.out_w - tile.x, kColumns);
  const uint32_t valid = valid_columns(first, tap_step, p.in_w, kCount);
  if (valid == 0) return;
  const T* const in = tile.in + first * p.in_stride_w;
  const T* const grad = tile.grad + tile.x * p.out_stride_w;
  const int64_t row_step = p.dilation_h * p.in_stride_h, step = tap_step * p.in_stride_w;
  const auto add = [&]<bool kEdge, int kLeft, int kRight>() {
    add_products<T, A, kTaps, kStride, kFilterRows, kColumns, kEdge, kWhole, kLeft, kRight>(
        grad, p.out_stride_w, columns, in, row_step, tile.valid_rows, step, valid, lanes, acc);
  };
  const bool full = columns == kColumns;
  if (kWhole && full && valid == kAll) return add.template operator()<false, 0, 0>();
  if constexpr (kWhole && kTaps == 3) {
    if (full && valid == (kAll & ~kFirst)) return add.template operator()<false, 1, 0>();
    if (full && valid == (kAll & ~kLast)) return add.template operator()<false, 0, 1>();
    if (full && valid == (kAll & ~kFirst & ~kLast)) return add.template operator()<false, 1, 1>();
  }
  add.template operator()<true, 0, 0>();
}

// partial[(r * kernel_w + s) * pitch] += the block's share of taps (first_r + q, first_s + s).
template <class T, class A, int kTaps, int kStride, int kFilterRows, bool kWhole>
DWCONV_INLINE void block_taps(const CpuProblem& p, const GradBlock<T>& b, int64_t first_r, int64_t first_s, int64_t pitch,
                              A* partial) {
  constexpr int kWide = kTaps == 3 ? kWideColumns : kNarrowColumns, kNarrow = kTaps == 3 ? kWideColumns - 1 : kNarrowColumns;
  const int64_t wide = wide_columns(p.out_w, kWide, kNarrow);
  Vec<A> acc[kFilterRows][kTaps] = {};
  for (int64_t y = b.y; y < b.y + b.rows; ++y) {
    const int64_t origin_h = y * p.stride_h - p.pad_h + first_r * p.dilation_h;
    GradTile<T> tile = {b.grad + y * p.out_stride_h, b.image + origin_h * p.in_stride_h, 0, first_s, 0};
    for (int q = 0; q < kFilterRows; ++q) {
      tile.valid_rows |= uint32_t(static_cast<uint64_t>(origin_h + q * p.dilation_h) < static_cast<uint64_t>(p.in_h)) << q;
    }
    if (tile.valid_rows == 0) continue;
    for (; tile.x < wide; tile.x += kWide) add_tile<T, A, kTaps, kStride, kFilterRows, kWide, kWhole>(p, tile, b.lanes, acc);
    for (; tile.x < p.out_w; tile.x += kNarrow) {
      add_tile<T, A, kTaps, kStride, kFilterRows, kNarrow, kWhole>(p, tile, b.lanes, acc);
    }
  }
  A* const to = partial + (first_r * p.kernel_w + first_s) * pitch;
  DWCONV_UNROLL
  for (int q = 0; q < kFilterRows; ++q) {
    DWCONV_UNROLL
    for (int s = 0; s < kTaps; ++s) {
      add_lanes<kWhole, T, A>(b, acc[q][s], to + (q * p.kernel_w + s) * pitch);
    }
  }
}

template <class T, class A, int kKernel, int kStride, bool kWhole>
void block_weight(const CpuProblem& p, const GradBlock<T>& b, int64_t pitch, A* partial) {
  if constexpr (kKernel == 3) {
    block_taps<T, A, 3, kStride, 3, kWhole>(p, b, 0, 0, pitch, partial);
  } else if constexpr (kKernel > 0) {
    int64_t r = 0;
    for (; r + 2 <= kKernel; r += 2) block_taps<T, A, kKernel, kStride, 2, kWhole>(p, b, r, 0, pitch, partial);
    for (; r < kKernel; ++r) block_taps<T, A, kKernel, kStride, 1, kWhole>(p, b, r, 0, pitch, partial);
  } else {
    // Fewer channels than lanes go tap by tap.
    [[maybe_unused]] const int64_t sliding_end = p.dilation_w == p.stride_w ? p.kernel_w : 0;
    for (int64_t r = 0; r < p.kernel_h; ++r) {
      int64_t s = 0;
      if constexpr (kWhole) {
        if constexpr (kManyTiles) {
          for (; s + 8 <= sliding_end; s += 8) block_taps<T, A, 8, 1, 1, kWhole>(p, b, r, s, pitch, partial);
        }
        for (; s + 4 <= sliding_end; s += 4) block_taps<T, A, 4, 1, 1, kWhole>(p, b, r, s, pitch, partial);
        if constexpr (kManyTiles) {
          for (; s + 2 <= sliding_end; s += 2) block_taps<T, A, 2, 1, 1, kWhole>(p, b, r, s, pitch, partial);
        }
      }
      for (; s < p.kernel_w; ++s) block_taps<T, A, 1, 1, 1, kWhole>(p, b, r, s, pitch, partial);
    }
  }
}

template <class T, class A, bool kWhole>
void block_bias(const CpuProblem& p, const GradBlock<T>& b, A* partial) {
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
  add_lanes<kWhole, T, A>(b, sum[0] + sum[1], partial);
}

DWCONV_INLINE int64_t block_rows(const CpuProblem& p) { return p.out_w < kMaxSum ? kMaxSum / p.out_w : 1; }

// Output rows [y, y + rows) of one image, all channels, into partial[tap * pitch + c] and partial_bias[c].
template <class T, int kKernel, int kStride, class A>
void accumulate_rows(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, int64_t pitch, A* partial,
                     A* partial_bias) {
  constexpr int kVec = kLanes<A>;
  const int64_t block = block_rows(p);
  SequentialRows<T> prefetch_input(p.prefetch_input, image, p.in_stride_h, p.in_stride_w, p.in_w);
  SequentialRows<T> prefetch_grad(p.prefetch_input, grad, p.out_stride_h, p.out_stride_w, p.out_w);
  for (int64_t end = y + rows; y < end; y += block) {
    const int64_t count = y + block < end ? block : end - y;
    prefetch_input.read(input_rows(p, y, count));
    prefetch_grad.read({y, y + count});
    if (p.channels < kVec) {
      const GradBlock<T> b = {image, grad, y, count, static_cast<int>(p.channels), 0};
      if (partial != nullptr) block_weight<T, A, 0, 0, false>(p, b, pitch, partial);
      if (partial_bias != nullptr) block_bias<T, A, false>(p, b, partial_bias);
      continue;
    }
    for (int64_t next = 0; next < p.channels; next += kVec) {
      const int64_t c = next + kVec <= p.channels ? next : p.channels - kVec;
      const GradBlock<T> b = {image + c, grad + c, y, count, kVec, static_cast<int>(next - c)};
      if (partial != nullptr) block_weight<T, A, kKernel, kStride, true>(p, b, pitch, partial + c);
      if (partial_bias != nullptr) block_bias<T, A, true>(p, b, partial_bias + c);
    }
  }
}

template <class A>
DWCONV_INLINE void clear(A* values, int64_t count) {
  if (values != nullptr) memset(values, 0, count * sizeof(A));
}

DWCONV_INLINE bool goes_by_strips(const CpuProblem& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h * p.dilation_w == 1 && p.stride_h == p.stride_w && p.stride_h <= 2;
}
// A block's taps return to the input rows of a filter for each row of outputs; strips read each line once a tile.
template <class T>
DWCONV_INLINE bool stages_weight(const CpuProblem& p) {
  return !goes_by_strips(p) && lines_collide<T>(p.channels, p.kernel_h * p.in_w + p.out_w, p.l1_ways);
}

// The same from staged lines of input and grad_output, kStaged channels and a block of rows at a time.
template <class T, int kKernel, int kStride, class A>
void accumulate_staged_rows(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, A* partial,
                            A* partial_bias, T* staged) {
  CpuProblem q = p;
  q.in_stride_w = q.out_stride_w = kStaged<T>;
  q.in_stride_h = p.in_w * kStaged<T>, q.out_stride_h = p.out_w * kStaged<T>;
  q.prefetch_input = false;
  SequentialRows<T> prefetch_input(p.prefetch_input, image, p.in_stride_h, p.in_stride_w, p.in_w);
  SequentialRows<T> prefetch_grad(p.prefetch_input, grad, p.out_stride_h, p.out_stride_w, p.out_w);
  T* const staged_grad = staged + most_input_rows(p, block_rows(p)) * q.in_stride_h;
  for (const int64_t end = y + rows; y < end; y += block_rows(p)) {
    const int64_t count = y + block_rows(p) < end ? block_rows(p) : end - y;
    const Range in_rows = crop_input(p, y, count, &q);
    prefetch_input.read(in_rows);
    prefetch_grad.read({y, y + count});
    for (int64_t c = 0; c < p.channels; c += kStaged<T>) {
      q.channels = lanes_left(p.channels - c, static_cast<int>(kStaged<T>));
      stage_lines<T>(image + in_rows.begin * p.in_stride_h + c, q.in_h, p.in_w, p.in_stride_h, p.in_stride_w, q.channels, staged);
      stage_lines<T>(grad + y * p.out_stride_h + c, count, p.out_w, p.out_stride_h, p.out_stride_w, q.channels, staged_grad);
      accumulate_rows<T, kKernel, kStride>(q, staged, staged_grad, 0, count, p.channels, partial ? partial + c : nullptr,
                                           partial_bias ? partial_bias + c : nullptr);
    }
  }
}

template <class T, int kStride, class A>
void accumulate_strips(const CpuProblem& p, const T* image, const T* grad, int64_t y, int64_t rows, A* partial, A* partial_bias,
                       A* sums) {
  SequentialRows<T> prefetch_input(p.prefetch_input, image, p.in_stride_h, p.in_stride_w, p.in_w);
  SequentialRows<T> prefetch_grad(p.prefetch_input, grad, p.out_stride_h, p.out_stride_w, p.out_w);
  for (const int64_t end = y + rows; y < end; y += strip_rows(p)) {
    const int64_t count = y + strip_rows(p) < end ? strip_rows(p) : end - y;
    prefetch_input.read(input_rows(p, y, count));
    prefetch_grad.read({y, y + count});
    accumulate_strip<T, A, kStride>(p, image, grad, y, count, partial, partial_bias, sums);
  }
}

// kKernel == 0: any filter, stride and dilation.
template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nhwc(const BackwardWeightArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const bool staged = scratch != nullptr && stages_weight<T>(p);
  for (int64_t part; next_tile(tiles, &part);) {
    A* const partial = args.partial ? static_cast<A*>(args.partial) + part * taps * p.channels : nullptr;
    A* const bias = args.partial_bias ? static_cast<A*>(args.partial_bias) + part * p.channels : nullptr;
    clear(partial, taps * p.channels);
    clear(bias, p.channels);
    const int64_t end = total_rows * (part + 1) / args.parts;
    for (int64_t row = total_rows * part / args.parts; row < end;) {
      const int64_t n = row / p.out_h, y = row % p.out_h;
      const int64_t rows = end - row < p.out_h - y ? end - row : p.out_h - y;
      const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
      const T* const grad = static_cast<const T*>(args.grad_output) + n * p.out_stride_n;
      if constexpr (kKernel == 3) {
        accumulate_strips<T, kStride>(p, image, grad, y, rows, partial, bias, static_cast<A*>(scratch));
      } else if (staged) {
        accumulate_staged_rows<T, kKernel, kStride>(p, image, grad, y, rows, partial, bias, static_cast<T*>(scratch));
      } else {
        accumulate_rows<T, kKernel, kStride>(p, image, grad, y, rows, p.channels, partial, bias);
      }
      row += rows;
    }
  }
}

template <class T, int kKernel>
int64_t depthwise_backward_weight_nhwc_scratch(const CpuProblem& p, int64_t) {
  if (kKernel == 3) return kStripScratch<typename AccumulateType<T>::type>;
  return stages_weight<T>(p) ? (most_input_rows(p, block_rows(p)) * p.in_w + block_rows(p) * p.out_w) * kStagedBytes : 0;
}

}  // namespace dwconv::DWCONV_ISA
