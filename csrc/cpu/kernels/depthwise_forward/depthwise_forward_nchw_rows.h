// Depthwise correlation, NCHW: forward pass, and the input gradient's phases (problem.h).
//
// Lanes are output columns: for wide rows, and for too few planes to fill a vector (depthwise_forward_nchw_transposed.h).
// A tile is `rows_per_tile` output rows of one (n, c) plane; its input rows are first staged in scratch (stage_nchw.h), which
// leaves a stride-1 correlation without edges:
//
//   out[y, x] = act(bias + sum_taps w[tap] * staged[tap_offset + y * pitch + x])
//
// The register tile is kRowTile rows by one or two vectors. With a square filter at stride 1 a loaded vector serves every
// output row it reaches: (kRowTile + kKernel - 1) loads a vector column for kRowTile * kKernel FMAs. Where rows or columns are
// left over, the last tile lies over the one before and computes some outputs again, whole:
//
//   28 columns, 8 lanes   | 0..7 | 8..15 |   | 12..19 | 20..27 |
//
// Traffic: input and output once, plus kernel_h - 1 halo rows per tile, plus one pass through L1/L2 for the staging. Where they
// come from afar, the next rows of both, which lie right behind, are prefetched while a row of register tiles is computed.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/sequential_rows.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/stage_nchw.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kRowTile = 4;

// What all register tiles have in common; a copy of its own, which no store can be taken to change.
struct RowsFrame {
  int64_t pitch, plane;  // elements of a staged row, of a staged plane
  int64_t depth, taps;
  int64_t out_w, out_row, out_step;
  DType dtype;  // of the output; the staged rows are of the accumulation type
  const int64_t* tap_offsets;
  Activation activation;
};

// A tile: some rows of one output plane.
template <class A>
struct RowsTile {
  const A* staged;
  const A* weight;
  A bias;
  char* out;
  int64_t rows;
};

// acc[j][t] += the correlation at `base` + j * pitch + t * next, over all planes and taps.
template <class A, int kKernel, int kRows, int kColumns>
DWCONV_INLINE void correlate(const RowsFrame& f, const A* base, int64_t next, const A* weight, Vec<A> (&acc)[kRows][kColumns]) {
  for (int64_t m = 0; m < f.depth; ++m, base += f.plane, weight += f.taps) {
    if constexpr (kKernel > 0) {
      DWCONV_UNROLL
      for (int column = 0; column < kKernel; ++column) {
        Vec<A> taps[kKernel];
        DWCONV_UNROLL
        for (int r = 0; r < kKernel; ++r) taps[r] = broadcast(weight[r * kKernel + column]);
        const A* in = base + column;
        DWCONV_UNROLL
        for (int i = 0; i < kRows + kKernel - 1; ++i, in += f.pitch) {
          Vec<A> x[kColumns];
          DWCONV_UNROLL
          for (int t = 0; t < kColumns; ++t) x[t] = load(in + t * next);
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
      for (int64_t i = 0; i < f.taps; ++i) {
        const A* in = base + f.tap_offsets[i];
        const Vec<A> tap = broadcast(weight[i]);
        DWCONV_UNROLL
        for (int j = 0; j < kRows; ++j, in += f.pitch) {
          DWCONV_UNROLL
          for (int t = 0; t < kColumns; ++t) acc[j][t] += load(in + t * next) * tap;
        }
      }
    }
  }
}

// Up to `columns` values, `step` apart; `room`: elements from `out` on that are this tile's and not complete yet.
template <class O, class A>
DWCONV_INLINE void store_columns(O* out, int64_t step, Vec<A> v, int64_t columns, int64_t room) {
  constexpr int kVec = kLanes<A>;
  if (step != 1) {  // a phase of a strided input gradient
    A values[kVec];
    store(values, v);
    for (int i = 0; i < lanes_left(columns, kVec); ++i) from_accumulate(values[i], out + i * step);
  } else if (room >= kVec) {  // what lies past a narrow row is the next one, which is stored after it
    store(out, v);
  } else {
    store_lanes(out, v, lanes_left(columns, kVec));
  }
}

// Rows of a register tile, from row y of `tile` and column x on, to where they belong; vectors are `next` columns apart.
// kWhole: output rows are dense and at least a vector wide.
template <class O, class A, bool kWhole, int kColumns>
DWCONV_INLINE void store_rows(const RowsFrame& f, const RowsTile<A>& tile, int64_t y, int64_t x, int64_t next,
                              const Vec<A> (&values)[kRowTile][kColumns]) {
  O* out = reinterpret_cast<O*>(tile.out) + y * f.out_row + x * f.out_step;
  DWCONV_UNROLL
  for (int j = 0; j < kRowTile; ++j, out += f.out_row) {
    if (y + j >= tile.rows) break;
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      if constexpr (kWhole) {
        store(out + t * next, values[j][t]);
      } else {
        const int64_t columns = f.out_w - x - t * next;
        const int64_t below = f.out_row == f.out_w ? (tile.rows - 1 - y - j) * f.out_w : 0;
        store_columns<O, A>(out + t * next * f.out_step, f.out_step, values[j][t], columns, columns + below);
      }
    }
  }
}

// Where the output is not of the accumulation type: out of line, so that its kinds share the register tiles.
template <class A, bool kWhole, int kColumns>
DWCONV_NOINLINE void store_rows_converted(const RowsFrame& f, const RowsTile<A>& tile, int64_t y, int64_t x, int64_t next,
                                          const Vec<A> (&values)[kRowTile][kColumns]) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (f.dtype == DType::kBFloat16) return store_rows<BFloat16, A, kWhole>(f, tile, y, x, next, values);
    return store_rows<Float16, A, kWhole>(f, tile, y, x, next, values);
  }
}

