// Depthwise weight and bias gradient, NCHW, with output columns as lanes: for wide rows, and for few channels, where there are
// not enough planes to fill a vector (depthwise_backward_weight_nchw_transposed.h).
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y*stride_h + r*dilation_h - pad_h, ...]
//
// Up to kMostTaps taps' sums are held in registers, one grad_output vector is loaded for as many input vectors. The input rows of
// a block of output rows are staged (stage_nchw.h) before they are used, the block's sums, of kChain vectors or a row, added to
// the image's, those to the part's, lane by lane; lanes and parts are added last. The order of it all is the problem's alone.
// Tiles: one (part, channel): a range of the N planes of one channel. Partial sums: partial[part][tap][channel].
// Traffic: grad_output and input once. Where they come from afar, the next block's rows are prefetched.
#pragma once

#include "cpu/kernels/sequential_rows.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kMostTaps = 9;    // a 3x3 filter in one go; 9 sums hide the FMA's latency
inline constexpr int64_t kChain = 64;  // vectors that one sum in registers is made of, or a row

template <int kPiece>
struct Piece {
  static constexpr int size = kPiece;
};
template <int kSize, class Body>
DWCONV_INLINE void run_piece(int64_t size, int64_t first, Body body) {
  if constexpr (kSize > 0) {
    if (size == kSize) return body(Piece<kSize>{}, first);
    run_piece<kSize - 1>(size, first, body);
  }
}
// Runs body(Piece<n>, first) over [0, count) in as few pieces of at most kMostTaps as there can be, all about as long.
template <class Body>
DWCONV_INLINE void in_pieces(int64_t count, Body body) {
  const int64_t pieces = ceil_div(count, kMostTaps);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = count * i / pieces;
    run_piece<kMostTaps>(count * (i + 1) / pieces - first, first, body);
  }
}

// sums[i] += these rows' share of tap first + i, lane by lane.
template <class T, class A, int kTaps>
void nchw_tile_taps(const CpuProblem& p, const Staging& s, const int64_t* tap_offsets, const A* staged, const T* grad,
                    int64_t rows, int64_t first, A* sums) {
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
DWCONV_INLINE A nchw_sum(const CpuProblem& p, const T* grad, int64_t rows) {
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

// to[i] += from[i] and from[i] = 0, `count` vectors.
template <class A>
DWCONV_INLINE void move_sums(A* from, A* to, int64_t count) {
  for (int64_t i = 0; i < count * kLanes<A>; i += kLanes<A>) {
    store(to + i, load(to + i) + load(from + i));
    store(from + i, Vec<A>{});
  }
}

static inline int64_t block_rows(const CpuProblem& p, int64_t lanes) {
  const int64_t vectors = ceil_div(p.out_w, lanes);
  return vectors < kChain ? kChain / (vectors > 0 ? vectors : 1) : 1;
}

// Goes over the tiles: add_image(input, grad_output) adds a plane's products to part_sums, [taps][lanes], and returns the sum of
// grad_output, where that is wanted.
template <class T, class A, class AddImage>
DWCONV_INLINE void nchw_weight_tiles(const BackwardWeightArgs& args, Tiles& tiles, A* part_sums, AddImage add_image) {
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t part = tile / p.channels;
    const int64_t c = tile % p.channels;
    A bias_sum = A(0);
    for (int64_t i = 0; i < taps * kVec; ++i) part_sums[i] = A(0);
    for (int64_t n = p.batch * part / args.parts; n < p.batch * (part + 1) / args.parts; ++n) {
      bias_sum += add_image(static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c,
                            static_cast<const T*>(args.grad_output) + n * p.out_stride_n + c * p.out_stride_c);
    }
    if (args.partial_bias != nullptr) static_cast<A*>(args.partial_bias)[tile] = bias_sum;
    if (args.partial != nullptr) {
      A* const partial = static_cast<A*>(args.partial) + part * taps * p.channels + c;
      for (int64_t i = 0; i < taps; ++i) partial[i * p.channels] = sum_lanes(load(part_sums + i * kVec));
    }
  }
}

template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nchw_rows(const BackwardWeightArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t block = block_rows(p, kVec);
  const Staging s = staging_of(p, args.rows_per_tile, 0, kVec);
  A* const staged = static_cast<A*>(scratch);
  int64_t* const tap_offsets = reinterpret_cast<int64_t*>(staged + (s.size + 1) / 2 * 2);
  A* const image_sums = reinterpret_cast<A*>(tap_offsets + taps);
  A* const part_sums = image_sums + taps * kVec;
  fill_tap_offsets(p, s, tap_offsets);
  const T* const input_end = static_cast<const T*>(args.input) + p.batch * p.in_stride_n;
  const T* const grad_end = static_cast<const T*>(args.grad_output) + p.batch * p.out_stride_n;
  for (int64_t i = 0; i < taps * kVec; ++i) image_sums[i] = A(0);
  nchw_weight_tiles<T, A>(args, tiles, part_sums, [&](const T* input, const T* grad) {
    A bias_sum = A(0);
    for (int64_t y0 = 0; y0 < p.out_h; y0 += args.rows_per_tile) {
      const int64_t y_end = y0 + args.rows_per_tile < p.out_h ? y0 + args.rows_per_tile : p.out_h;
      int64_t ready = 0;  // padded rows of the tile
      for (int64_t y = y0; y < y_end; y += block) {
        const int64_t rows = block < y_end - y ? block : y_end - y;
        const T* const grad_rows = grad + y * p.out_stride_h;
        if (p.prefetch_input) {
          const int64_t next = (y + rows - 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dilation_h + 1;  // input row
          prefetch(input + next * p.in_stride_h, block * p.stride_h * p.in_stride_h, input_end);
          prefetch(grad_rows + rows * p.out_stride_h, block * p.out_stride_h, grad_end);
        }
        if (args.partial_bias != nullptr) bias_sum += nchw_sum<T, A>(p, grad_rows, rows);
        if (args.partial == nullptr) continue;
        const int64_t end = padded_rows(p, y - y0 + rows);
        stage_rows(p, s, input, y0, ready, end, staged);
        ready = end;
        in_pieces(taps, [&](auto piece, int64_t first) {
          nchw_tile_taps<T, A, decltype(piece)::size>(p, s, tap_offsets, staged + (y - y0) * s.pitch, grad_rows, rows, first,
                                                      image_sums);
        });
      }
    }
    move_sums(image_sums, part_sums, taps);
    return bias_sum;
  });
}

template <class T, int = 0>
int64_t depthwise_backward_weight_nchw_rows_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t staged = staging_of(p, rows_per_tile, 0, kLanes<A>).size;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t values = (staged + 1) / 2 * 2 + 2 * taps * kLanes<A>;
  return values * static_cast<int64_t>(sizeof(A)) + taps * static_cast<int64_t>(sizeof(int64_t));
}

}  // namespace dwconv::DWCONV_ISA
