// Depthwise weight and bias gradient, both layouts:
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y*stride_h + r*dilation_h - pad_h, ...]
//   grad_bias[c]         = sum_{n, y, x} grad_output[n, c, y, x]
//
// A worker holds kTapChunk taps' sums in registers: one grad_output vector is loaded, then kTapChunk input vectors, for
// kTapChunk FMAs. Sums are taken in short pieces (one row of channels_last, one staged tile of NCHW), each piece added to
// a partial sum of its part, the parts added in order by a second stage: f32 error grows with the piece and the number of
// pieces, not with the whole image. The parts are a function of the problem alone, so the bits do not depend on the threads.
//
//   NHWC  lanes are channels; a tile is one part: a range of the N * out_h rows.
//   NCHW  lanes are output columns; a tile is one (part, channel): a range of the N planes of one channel.
// Traffic: grad_output and input once where kernel_h rows (NHWC) or a staged tile (NCHW) fit in L1/L2.
#pragma once

#include "depthwise_forward_nhwc.h"
#include "stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kTapChunk = 9;  // a 3x3 filter in one go; 9 sums hide the FMA's latency

// Runs body(std::integral-like constant n) over [0, count) in pieces of kTapChunk, then 5, 3, 1.
template <int kPiece>
struct Piece {
  static constexpr int size = kPiece;
};
template <class Body>
DWCONV_INLINE void in_pieces(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kTapChunk <= count; i += kTapChunk) body(Piece<kTapChunk>{}, i);
  for (; i + 5 <= count; i += 5) body(Piece<5>{}, i);
  for (; i + 3 <= count; i += 3) body(Piece<3>{}, i);
  for (; i < count; ++i) body(Piece<1>{}, i);
}

// ---- NHWC ------------------------------------------------------------------------------------------------------------

// One row's share of taps [first, first + kTaps) of the rows.begin-based tap list, for one vector of channels.
template <class T, class A, int kTaps, bool kWhole>
DWCONV_INLINE void nhwc_row_taps(const DepthwiseProblem& p, const T* grad_row, const T* image, int64_t origin_h,
                                 RowRange rows, int64_t first, A* partial, int lanes) {
  const T* source[kTaps];
  int64_t origin_w[kTaps];
  int64_t inside_begin = 0, inside_end = p.out_w;
  DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) {
    const int64_t r = rows.begin + (first + i) / p.kernel_w;
    origin_w[i] = (first + i) % p.kernel_w * p.dilation_w - p.pad_w;
    source[i] = image + (origin_h + r * p.dilation_h) * p.in_stride_h + origin_w[i] * p.in_stride_w;
    const RowRange valid = filter_range(origin_w[i], p.stride_w, p.out_w, p.in_w);
    if (valid.begin > inside_begin) inside_begin = valid.begin;
    if (valid.end < inside_end) inside_end = valid.end;
  }
  if (inside_begin > inside_end) inside_begin = inside_end = p.out_w;
  const int64_t step = p.stride_w * p.in_stride_w;
  Vec<A> acc[kTaps] = {};
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      const Vec<A> grad = load_some<kWhole>(grad_row + x * p.out_stride_w, lanes);
      DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) {
        const int64_t column = x * p.stride_w + origin_w[i];
        if (static_cast<uint64_t>(column) < static_cast<uint64_t>(p.in_w)) {
          acc[i] += grad * load_some<kWhole>(source[i] + x * step, lanes);
        }
      }
    }
  };
  edge(0, inside_begin);
  for (int64_t x = inside_begin; x < inside_end; ++x) {
    const Vec<A> grad = load_some<kWhole>(grad_row + x * p.out_stride_w, lanes);
    DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) acc[i] += grad * load_some<kWhole>(source[i] + x * step, lanes);
  }
  edge(inside_end, p.out_w);
  A* const to = partial + (rows.begin * p.kernel_w + first) * p.channels;
  DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) {
    store_some<kWhole>(to + i * p.channels, load_some<kWhole>(to + i * p.channels, lanes) + acc[i], lanes);
  }
}

template <class T, class A, bool kWhole>
DWCONV_INLINE void nhwc_row(const BackwardWeightArgs& args, const T* grad_row, const T* image, int64_t y, A* partial,
                            A* partial_bias, int64_t c, int lanes) {
  const DepthwiseProblem& p = args.problem;
  if (partial_bias != nullptr) {
    Vec<A> sum = {};
    for (int64_t x = 0; x < p.out_w; ++x) sum += load_some<kWhole>(grad_row + x * p.out_stride_w + c, lanes);
    store_some<kWhole>(partial_bias + c, load_some<kWhole>(partial_bias + c, lanes) + sum, lanes);
  }
  if (partial == nullptr) return;
  const int64_t origin_h = y * p.stride_h - p.pad_h;
  const RowRange rows = filter_range(origin_h, p.dilation_h, p.kernel_h, p.in_h);
  in_pieces((rows.end - rows.begin) * p.kernel_w, [&](auto piece, int64_t first) {
    nhwc_row_taps<T, A, decltype(piece)::size, kWhole>(p, grad_row + c, image + c, origin_h, rows, first, partial + c,
                                                      lanes);
  });
}

