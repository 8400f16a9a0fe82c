// Depthwise correlation, channels last: the register tile, and a pair of output rows with next to nothing left to decide inside
// its tiles (depthwise_forward_nhwc.h takes everything else, and says what a tile is).
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/args.h"
#include "cpu/kernels/sequential_rows.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

#if DWCONV_VECTOR_REGISTERS == 32
inline constexpr int kNarrowColumns = 7, kWideColumns = 8;  // 16 sums + 14 taps + 1 input of 32 registers at 7x7
#else
inline constexpr int kNarrowColumns = 4, kWideColumns = 4;  // 8 sums + 6 taps + 1 input of 16 registers at 3x3
#endif
// Where the rows of kernels.inc have filters of a known size: elsewhere (the baseline, and float64) general ones are enough.
template <class A>
inline constexpr bool kUnrollsFilters = !kBaseline && sizeof(A) == sizeof(float);
// In the baseline fewer kinds of tiles are compiled: right is enough there.
inline constexpr bool kManyTiles = !kBaseline;
// A row is cut into tiles of two widths, so that (but for a few small widths) none is left in part.
// Squares that RowPair takes: at most kKernel / 2 columns on either side in the padding, which at stride 1 are all or none.
template <int kKernel, int kStride>
inline constexpr bool kPaired = kKernel == 3 || (kKernel > 0 && kStride == 1);
template <int kKernel, int kStride>
inline constexpr int kNarrowTile = kPaired<kKernel, kStride> ? kWideColumns - 1 : kNarrowColumns;
// Any other filter goes by single rows and chunks of a filter row: eight sums are the least that keep two FMAs of four cycles
// each busy, and 14 sums and 8 taps take half the loads of 8 and 4 (a third of an input a multiply-add).
#if DWCONV_VECTOR_REGISTERS == 32
inline constexpr int kGeneralColumns = 14, kChunk = 8;
#else
inline constexpr int kGeneralColumns = 8, kChunk = 4;
#endif
template <int kKernel>
inline constexpr int kWideTile = kKernel == 0 ? kGeneralColumns : kWideColumns;
inline constexpr int kTileRows = 2;

alignas(64) static const char kZeros[64] = {};  // what a sample in the padding reads

// The filter rows (or columns) whose sample origin + index * dilation lies in [0, size).
DWCONV_INLINE Range filter_range(int64_t origin, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = origin >= 0 ? 0 : ceil_div(-origin, dilation);
  int64_t end = size <= origin ? 0 : ceil_div(size - origin, dilation);
  if (end > taps) end = taps;
  if (begin > end) begin = end;
  return {begin, end};
}

// Bit i set where column first + i * step lies in [0, in_w), i < count <= 31.
DWCONV_INLINE uint32_t valid_columns(int64_t first, int64_t step, int64_t in_w, int count) {
  if (step == 1) {
    const int64_t end = in_w - first < count ? in_w - first : count;
    const int64_t begin = first < 0 ? -first : 0;
    return begin < end ? ((1u << end) - 1u) & ~((1u << begin) - 1u) : 0u;
  }
  uint32_t mask = 0;
  for (int i = 0; i < count; ++i, first += step) {
    mask |= uint32_t(static_cast<uint64_t>(first) < static_cast<uint64_t>(in_w)) << i;
  }
  return mask;
}

// One input row's share of output rows [kFirst, kLast): acc[j][t] += sum_s tap[j][s] * in[(t * kStride + s) * step].
// `filter` is the filter row that meets row kFirst; the next output row meets the one kStride above. The first kLeft and the
// last kRight columns are in the padding.
template <class T, class A, int kTaps, int kStride, int kFirst, int kLast, bool kEdge, int kLeft = 0, int kRight = 0, int kRows,
          int kColumns>
