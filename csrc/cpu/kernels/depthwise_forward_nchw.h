// Depthwise correlation, NCHW: forward pass, and the input gradient's phases (problem.h).
//
// Lanes are output columns. A tile is `rows_per_tile` output rows of one (n, c) plane; its input rows are first staged in
// scratch (stage_nchw.h), which leaves a stride-1 correlation without edges:
//
//   out[y, x] = act(bias + sum_taps w[tap] * staged[tap_offset + y * pitch + x])
//
// Two register tiles do it:
//   rows  kRows x kColumns vectors. With a filter of known height (stride and dilation 1 along H) a loaded vector serves
//         every output row it reaches: (kRows + kKernelH - 1) loads a vector column for kRows * kKernelH FMAs.
//   flat  for planes narrower than half a vector: the staged rows are read as one flat piece, junk between rows included
//         (7 columns at pitch 9: four vectors of 16 instead of seven), and the rows are picked out of scratch afterwards.
// Traffic: input and output once, plus kernel_h - 1 halo rows per tile, plus one pass through L1/L2 for the staging.
#pragma once

#include "activate.h"
#include "stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kRowTile = 4;

// acc[j][t] += the correlation at `base` + j * pitch + t vectors, over all planes and taps.
template <class A, int kKernelH, int kRows, int kColumns>
DWCONV_INLINE void correlate(const DepthwiseProblem& p, const Staging& s, const A* base, const A* weight,
                             Vec<A> (&acc)[kRows][kColumns]) {
  constexpr int kVec = kLanes<A>;
  for (int64_t m = 0; m < p.depth; ++m) {
    const A* const plane = base + m * s.size;
    const A* const w = weight + m * p.kernel_h * p.kernel_w;
    if constexpr (kKernelH > 0) {
      for (int64_t column = 0; column < p.kernel_w; ++column) {
        const A* const in = plane + tap_offset(p, s, 0, column);
        Vec<A> taps[kKernelH];
        DWCONV_UNROLL for (int r = 0; r < kKernelH; ++r) taps[r] = broadcast(w[r * p.kernel_w + column]);
        DWCONV_UNROLL for (int i = 0; i < kRows + kKernelH - 1; ++i) {
          Vec<A> x[kColumns];
          DWCONV_UNROLL for (int t = 0; t < kColumns; ++t) x[t] = load(in + i * s.pitch + t * kVec);
          DWCONV_UNROLL for (int j = 0; j < kRows; ++j) {
            const int r = i - j;
            if (r < 0 || r >= kKernelH) continue;
            DWCONV_UNROLL for (int t = 0; t < kColumns; ++t) acc[j][t] += x[t] * taps[r];
          }
        }
      }
    } else {
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        for (int64_t column = 0; column < p.kernel_w; ++column) {
          const A* const in = plane + tap_offset(p, s, r, column);
          const Vec<A> tap = broadcast(w[r * p.kernel_w + column]);
          DWCONV_UNROLL for (int j = 0; j < kRows; ++j) {
            DWCONV_UNROLL for (int t = 0; t < kColumns; ++t) acc[j][t] += load(in + j * s.pitch + t * kVec) * tap;
          }
        }
      }
    }
  }
}

template <class O, class A>
DWCONV_INLINE void store_columns(const DepthwiseProblem& p, O* out, Vec<A> v, int64_t columns) {
  constexpr int kVec = kLanes<A>;
  v = activate<A>(v, p.activation);
  if (p.out_stride_w == 1) {
    if (columns >= kVec) {
      store(out, v);
    } else {
      store_lanes(out, v, static_cast<int>(columns));
    }
    return;
  }
  A values[kVec];  // a phase of a strided input gradient
  store(values, v);
  const int count = lanes_left(columns, kVec);
  for (int i = 0; i < count; ++i) from_accumulate(values[i], out + i * p.out_stride_w);
}

