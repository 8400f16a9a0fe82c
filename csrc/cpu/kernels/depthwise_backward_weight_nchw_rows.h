// Depthwise weight and bias gradient, NCHW, with output columns as lanes: for few channels, where there are not enough planes
// to fill a vector (depthwise_backward_weight_nchw_transposed.h).
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y*stride_h + r*dilation_h - pad_h, ...]
//
// The input rows of `rows_per_tile` output rows are staged (stage_nchw.h); kTapChunk taps' sums are held in registers, one
// grad_output vector is loaded for kTapChunk input vectors. Sums run over one staged tile at a time, each tile's added to its
// part's, lane by lane; lanes and parts are added last, in a fixed order.
// Tiles: one (part, channel): a range of the N planes of one channel. Partial sums: partial[part][tap][channel].
// Traffic: grad_output and input once where a staged tile fits in L1/L2.
#pragma once

#include "stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kTapChunk = 9;  // a 3x3 filter in one go; 9 sums hide the FMA's latency

template <int kPiece>
struct Piece {
  static constexpr int size = kPiece;
};
// Runs body(Piece<n>, first) over [0, count) in pieces of kTapChunk, then 5, 3, 1.
template <class Body>
DWCONV_INLINE void in_pieces(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kTapChunk <= count; i += kTapChunk) body(Piece<kTapChunk>{}, i);
  for (; i + 5 <= count; i += 5) body(Piece<5>{}, i);
  for (; i + 3 <= count; i += 3) body(Piece<3>{}, i);
  for (; i < count; ++i) body(Piece<1>{}, i);
}

// sums[i] += this tile's share of tap first + i, lane by lane.
template <class T, class A, int kTaps>
DWCONV_INLINE void nchw_tile_taps(const DepthwiseProblem& p, const Staging& s, const int64_t* tap_offsets, const A* staged,
                                  const T* grad, int64_t rows, int64_t first, A* sums) {
  constexpr int kVec = kLanes<A>;
  const A* source[kTaps];
  DWCONV_UNROLL
  for (int i = 0; i < kTaps; ++i) source[i] = staged + tap_offsets[first + i];
  Vec<A> acc[kTaps] = {};
  const int64_t whole = p.out_w - p.out_w % kVec;
  const int tail = static_cast<int>(p.out_w - whole);
  for (int64_t y = 0; y < rows; ++y) {
    const T* const grad_row = grad + y * p.out_stride_h;
    const int64_t offset = y * s.pitch;
    for (int64_t x = 0; x < whole; x += kVec) {
      const Vec<A> g = load(grad_row + x);
      DWCONV_UNROLL
      for (int i = 0; i < kTaps; ++i) acc[i] += g * load(source[i] + offset + x);
    }
    if (tail > 0) {  // both sides masked: what lies behind the row may be NaN
      const Vec<A> g = load_lanes(grad_row + whole, tail);
      DWCONV_UNROLL
      for (int i = 0; i < kTaps; ++i) acc[i] += g * load_lanes(source[i] + offset + whole, tail);
    }
  }
  DWCONV_UNROLL
  for (int i = 0; i < kTaps; ++i) {
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

template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nchw_rows(const BackwardWeightArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const DepthwiseProblem& p = args.problem;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const Staging s = staging_of(p, args.rows_per_tile, 0, kVec);
  A* const staged = static_cast<A*>(scratch);
  int64_t* const tap_offsets = reinterpret_cast<int64_t*>(staged + (s.size + 1) / 2 * 2);
  A* const sums = reinterpret_cast<A*>(tap_offsets + taps);
  fill_tap_offsets(p, s, tap_offsets);
  for (int64_t tile; next_tile(tiles, &tile);) {
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
        stage_rows(p, s, input, y, 0, padded_rows(p, rows), staged);
        in_pieces(taps, [&](auto piece, int64_t first) {
          nchw_tile_taps<T, A, decltype(piece)::size>(p, s, tap_offsets, staged, grad_tile, rows, first, sums);
        });
      }
    }
    if (args.partial_bias != nullptr) static_cast<A*>(args.partial_bias)[tile] = bias_sum;
    if (args.partial != nullptr) {
      A* const partial = static_cast<A*>(args.partial) + part * taps * p.channels + c;
      for (int64_t i = 0; i < taps; ++i) partial[i * p.channels] = sum_lanes(load(sums + i * kVec));
    }
  }
}

template <class T>
int64_t depthwise_backward_weight_nchw_rows_scratch(const DepthwiseProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t staged = staging_of(p, rows_per_tile, 0, kLanes<A>).size;
  const int64_t taps = p.kernel_h * p.kernel_w;
  return ((staged + 1) / 2 * 2 + taps * kLanes<A>)*static_cast<int64_t>(sizeof(A)) + taps * static_cast<int64_t>(sizeof(int64_t));
}

}  // namespace dwconv::DWCONV_ISA
