// Depthwise correlation, channels last: forward pass, and the input gradient's phases (problem.h).
//
//   out[n, y, x, c] = act(bias[c] + sum_{m, r, s} w[m, r, s, c] * in[n, y*stride_h + r*dilation_h - pad_h, ..., c +
//   m*in_stride_m])
//
// Lanes are channels. A register tile is kTileRows output rows by kColumns output columns by one vector of channels. Each
// input row is walked once; every vector of it is loaded once and used for all outputs it reaches:
//
//   columns in   | 0 1 2 3 4 5 6 7 8 |      kColumns = 7, filter 3x3, stride 1, 2 rows: 4 * 9 input loads and 18 filter
//   columns out    |_0_|_1_| ... |_6_|      loads for 126 FMAs; an input row comes from L2 2 times instead of 3
//
// Filters 3x3, 5x5 and 7x7 at stride 1 and 2 have the loops over taps unrolled; every other filter, stride and dilation
// takes one output row at a time and the taps of a filter row in chunks (chunks slide over the columns just the same).
// Order: row pairs, column tiles, channel vectors, so that all input streams are read forward, C elements at a time.
// Tiles: `rows_per_tile` output rows of one image. Traffic: input and output once where kernel_h input rows fit in L1/L2.
// Samples in the padding read as zero from a zero vector; only tiles that touch the edge pay for the choice (kEdge), and most
// of these do not either (depthwise_row_pair.h). Pixels whose lines collide in L1 are staged (stage_lines.h).
// The plan guarantees: weights and bias packed in the accumulation type, channels padded to a pitch that leaves a whole
// vector readable at every channel (weight_pitch).
#pragma once

#include "cpu/kernels/cores.h"
#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

template <class T, bool kEdge, class A, int kRows, int kColumns>
DWCONV_INLINE void store_tile(const CpuProblem& p, const NhwcTile& tile, const NhwcOutput& out, int64_t c, int lanes,
                              Vec<A> (&acc)[kRows][kColumns]) {
  activate_all<A>(acc, p.activation);
  store_values<T, !kEdge, A>(acc, tile.rows, tile.columns, lanes, out.at(tile.y, tile.x, c));
}

template <class A, int kRows, int kColumns>
DWCONV_INLINE void start_tile(const DepthwiseArgs& args, int64_t c, Vec<A> (&acc)[kRows][kColumns]) {
  const Vec<A> start = args.bias ? load(static_cast<const A*>(args.bias) + c) : Vec<A>{};
  DWCONV_UNROLL
  for (int j = 0; j < kRows; ++j) {
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) acc[j][t] = start;
  }
}

// A tile of a square filter at a known stride, for channels c, c + kVec, ...
template <class T, int kKernel, int kStride, int kColumns, bool kEdge>
void square_tile(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, const NhwcTile& tile, int64_t c,
                 int64_t c_end) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t pitch = args.weight_pitch;
  const int64_t origin_h = tile.y * kStride - p.pad_h;
  const T* const corner = image + origin_h * p.in_stride_h + (tile.x * kStride - p.pad_w) * p.in_stride_w;
  const int64_t row_filter = kKernel * pitch;
  for (; c < c_end; c += kLanes<A>) {
    const int lanes = lanes_left(c_end - c, kLanes<A>);
    Vec<A> acc[kTileRows][kColumns];
    start_tile<A>(args, c, acc);
    for (int64_t m = 0; m < p.depth; ++m) {
      const T* const in = corner + m * p.in_stride_m + c;
      const A* const filter = static_cast<const A*>(args.weight) + m * kKernel * row_filter + c;
      for (int64_t i = 0; i < (tile.rows == kTileRows ? kKernel + kStride : kKernel); ++i) {
        if (static_cast<uint64_t>(origin_h + i) >= static_cast<uint64_t>(p.in_h)) continue;
        const T* const row = in + i * p.in_stride_h;
        const A* const taps = filter + i * row_filter;
        if (i < kStride || tile.rows == 1) {
          add_input_row<T, A, kKernel, kStride, 0, 1, kEdge>(row, p.in_stride_w, tile.valid, taps, pitch, lanes, acc);
        } else if (i < kKernel) {
          add_input_row<T, A, kKernel, kStride, 0, 2, kEdge>(row, p.in_stride_w, tile.valid, taps, pitch, lanes, acc);
        } else {
          add_input_row<T, A, kKernel, kStride, 1, 2, kEdge>(row, p.in_stride_w, tile.valid, taps - kStride * row_filter, pitch,
                                                             lanes, acc);
        }
      }
    }
    store_tile<T, kEdge, A>(p, tile, out, c, lanes, acc);
  }
}