DWCONV_INLINE void add_input_row(const T* in, int64_t step, uint32_t valid, const A* filter, int64_t pitch, int lanes,
                                 Vec<A> (&acc)[kRows][kColumns]) {
  Vec<A> taps[kLast - kFirst][kTaps];
  DWCONV_UNROLL
  for (int j = 0; j < kLast - kFirst; ++j) {
    DWCONV_UNROLL
    for (int s = 0; s < kTaps; ++s) taps[j][s] = load(filter + (s - j * kStride * kTaps) * pitch);
  }
  DWCONV_UNROLL
  for (int i = kLeft; i < (kColumns - 1) * kStride + kTaps - kRight; ++i) {
    const T* at = in + i * step;
    if (kEdge) at = (valid >> i) & 1 ? at : reinterpret_cast<const T*>(kZeros);
    const Vec<A> x = load_some<!kEdge>(at, lanes);
    DWCONV_UNROLL
    for (int j = kFirst; j < kLast; ++j) {
      DWCONV_UNROLL
      for (int t = 0; t < kColumns; ++t) {
        const int s = i - t * kStride;
        if (s >= 0 && s < kTaps) acc[j][t] += x * taps[j - kFirst][s];
      }
    }
  }
}

template <class T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<Float16> = DType::kFloat16;

// Where a channels_last kernel writes: the input's type T, or another where a fused block's scratch is the output, or float32 was
// staged for a kernel of 16-bit elements. Its own type is stored in place, any other out of line, so that the register tiles are
// compiled once for all of them.
struct NhwcOutput {
  char* data;
  int64_t row, column;  // bytes from one to the next
  DType dtype;

  DWCONV_INLINE NhwcOutput at(int64_t y, int64_t x, int64_t c) const {
    return {data + y * row + x * column + c * element_size(dtype), row, column, dtype};
  }
};

DWCONV_INLINE NhwcOutput output_of(const DepthwiseArgs& args) {
  const CpuProblem& p = args.problem;
  const int64_t unit = element_size(p.out_dtype);
  return {static_cast<char*>(args.output), p.out_stride_h * unit, p.out_stride_w * unit, p.out_dtype};
}

// rows x columns vectors, `lanes` lanes of each, kColumns vectors from row to row.
template <class O, class A>
DWCONV_INLINE void store_as(const Vec<A>* values, int pitch, int rows, int columns, int lanes, const NhwcOutput& to) {
  for (int j = 0; j < rows; ++j) {
    for (int t = 0; t < columns; ++t) {
      store_lanes(reinterpret_cast<O*>(to.data + j * to.row + t * to.column), values[j * pitch + t], lanes);
    }
  }
}
template <class A>
DWCONV_NOINLINE void store_other(const Vec<A>* values, int pitch, int rows, int columns, int lanes, const NhwcOutput& to) {
  if constexpr (sizeof(A) == sizeof(float)) {
    switch (to.dtype) {
      case DType::kFloat32:
        return store_as<float, A>(values, pitch, rows, columns, lanes, to);
      case DType::kBFloat16:
        return store_as<BFloat16, A>(values, pitch, rows, columns, lanes, to);
      case DType::kFloat16:
        return store_as<Float16, A>(values, pitch, rows, columns, lanes, to);
      case DType::kFloat64:
        return;
    }
  }
}

// The first `rows` rows and `columns` columns of a register tile. kWhole: all columns and lanes.
template <class T, bool kWhole, class A, int kRows, int kColumns>
DWCONV_INLINE void store_values(const Vec<A> (&values)[kRows][kColumns], int rows, int columns, int lanes, const NhwcOutput& to) {
  if (__builtin_expect(to.dtype != kDType<T>, 0)) {
    Vec<A> copy[kRows * kColumns];  // the values themselves would be in memory all along if a function had their address
    DWCONV_UNROLL
    for (int i = 0; i < kRows * kColumns; ++i) copy[i] = values[i / kColumns][i % kColumns];
    return store_other<A>(copy, kColumns, rows, kWhole ? kColumns : columns, lanes, to);
  }
  DWCONV_UNROLL
  for (int j = 0; j < kRows; ++j) {
    if (j >= rows) break;
    DWCONV_UNROLL
    for (int t = 0; t < kColumns; ++t) {
      if (!kWhole && t >= columns) break;
      store_some<kWhole>(reinterpret_cast<T*>(to.data + j * to.row + t * to.column), values[j][t], lanes);
    }
  }
}

// Where a register tile lies: its first output row and column, its extent, and its input columns inside the image.
struct NhwcTile {
  int64_t y, x;
  int rows, columns;
  uint32_t valid;
};

