// Depthwise correlation, NCHW: forward pass, and the input gradient's phases (problem.h).
//
// Lanes are output columns: for wide rows, and for too few planes to fill a vector (depthwise_forward_nchw_transposed.h).
// A tile is `rows_per_tile` output rows of one (n, c) plane; its input rows are first staged in scratch (stage_nchw.h), which
// leaves a stride-1 correlation without edges:
//
//   out[y, x] = act(bias + sum_taps w[tap] * staged[tap_offset + y * pitch + x])
//
// The register tile is kRowTile rows by one or two vectors. With a square filter at stride 1 a loaded vector serves every
// output row it reaches: (kRowTile + kKernel - 1) loads a vector column for kRowTile * kKernel FMAs.
// Traffic: input and output once, plus kernel_h - 1 halo rows per tile, plus one pass through L1/L2 for the staging.
#pragma once

#include "activate.h"
#include "stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kRowTile = 4;

// acc[j][t] += the correlation at `base` + j * pitch + t vectors, over all planes and taps.
template <class A, int kKernel, int kRows, int kColumns>
DWCONV_INLINE void correlate(const DepthwiseProblem& p, const Staging& s, const int64_t* tap_offsets, const A* base,
                             const A* weight, Vec<A> (&acc)[kRows][kColumns]) {
  constexpr int kVec = kLanes<A>;
  for (int64_t m = 0; m < p.depth; ++m) {
    const A* const plane = base + m * s.size;
    const A* const w = weight + m * p.kernel_h * p.kernel_w;
    if constexpr (kKernel > 0) {
      DWCONV_UNROLL
      for (int column = 0; column < kKernel; ++column) {
        const A* const in = plane + column;
        Vec<A> taps[kKernel];
        DWCONV_UNROLL
        for (int r = 0; r < kKernel; ++r) taps[r] = broadcast(w[r * kKernel + column]);
        DWCONV_UNROLL
        for (int i = 0; i < kRows + kKernel - 1; ++i) {
          Vec<A> x[kColumns];
          DWCONV_UNROLL
          for (int t = 0; t < kColumns; ++t) x[t] = load(in + i * s.pitch + t * kVec);
          DWCONV_UNROLL
          for (int j = 0; j < kRows; ++j) {
            const int r = i - j;
            if (r < 0 || r >= kKernel) continue;
            DWCONV_UNROLL
            for (int t = 0; t < kColumns; ++t) acc[j][t] += x[t] * taps[r];
          }
        }
      }
    } else {
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        for (int64_t column = 0; column < p.kernel_w; ++column) {
          const A* const in = plane + tap_offsets[r * p.kernel_w + column];
          const Vec<A> tap = broadcast(w[r * p.kernel_w + column]);
          DWCONV_UNROLL
          for (int j = 0; j < kRows; ++j) {
            DWCONV_UNROLL
            for (int t = 0; t < kColumns; ++t) acc[j][t] += load(in + j * s.pitch + t * kVec) * tap;
          }
        }
      }
    }
  }
}

template <class O, class A>
DWCONV_INLINE void store_columns(O* out, int64_t step, Vec<A> v, int64_t columns) {
  constexpr int kVec = kLanes<A>;
  if (step == 1) {
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
  for (int i = 0; i < count; ++i) from_accumulate(values[i], out + i * step);
}

template <class O, class A, int kKernel, int kColumns>
DWCONV_INLINE void rows_tile(const DepthwiseProblem& p, const Staging& s, const int64_t* tap_offsets, const A* base,
                             const A* weight, A bias, O* out, int rows, int64_t columns) {
  Vec<A> acc[kRowTile][kColumns];
  DWCONV_UNROLL
  for (int j = 0; j < kRowTile; ++j) {
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) acc[j][t] = broadcast(bias);
  }
  correlate<A, kKernel>(p, s, tap_offsets, base, weight, acc);
  activate_all<A>(acc, p.activation);
  DWCONV_UNROLL
  for (int j = 0; j < kRowTile; ++j) {
    if (j >= rows) break;
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      const int64_t left = columns - t * kLanes<A>;
      if (left > 0) {
        store_columns<O, A>(out + j * p.out_stride_h + t * kLanes<A> * p.out_stride_w, p.out_stride_w, acc[j][t], left);
      }
    }
  }
}

// kKernel == 0: any filter, stride and dilation.
template <class T, class O, int kKernel, int kStride>
void depthwise_forward_nchw_rows(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  static_assert(kStride <= 1, "the staging makes every other stride a stride of 1");
  const DepthwiseProblem& p = args.problem;
  const int64_t row_tiles = (p.out_h + args.rows_per_tile - 1) / args.rows_per_tile;
  const Staging s = staging_of(p, args.rows_per_tile, kRowTile, kVec);
  A* const staged = static_cast<A*>(scratch);
  int64_t* const tap_offsets = reinterpret_cast<int64_t*>(staged + (p.depth * s.size + 1) / 2 * 2);
  fill_tap_offsets(p, s, tap_offsets);
  const int64_t weights_a_channel = p.depth * p.kernel_h * p.kernel_w;

  for (int64_t tile; next_tile(tiles, &tile);) {
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
    for (int64_t y = 0; y < rows; y += kRowTile) {
      const int rows_here = lanes_left(rows - y, kRowTile);
      for (int64_t x = 0; x < p.out_w;) {
        const A* const base = staged + y * s.pitch + x;
        O* const to = out + y * p.out_stride_h + x * p.out_stride_w;
        const int64_t left = p.out_w - x;
        if (left > kVec) {
          rows_tile<O, A, kKernel, 2>(p, s, tap_offsets, base, weight, bias, to, rows_here, left < 2 * kVec ? left : 2 * kVec);
          x += 2 * kVec;
        } else {
          rows_tile<O, A, kKernel, 1>(p, s, tap_offsets, base, weight, bias, to, rows_here, left);
          x += kVec;
        }
      }
    }
  }
}

inline constexpr Layout depthwise_forward_nchw_rows_weight_order = Layout::kNCHW;

// Bytes of scratch a worker needs.
template <class T>
int64_t depthwise_forward_nchw_rows_scratch(const DepthwiseProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t staged = p.depth * staging_of(p, rows_per_tile, kRowTile, kLanes<A>).size;
  return (staged + 1) / 2 * 2 * static_cast<int64_t>(sizeof(A)) + p.kernel_h * p.kernel_w * static_cast<int64_t>(sizeof(int64_t));
}

}  // namespace dwconv::DWCONV_ISA