// kRowTile rows from row y on, kColumns vectors of columns from column x on, each `next` columns after the one before.
template <class A, int kKernel, int kColumns, bool kWhole>
DWCONV_INLINE void rows_tile(const RowsFrame& f, const RowsTile<A>& tile, int64_t y, int64_t x, int64_t next) {
  Vec<A> acc[kRowTile][kColumns];
  DWCONV_UNROLL
  for (int j = 0; j < kRowTile; ++j) {
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) acc[j][t] = broadcast(tile.bias);
  }
  correlate<A, kKernel>(f, tile.staged + y * f.pitch + x, next, tile.weight, acc);
  activate_all<A>(acc, f.activation);
  if (__builtin_expect(f.dtype == kDType<A>, 1)) {
    store_rows<A, A, kWhole>(f, tile, y, x, next, acc);
  } else {
    Vec<A> copy[kRowTile][kColumns];  // of which the function has the address, so that the sums stay in registers
    DWCONV_UNROLL
    for (int i = 0; i < kRowTile * kColumns; ++i) copy[i / kColumns][i % kColumns] = acc[i / kColumns][i % kColumns];
    store_rows_converted<A, kWhole>(f, tile, y, x, next, copy);
  }
}

// kRowTile rows from row y on. Not inlined: the input's types share it.
template <class A, int kKernel, bool kWhole>
DWCONV_NOINLINE void tile_of_rows(const RowsFrame& frame, const RowsTile<A>& tile, int64_t y) {
  constexpr int kVec = kLanes<A>;
  const RowsFrame f = frame;
  int64_t x = 0;
  for (; f.out_w - x >= 2 * kVec; x += 2 * kVec) rows_tile<A, kKernel, 2, kWhole>(f, tile, y, x, kVec);
  const int64_t left = f.out_w - x;
  if (left > kVec) {
    rows_tile<A, kKernel, 2, kWhole>(f, tile, y, x == 0 ? 0 : f.out_w - 2 * kVec, x == 0 ? left - kVec : kVec);
  } else if (left > 0) {
    rows_tile<A, kKernel, 1, kWhole>(f, tile, y, x == 0 ? 0 : f.out_w - kVec, 0);
  }
}