template <class T>
void depthwise_backward_weight_nhwc(const BackwardWeightArgs& args, void*, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const DepthwiseProblem& p = args.problem;
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t part = tile_begin; part < tile_end; ++part) {
    A* const partial = args.partial ? static_cast<A*>(args.partial) + part * taps * p.channels : nullptr;
    A* const bias = args.partial_bias ? static_cast<A*>(args.partial_bias) + part * p.channels : nullptr;
    for (int64_t i = 0; partial != nullptr && i < taps * p.channels; ++i) partial[i] = A(0);
    for (int64_t i = 0; bias != nullptr && i < p.channels; ++i) bias[i] = A(0);
    for (int64_t row = total_rows * part / args.parts; row < total_rows * (part + 1) / args.parts; ++row) {
      const int64_t n = row / p.out_h;
      const int64_t y = row % p.out_h;
      const T* const grad_row = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + y * p.out_stride_h;
      const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
      int64_t c = 0;
      for (; c + kVec <= p.channels; c += kVec) {
        nhwc_row<T, A, true>(args, grad_row, image, y, partial, bias, c, kVec);
      }
      if (c < p.channels) {
        nhwc_row<T, A, false>(args, grad_row, image, y, partial, bias, c, static_cast<int>(p.channels - c));
      }
    }
  }
}

// ---- NCHW ------------------------------------------------------------------------------------------------------------

// sums[i] += this tile's share of tap first + i, lane by lane.
template <class T, class A, int kTaps>
DWCONV_INLINE void nchw_tile_taps(const DepthwiseProblem& p, const Staging& s, const A* staged, const T* grad, int64_t rows,
                                  int64_t first, A* sums) {
  constexpr int kVec = kLanes<A>;
  const A* source[kTaps];
  DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) {
    source[i] = staged + tap_offset(p, s, (first + i) / p.kernel_w, (first + i) % p.kernel_w);
  }
  Vec<A> acc[kTaps] = {};
  const int64_t whole = p.out_w - p.out_w % kVec;
  const int tail = static_cast<int>(p.out_w - whole);
  for (int64_t y = 0; y < rows; ++y) {
    const T* const grad_row = grad + y * p.out_stride_h;
    const int64_t offset = y * s.pitch;
    for (int64_t x = 0; x < whole; x += kVec) {
      const Vec<A> g = load(grad_row + x);
      DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) acc[i] += g * load(source[i] + offset + x);
    }
    if (tail > 0) {  // both sides masked: what lies behind the row may be NaN
      const Vec<A> g = load_lanes(grad_row + whole, tail);
      DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) acc[i] += g * load_lanes(source[i] + offset + whole, tail);
    }
  }
  DWCONV_UNROLL for (int i = 0; i < kTaps; ++i) {
    A* const to = sums + (first + i) * kVec;
    store(to, load(to) + acc[i]);
  }
}

template <class T, class A>
DWCONV_INLINE A nchw_sum(const DepthwiseProblem& p, const T* grad, int64_t rows) {
  constexpr int kVec = kLanes<A>;
  Vec<A> sum = {};
  for (int64_t y = 0; y < rows; ++y) {
    const T* const row = grad + y * p.out_stride_h;
    int64_t x = 0;
    for (; x + kVec <= p.out_w; x += kVec) sum += load(row + x);
    if (x < p.out_w) sum += load_lanes(row + x, static_cast<int>(p.out_w - x));
  }
  return sum_lanes(sum);
}

template <class T>
void depthwise_backward_weight_nchw(const BackwardWeightArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const DepthwiseProblem& p = args.problem;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const Staging s = staging_of(p, args.rows_per_tile, 0, kVec);
  A* const staged = static_cast<A*>(scratch);
  A* const sums = staged + s.size;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t part = tile / p.channels;
    const int64_t c = tile % p.channels;
    A bias_sum = A(0);
    for (int64_t i = 0; i < taps * kVec; ++i) sums[i] = A(0);
    for (int64_t n = p.batch * part / args.parts; n < p.batch * (part + 1) / args.parts; ++n) {
      const T* const input = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c;
      const T* const grad = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + c * p.out_stride_c;
      for (int64_t y = 0; y < p.out_h; y += args.rows_per_tile) {
        const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
        const T* const grad_tile = grad + y * p.out_stride_h;
        if (args.partial_bias != nullptr) bias_sum += nchw_sum<T, A>(p, grad_tile, rows);
        if (args.partial == nullptr) continue;
        stage_rows(p, s, input, y, rows, staged);
        in_pieces(taps, [&](auto piece, int64_t first) {
          nchw_tile_taps<T, A, decltype(piece)::size>(p, s, staged, grad_tile, rows, first, sums);
        });
      }
    }
    if (args.partial_bias != nullptr) static_cast<A*>(args.partial_bias)[tile] = bias_sum;
    if (args.partial != nullptr) {
      A* const partial = static_cast<A*>(args.partial) + tile * taps;
      for (int64_t i = 0; i < taps; ++i) partial[i] = sum_lanes(load(sums + i * kVec));
    }
  }
}

static inline int64_t depthwise_backward_weight_nchw_scratch(const DepthwiseProblem& p, int64_t rows_per_tile, int64_t vec) {
  return staging_of(p, rows_per_tile, 0, vec).size + p.kernel_h * p.kernel_w * vec;
}

}  // namespace dwconv::DWCONV_ISA