// How many columns go to tiles of `wide` columns, that tiles of `narrow` may take the rest; where no two numbers of tiles make
// `columns`, the last tile is in part.
static inline int64_t wide_columns(int64_t columns, int64_t wide, int64_t narrow) {
  for (int64_t rest = 0; rest < wide * narrow && rest <= columns; rest += narrow) {
    if ((columns - rest) % wide == 0) return columns - rest;
  }
  return columns / wide * wide;
}

// All input rows that a tile of two output rows reads and the image has (`rows`). Unrolled at 3x3; elsewhere the FMAs are the
// larger part.
template <class T, class A, int kKernel, int kStride, int kLeft, int kRight, int kColumns>
DWCONV_INLINE void add_input_rows(const T* in, int64_t row_step, int64_t step, uint32_t rows, const A* filter, int64_t pitch,
                                  Vec<A> (&acc)[kTileRows][kColumns]) {
  const auto add = [&]<bool kFirst, bool kLast>(int64_t row) {
    if (!((rows >> row) & 1)) return;
    constexpr int kBegin = kFirst ? 0 : 1, kEnd = kLast ? 2 : 1;
    const A* const taps = filter + (row - kBegin * kStride) * kKernel * pitch;
    add_input_row<T, A, kKernel, kStride, kBegin, kEnd, false, kLeft, kRight>(in + row * row_step, step, 0, taps, pitch,
                                                                              kLanes<A>, acc);
  };
  if constexpr (kKernel == 3) {
    add.template operator()<true, false>(0);
    if constexpr (kStride == 2) add.template operator()<true, false>(1);
    if constexpr (kStride == 1) add.template operator()<true, true>(1);
    add.template operator()<true, true>(2);
    add.template operator()<false, true>(3);
    if constexpr (kStride == 2) add.template operator()<false, true>(4);
  } else {
    int64_t row = 0;
    for (; row < kStride; ++row) add.template operator()<true, false>(row);
    for (; row < kKernel; ++row) add.template operator()<true, true>(row);
    for (; row < kKernel + kStride; ++row) add.template operator()<false, true>(row);
  }
}

// What a pair of output rows has in common for all of its tiles and channels.
template <class T, int kKernel, int kStride>
struct RowPair {
  using A = typename AccumulateType<T>::type;
  static constexpr int kPad = kKernel / 2;

  // y: the first of the two rows.
  RowPair(const DepthwiseArgs& args, const T* image, const NhwcOutput& output, int64_t y)
      : step(args.problem.in_stride_w),
        row_step(args.problem.in_stride_h),
        pitch(args.weight_pitch),
        filter(static_cast<const A*>(args.weight)),
        bias(static_cast<const A*>(args.bias)),
        activation(args.problem.activation),
        expects(args.problem.prefetch_next_output) {
    const CpuProblem& p = args.problem;
    const int64_t origin_h = y * kStride - p.pad_h;
    in = image + origin_h * row_step - p.pad_w * step;
    out = output.at(y, 0, 0);
    for (int i = 0; i < kKernel + kStride; ++i) {
      rows |= uint32_t(static_cast<uint64_t>(origin_h + i) < static_cast<uint64_t>(p.in_h)) << i;
    }
  }

  // A tile at column x for one vector of channels: nothing is left to decide, a third of square_tile's instructions at 3x3.
  template <int kColumns, int kLeft, int kRight>
  DWCONV_INLINE void tile(int64_t x, int64_t c) const {
    Vec<A> acc[kTileRows][kColumns];
    const Vec<A> start = bias ? load(bias + c) : Vec<A>{};
    DWCONV_UNROLL
    for (int j = 0; j < kTileRows; ++j) {
      DWCONV_UNROLL
      for (int t = 0; t < kColumns; ++t) acc[j][t] = start;
    }
    add_input_rows<T, A, kKernel, kStride, kLeft, kRight>(in + x * kStride * step + c, row_step, step, rows, filter + c, pitch,
                                                          acc);
    activate_all<A>(acc, activation);
    const NhwcOutput to = out.at(0, x, c);
    if (expects) {
      DWCONV_UNROLL
      for (int j = 0; j < kTileRows; ++j) {
        DWCONV_UNROLL
        for (int t = 0; t < kColumns; ++t) __builtin_prefetch(to.data + j * to.row + (kColumns + t) * to.column, 1);
      }
    }
    store_values<T, true, A>(acc, kTileRows, kColumns, kLanes<A>, to);
  }