template <class O, class A, int kKernelH, int kColumns>
DWCONV_INLINE void rows_tile(const DepthwiseProblem& p, const Staging& s, const A* base, const A* weight, A bias, O* out,
                             int rows, int64_t columns) {
  Vec<A> acc[kRowTile][kColumns];
  DWCONV_UNROLL for (int j = 0; j < kRowTile; ++j) {
    DWCONV_UNROLL for (int t = 0; t < kColumns; ++t) acc[j][t] = broadcast(bias);
  }
  correlate<A, kKernelH>(p, s, base, weight, acc);
  DWCONV_UNROLL for (int j = 0; j < kRowTile; ++j) {
    if (j >= rows) break;
    DWCONV_UNROLL for (int t = 0; t < kColumns; ++t) {
      const int64_t left = columns - t * kLanes<A>;
      if (left > 0) store_columns<O, A>(p, out + j * p.out_stride_h + t * kLanes<A> * p.out_stride_w, acc[j][t], left);
    }
  }
}

template <class T, class O, int kKernelH>
void depthwise_forward_nchw(const DepthwiseArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  constexpr int kFlat = 4;
  const DepthwiseProblem& p = args.problem;
  const int64_t row_tiles = (p.out_h + args.rows_per_tile - 1) / args.rows_per_tile;
  const Staging s = staging_of(p, args.rows_per_tile, kRowTile, kVec);
  A* const staged = static_cast<A*>(scratch);
  A* const flat = staged + p.depth * s.size;
  const int64_t weights_a_channel = p.depth * p.kernel_h * p.kernel_w;
  const bool narrow_plane = 2 * p.out_w <= kVec;

  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t plane = tile / row_tiles;
    const int64_t n = plane / p.channels;
    const int64_t c = plane % p.channels;
    const int64_t y0 = (tile % row_tiles) * args.rows_per_tile;
    const int64_t rows = y0 + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y0;
    const T* const input = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c;
    for (int64_t m = 0; m < p.depth; ++m) {
      stage_rows(p, s, input + m * p.in_stride_m, y0, rows, staged + m * s.size);
    }
    const A* const weight = static_cast<const A*>(args.weight) + c * weights_a_channel;
    const A bias = args.bias ? static_cast<const A*>(args.bias)[c] : A(0);
    O* const out = static_cast<O*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y0 * p.out_stride_h;

    if (narrow_plane) {
      const int64_t count = (rows - 1) * s.pitch + p.out_w;
      for (int64_t i = 0; i < count; i += kFlat * kVec) {
        Vec<A> acc[1][kFlat];
        DWCONV_UNROLL for (int t = 0; t < kFlat; ++t) acc[0][t] = broadcast(bias);
        correlate<A, 0>(p, s, staged + i, weight, acc);
        DWCONV_UNROLL for (int t = 0; t < kFlat; ++t) store(flat + i + t * kVec, acc[0][t]);
      }
      for (int64_t y = 0; y < rows; ++y) {
        const Vec<A> v = load(flat + y * s.pitch);
        store_columns<O, A>(p, out + y * p.out_stride_h, v, p.out_w);
      }
      continue;
    }
    for (int64_t y = 0; y < rows; y += kRowTile) {
      const int rows_here = lanes_left(rows - y, kRowTile);
      for (int64_t x = 0; x < p.out_w;) {
        const A* const base = staged + y * s.pitch + x;
        O* const to = out + y * p.out_stride_h + x * p.out_stride_w;
        const int64_t left = p.out_w - x;
        if (left > kVec) {
          rows_tile<O, A, kKernelH, 2>(p, s, base, weight, bias, to, rows_here, left < 2 * kVec ? left : 2 * kVec);
          x += 2 * kVec;
        } else {
          rows_tile<O, A, kKernelH, 1>(p, s, base, weight, bias, to, rows_here, left);
          x += kVec;
        }
      }
    }
  }
}

// Elements (of the accumulation type) of scratch a worker needs.
static inline int64_t depthwise_forward_nchw_scratch(const DepthwiseProblem& p, int64_t rows_per_tile, int64_t vec) {
  const Staging s = staging_of(p, rows_per_tile, kRowTile, vec);
  return p.depth * s.size + (2 * p.out_w <= vec ? rows_per_tile * s.pitch + 8 * vec : 0);
}

}  // namespace dwconv::DWCONV_ISA