// need(rows): called before the staged rows that output rows [0, rows) of the tile need are read.
template <class A, int kKernel, bool kWhole, class Need>
DWCONV_INLINE void rows_of_plane(const RowsFrame& f, const RowsTile<A>& tile, Need need) {
  for (int64_t y = 0; y < tile.rows; y += kRowTile) {
    if (y > 0 && tile.rows - y < kRowTile) y = tile.rows - kRowTile;
    need(y + kRowTile < tile.rows ? y + kRowTile : tile.rows);
    tile_of_rows<A, kKernel, kWhole>(f, tile, y);
  }
}

// kKernel == 0: any filter, stride and dilation.
template <class T, int kKernel, int kStride>
void depthwise_forward_nchw_rows(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  static_assert(kStride <= 1, "the staging makes every other stride a stride of 1");
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  const Staging s = staging_of(p, args.rows_per_tile, kRowTile, kLanes<A>);
  A* const staged = static_cast<A*>(scratch);
  int64_t* const tap_offsets = reinterpret_cast<int64_t*>(staged + (p.depth * s.size + 1) / 2 * 2);
  fill_tap_offsets(p, s, tap_offsets);
  const RowsFrame frame = {s.pitch,   s.size,      p.depth,     p.kernel_h * p.kernel_w, p.out_w, p.out_stride_h, p.out_stride_w,
                           kDType<T>, tap_offsets, p.activation};
  const T* const input_end = static_cast<const T*>(args.input) + p.batch * p.in_stride_n;
  T* const output_end = static_cast<T*>(args.output) + p.batch * p.out_stride_n;
  const bool whole = p.out_stride_w == 1 && p.out_w >= kLanes<A>;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t plane = tile / row_tiles;
    const int64_t n = plane / p.channels;
    const int64_t c = plane % p.channels;
    const int64_t y0 = (tile % row_tiles) * args.rows_per_tile;
    const int64_t rows = y0 + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y0;
    const T* const input = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c;
    T* const out = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y0 * p.out_stride_h;
    const RowsTile<A> here = {
        staged,
        static_cast<const A*>(args.weight) + c * frame.depth * frame.taps,
        args.bias ? static_cast<const A*>(args.bias)[c] : A(0),
        reinterpret_cast<char*>(out),
        rows,
    };
    const int64_t first = y0 * p.stride_h - p.pad_h;  // input row
    int64_t ready = 0;  // padded rows; they are staged as they are needed, and read while they are in L1
    const auto need = [&](int64_t out_rows) {
      const int64_t end = padded_rows(p, out_rows);
      if (end <= ready) return;
      for (int64_t m = 0; m < p.depth; ++m) {
        const T* const from = input + m * p.in_stride_m;
        if (p.prefetch_input) {
          prefetch(from + (first + end) * p.in_stride_h, kRowTile * p.stride_h * p.in_stride_h, input_end);
        }
        stage_rows(p, s, from, y0, ready, end, staged + m * s.size);
      }
      if (p.prefetch_output) prefetch_for_write(out + out_rows * p.out_stride_h, kRowTile * p.out_stride_h, output_end);
      ready = end;
    };
    if (whole) {
      rows_of_plane<A, kKernel, true>(frame, here, need);
    } else {
      rows_of_plane<A, kKernel, false>(frame, here, need);
    }
  }
}

inline constexpr Layout depthwise_forward_nchw_rows_weight_order = Layout::kNCHW;

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t depthwise_forward_nchw_rows_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t staged = p.depth * staging_of(p, rows_per_tile, kRowTile, kLanes<A>).size;
  return (staged + 1) / 2 * 2 * static_cast<int64_t>(sizeof(A)) + p.kernel_h * p.kernel_w * static_cast<int64_t>(sizeof(int64_t));
}

}  // namespace dwconv::DWCONV_ISA