  template <int kColumns, int kLeft, int kRight>
  void all_channels(int64_t x, int64_t c_end) const {
    for (int64_t c = 0; c < c_end; c += kLanes<A>) tile<kColumns, kLeft, kRight>(x, c);
  }

  // All tiles: `wide` columns in wide tiles, the others in narrow ones; left, right: the first tile's first and the last tile's
  // last kPad columns are in the padding.
  void all_columns(int64_t wide, int64_t out_w, bool left, bool right, int64_t c_end) const {
    constexpr int kNarrow = kNarrowTile<kKernel, kStride>;
    const auto edges = [&]<int kColumns>(int64_t x) {
      if (x + kColumns == out_w && right) {
        x == 0 && left ? all_channels<kColumns, kPad, kPad>(0, c_end) : all_channels<kColumns, 0, kPad>(x, c_end);
      } else {
        x == 0 && left ? all_channels<kColumns, kPad, 0>(0, c_end) : all_channels<kColumns, 0, 0>(x, c_end);
      }
    };
    int64_t x = 0;
    for (; x < wide; x += kWideColumns) edges.template operator()<kWideColumns>(x);
    for (; x < out_w; x += kNarrow) edges.template operator()<kNarrow>(x);
  }

  int64_t step, row_step, pitch;
  const A* filter;
  const A* bias;
  Activation activation;
  bool expects;  // the next tile's output
  const T* in;   // of the tile at column 0, the padding included
  NhwcOutput out;
  uint32_t rows = 0;  // of the input rows a tile reads, those inside the image
};

// Whether RowPair did the tile: two rows, and all or none of kPad columns on either side in the padding.
template <class T, int kKernel, int kStride, int kColumns>
DWCONV_INLINE bool try_row_pair(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, const NhwcTile& tile,
                                int64_t c_end) {
  constexpr int kPad = kKernel / 2, kCount = (kColumns - 1) * kStride + kKernel;
  constexpr uint32_t kAll = (1u << kCount) - 1u, kLeft = (1u << kPad) - 1u, kRight = kLeft << (kCount - kPad);
  if (tile.rows != kTileRows || tile.columns != kColumns || args.problem.depth != 1) return false;
  const RowPair<T, kKernel, kStride> pair(args, image, out, tile.y);
  if (tile.valid == kAll) {
    pair.template all_channels<kColumns, 0, 0>(tile.x, c_end);
  } else if (tile.valid == (kAll & ~kLeft)) {
    pair.template all_channels<kColumns, kPad, 0>(tile.x, c_end);
  } else if (tile.valid == (kAll & ~kRight)) {
    pair.template all_channels<kColumns, 0, kPad>(tile.x, c_end);
  } else if (tile.valid == (kAll & ~kLeft & ~kRight)) {
    pair.template all_channels<kColumns, kPad, kPad>(tile.x, c_end);
  } else {
    return false;
  }
  return true;
}

// The same for all columns of a pair of rows: for the few channels of staged images, where a tile is soon done.
template <class T, int kKernel, int kStride>
bool try_few_channels(const DepthwiseArgs& args, const T* image, const NhwcOutput& out, int64_t y, int64_t wide) {
  using A = typename AccumulateType<T>::type;
  constexpr int64_t kPad = kKernel / 2;
  const CpuProblem& p = args.problem;
  const int64_t past = (p.out_w - 1) * kStride - p.pad_w + kKernel - p.in_w;  // columns read past the last
  if (p.channels > kStaged<T> || p.channels % kLanes<A> != 0 || p.depth != 1 || (p.pad_w != 0 && p.pad_w != kPad) ||
      (past > 0 && past != kPad) || (p.out_w - wide) % kNarrowTile<kKernel, kStride> != 0) {
    return false;
  }
  const RowPair<T, kKernel, kStride> pair(args, image, out, y);
  pair.all_columns(wide, p.out_w, p.pad_w > 0, past > 0, p.channels);
  return true;
}

}  // namespace dwconv::DWCONV_ISA