// kTaps taps of one filter row, from tap s on.
template <class T, class A, int kTaps, bool kEdge, int kColumns>
DWCONV_INLINE void add_chunk(const CpuProblem& p, const T* row, int64_t origin_w, int64_t s, const A* filter, int64_t pitch,
                             int lanes, Vec<A> (&acc)[1][kColumns]) {
  const int64_t first = origin_w + s * p.dilation_w;
  constexpr int kCount = kColumns - 1 + kTaps;
  uint32_t valid = 0;
  if (kEdge) {
    valid = valid_columns(first, p.stride_w, p.in_w, kCount);
    if (valid == 0) return;
  }
  add_input_row<T, A, kTaps, 1, 0, 1, kEdge>(row + first * p.in_stride_w, p.stride_w * p.in_stride_w, valid, filter + s * pitch,
                                             pitch, lanes, acc);
}

// One output row of any filter, stride and dilation. Where dilation equals stride (both 1, as a rule), tap s at column t
// meets the sample of tap s + 1 at column t - 1, and the taps of a chunk share their loads.
template <class T, int kColumns, bool kEdge>
void general_tile(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, const NhwcTile& tile, int64_t c,
                  int64_t c_end) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t pitch = args.weight_pitch;
  const int64_t origin_h = tile.y * p.stride_h - p.pad_h;
  const int64_t origin_w = tile.x * p.stride_w - p.pad_w;
  const Range rows = filter_range(origin_h, p.dilation_h, p.kernel_h, p.in_h);
  const int64_t sliding_end = p.dilation_w == p.stride_w ? p.kernel_w : 0;
  for (; c < c_end; c += kLanes<A>) {
    const int lanes = lanes_left(c_end - c, kLanes<A>);
    Vec<A> acc[1][kColumns];
    start_tile<A>(args, c, acc);
    for (int64_t m = 0; m < p.depth; ++m) {
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* const row = image + m * p.in_stride_m + (origin_h + r * p.dilation_h) * p.in_stride_h + c;
        const A* const filter = static_cast<const A*>(args.weight) + (m * p.kernel_h + r) * p.kernel_w * pitch + c;
        const auto add = [&]<int kTaps>(int64_t s) {
          add_chunk<T, A, kTaps, kEdge>(p, row, origin_w, s, filter, pitch, lanes, acc);
        };
        int64_t s = 0;
        for (; s + kChunk <= sliding_end; s += kChunk) add.template operator()<kChunk>(s);
        if (kChunk > 4 && s + 4 <= sliding_end) add.template operator()<4>(s), s += 4;
        if constexpr (kManyTiles) {
          if (s + 3 == sliding_end) add.template operator()<3>(s), s += 3;
          if (s + 2 == sliding_end) add.template operator()<2>(s), s += 2;
        }
        for (; s < p.kernel_w; ++s) add.template operator()<1>(s);
      }
    }
    store_tile<T, kEdge, A>(p, tile, out, c, lanes, acc);
  }
}

template <class T, int kKernel, int kStride, int kColumns, bool kEdge>
DWCONV_INLINE void any_tile(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, const NhwcTile& tile, int64_t c,
                            int64_t c_end) {
  if constexpr (kKernel > 0) {
    square_tile<T, kKernel, kStride, kColumns, kEdge>(args, image, out, tile, c, c_end);
  } else {
    general_tile<T, kColumns, kEdge>(args, image, out, tile, c, c_end);
  }
}

// All channels of one tile of kColumns columns, `columns` of which exist.
template <class T, int kKernel, int kStride, int kColumns>
DWCONV_INLINE void column_tile(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, int64_t y, int rows, int64_t x) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t stride_w = kKernel ? kStride : p.stride_w;
  const int64_t first = x * stride_w - p.pad_w;
  const int64_t last = first + (kColumns - 1) * stride_w + (p.kernel_w - 1) * p.dilation_w;
  NhwcTile tile = {y, x, rows, lanes_left(p.out_w - x, kColumns), 0};
  if (kKernel) tile.valid = valid_columns(first, 1, p.in_w, (kColumns - 1) * kStride + kKernel);
  int64_t c = 0;
  const int64_t whole = p.channels - p.channels % kLanes<A>;
  if constexpr (kPaired<kKernel, kStride>) {
    if (try_row_pair<T, kKernel, kStride, kColumns>(args, image, out, tile, whole)) c = whole;
  }
  if constexpr (kManyTiles && !kPaired<kKernel, kStride>) {  // else what is left is single rows, and sums over several planes
    if (c < whole && tile.columns == kColumns && first >= 0 && last < p.in_w) {
      any_tile<T, kKernel, kStride, kColumns, false>(args, image, out, tile, 0, whole);
      c = whole;
    }
  }
  if (c < p.channels) any_tile<T, kKernel, kStride, kColumns, true>(args, image, out, tile, c, p.channels);
}

// Output rows [y_begin, y_end) of one image.
template <class T, int kKernel, int kStride>
void forward_rows(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, int64_t y_begin, int64_t y_end) {
  constexpr int kRows = kKernel ? kTileRows : 1;
  constexpr int kWide = kWideTile<kKernel>, kNarrow = kNarrowTile<kKernel, kStride>;
  const CpuProblem& p = args.problem;
  const int64_t out_w = p.out_w;
  // Where a tile of eight is wider than the others, most of them have to be inside the image.
  const bool few = kWide > kWideColumns && (out_w < 2 * kWide || p.stride_w > 1);
  const int64_t wide = few ? 0 : wide_columns(out_w, kWide, kNarrow);
  SequentialRows<T> sequential_rows(p.prefetch_input, image, p.in_stride_h, p.in_stride_w, p.in_w);
  for (int64_t y = y_begin; y < y_end; y += kRows) {
    if (y_end - y < kRows && y > y_begin) y = y_end - kRows;  // a pair again rather than a single row
    const int rows = lanes_left(y_end - y, kRows);
    sequential_rows.read(input_rows(p, y, rows));
    prefetch_rows_for_write(p.prefetch_output, out.data, out.row, {y, y + rows});
    if constexpr (kPaired<kKernel, kStride>) {
      if (rows == kRows && try_few_channels<T, kKernel, kStride>(args, image, out, y, wide)) continue;
    }
    int64_t x = 0;
    for (; x < wide; x += kWide) column_tile<T, kKernel, kStride, kWide>(args, image, out, y, rows, x);
    for (; x < out_w; x += kNarrow) column_tile<T, kKernel, kStride, kNarrow>(args, image, out, y, rows, x);
  }
}

// A register tile reads a line's vectors one after the other.
template <class T>
DWCONV_INLINE bool stages_forward(const CpuProblem& p) {
  const int64_t rows = (kTileRows - 1) * p.stride_h + p.kernel_h, columns = (kWideColumns - 1) * p.stride_w + p.kernel_w;
  return p.depth == 1 && lines_collide<T>(p.channels, rows * columns, p.l1_ways);
}

// Output rows a staged piece: 24 KB of lines, but no fewer than the filter has.
template <class T>
DWCONV_INLINE int64_t staged_piece_rows(const CpuProblem& p) {
  constexpr int64_t kBytes = 24 << 10;
  const int64_t rows = (kBytes / (kStagedBytes * (p.in_w > 0 ? p.in_w : 1)) - p.kernel_h * p.dilation_h) / p.stride_h;
  return rows > p.kernel_h ? rows / kTileRows * kTileRows : p.kernel_h + 1;
}

// The same from staged lines, kStaged channels at a time.
template <class T, int kKernel, int kStride>
void staged_forward_rows(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, int64_t y_begin, int64_t y_end,
                         T* staged) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  DepthwiseArgs piece = args;
  CpuProblem& q = piece.problem;
  q.in_stride_w = kStaged<T>, q.in_stride_h = p.in_w * kStaged<T>;
  q.prefetch_input = q.prefetch_output = false;
  SequentialRows<T> sequential_rows(p.prefetch_input, image, p.in_stride_h, p.in_stride_w, p.in_w);
  const int64_t most = staged_piece_rows<T>(p);
  for (int64_t y = y_begin; y < y_end; y += most) {
    const int64_t rows = y_end - y < most ? y_end - y : most;
    const Range in_rows = crop_input(p, y, rows, &q);
    sequential_rows.read(in_rows);
    prefetch_rows_for_write(p.prefetch_output, out.data, out.row, {y, y + rows});
    for (int64_t c = 0; c < p.channels; c += kStaged<T>) {
      q.channels = lanes_left(p.channels - c, static_cast<int>(kStaged<T>));
      stage_lines<T>(image + in_rows.begin * p.in_stride_h + c, q.in_h, p.in_w, p.in_stride_h, p.in_stride_w, q.channels, staged);
      piece.weight = static_cast<const A*>(args.weight) + c;
      piece.bias = args.bias ? static_cast<const A*>(args.bias) + c : nullptr;
      forward_rows<T, kKernel, kStride>(piece, staged, out.at(y, 0, c), 0, rows);
    }
  }
}

// kKernel == 0: any filter, stride and dilation. scratch: where it is null, nothing is staged.
template <class T, int kKernel, int kStride>
void depthwise_forward_nhwc(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  const bool staged = kKernel > 0 && scratch != nullptr && stages_forward<T>(p);
  const NhwcOutput output = output_of(args);
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t n = tile / row_tiles;
    const int64_t y_begin = (tile % row_tiles) * args.rows_per_tile;
    const int64_t y_end = y_begin + args.rows_per_tile < p.out_h ? y_begin + args.rows_per_tile : p.out_h;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
    NhwcOutput out = output;
    out.data += n * p.out_stride_n * element_size(p.out_dtype);
    if (staged) {
      staged_forward_rows<T, kKernel, kStride>(args, image, out, y_begin, y_end, static_cast<T*>(scratch));
    } else {
      forward_rows<T, kKernel, kStride>(args, image, out, y_begin, y_end);
    }
  }
}

inline constexpr Layout depthwise_forward_nhwc_weight_order = Layout::kNHWC;

template <class T, int kKernel>
int64_t depthwise_forward_nhwc_scratch(const CpuProblem& p, int64_t) {
  if (kKernel == 0 || !stages_forward<T>(p)) return 0;
  return most_input_rows(p, staged_piece_rows<T>(p)) * p.in_w * kStagedBytes;
}

}  // namespace dwconv::DWCONV_ISA
