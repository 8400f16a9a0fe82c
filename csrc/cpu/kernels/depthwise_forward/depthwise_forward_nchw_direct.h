// Depthwise correlation, NCHW, square filters at stride 1 and 2: forward pass and input gradient, where vectors can be masked.
//
// Lanes are output columns, as in depthwise_forward_nchw_rows.h, but the input is read where it lies: columns in the padding are
// made zero in the vectors, rows in the padding are left out. So nothing is copied, and a row of 14 columns takes one vector
// without a transposition.
//
//   out[y, x] = act(bias + sum_{r, s} w[r, s] * in[y * stride + r - pad_h, x * stride + s - pad_w])
//
// A strip of up to four vectors of output columns walks down the plane. Of each input row it loads what its columns reach, once:
// at stride 2 the even and the odd columns apart. A filter column's samples are those vectors shifted by a few lanes, which
// costs less than loads that cross cache lines:
//
//   output x at stride 1, tap s: sample x + s        lane x + s of v[0][0], v[0][1], ...
//   output x at stride 2, tap s: sample 2 * x + s    lane x + s / 2 of v[s % 2][0], v[s % 2][1], ...
//
// An input row is added to all the output rows that it reaches; the topmost of these is then complete.
//
//   3x3, two vectors, a row: 3 loads, 4 shifts, 18 multiply-adds
//
// Loads and stores are of whole vectors wherever these stay within the tensor, or the tile: on AMD's Zen 5 masked ones take two
// to four times as long where they miss the caches (docs/design/cpu-nchw.md). Where a row takes several strips the last one lies
// over the one before; what a narrow row's vector writes past it is the next row, which is stored after it.
//
// Tiles: `rows_per_tile` output rows of one (n, c) plane. Traffic: input and output once, plus the rows between tiles.
#pragma once

#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_direct_any.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

// Vectors of a strip, so that sums, samples and (of 3x3) taps are in registers.
template <int kKernel>
inline constexpr int kWalkVectors = kKernel == 3 ? 4 : 2;

template <class A, int kStride, int kCount>
struct Samples {
  Vec<A> v[kStride][kCount];

  // Vector i, the columns from `at` on. masks: [kStride][kCount]. kMasked: what they leave out is not touched.
  template <bool kMasked, class T>
  DWCONV_INLINE void read(int i, const T* at, const LaneMask* masks) {
    if constexpr (kStride == 1) {
      v[0][i] = read_lanes<kMasked>(at, masks[i]);
    } else if constexpr (kMasked) {
      load_halves_masked(at, masks[i], masks[kCount + i], v[0][i], v[1][i]);
    } else {
      load_halves(at, v[0][i], v[1][i]);
      v[0][i] = keep_lanes(v[0][i], masks[i]);
      v[1][i] = keep_lanes(v[1][i], masks[kCount + i]);
    }
  }

  // A row; its last vector, of which no more than a few lanes are wanted, only if `all`.
  template <bool kMasked, class T>
  DWCONV_INLINE void read_row(const T* row, const LaneMask* masks, bool all) {
    DWCONV_UNROLL
    for (int i = 0; i + 1 < kCount; ++i) read<kMasked>(i, row + i * kStride * kLanes<A>, masks);
    DWCONV_UNROLL
    for (int phase = 0; phase < kStride; ++phase) v[phase][kCount - 1] = Vec<A>{};
    if (all) read<kMasked>(kCount - 1, row + (kCount - 1) * kStride * kLanes<A>, masks);
  }
};

template <class T, class A, int kKernel, int kStride, int kVectors, StripKind kKind>
class Walk {
 public:
  // masks: [kStride][kVectors + 1] of the input, then [kVectors] of the output.
  Walk(const DirectFrame& f, const DirectTile<T, A>& tile, const LaneMask* masks) : f_(f), tile_(tile), masks_(masks) {
    for (int phase = 0; phase < kStride; ++phase) all_ = all_ || masks[phase * (kVectors + 1) + kVectors] != 0;
  }

  // The strip that begins at column x.
  DWCONV_INLINE void run(int64_t x) {
    const Vec<A> bias = broadcast(tile_.bias);
    const LaneMask* const out_masks = masks_ + kStride * (kVectors + 1);
    Taps taps;
    taps.set(tile_.weight);
    Vec<A> acc[kOpen][kVectors];
    DWCONV_UNROLL
    for (int k = 0; k < kOpen; ++k) {
      DWCONV_UNROLL
      for (int t = 0; t < kVectors; ++t) acc[k][t] = bias;
    }
    int64_t y = tile_.y * kStride - f_.pad_h;  // of the input
    const T* row = tile_.in + x * kStride;
    add_rows<0, kKernel - kStride>(row, y, taps, acc);
    row += (kKernel - kStride) * f_.in_row, y += kKernel - kStride;
    T* out = tile_.out + x;
    for (int64_t i = 0; i < tile_.rows; ++i, out += f_.out_row, row += kStride * f_.in_row, y += kStride) {
      add_rows<kKernel - kStride, kKernel>(row, y, taps, acc);
      Vec<A> done[1][kVectors];
      DWCONV_UNROLL
      for (int t = 0; t < kVectors; ++t) {
        done[0][t] = acc[0][t];
        DWCONV_UNROLL
        for (int k = 0; k + 1 < kOpen; ++k) acc[k][t] = acc[k + 1][t];
        acc[kOpen - 1][t] = bias;
      }
      activate<A, kKind>(done, f_.activation);
      store_row(tile_, out, done[0], out_masks);
    }
  }

 private:
  static constexpr int kOpen = ceil_div(kKernel, kStride);  // output rows that an input row can reach

  struct Taps {
    static constexpr bool kKept = kKernel == 3;  // in registers
    DWCONV_INLINE void set(const A* w) {
      weight = w;
      DWCONV_UNROLL
      for (int i = 0; kKept && i < kKernel * kKernel; ++i) kept[i] = in_register(broadcast(weight[i]));
    }
    DWCONV_INLINE Vec<A> operator[](int i) const { return kKept ? kept[i] : broadcast(weight[i]); }

    const A* weight;
    Vec<A> kept[kKept ? kKernel * kKernel : 1];
  };

  // Input rows kFirst to kLast - 1 of those that the topmost open output row reads; `row` is the first of them.
  template <int kFirst, int kLast>
  DWCONV_INLINE void add_rows(const T* row, int64_t y, const Taps& taps, Vec<A> (&acc)[kOpen][kVectors]) const {
    if constexpr (kFirst < kLast) {
      if (static_cast<uint64_t>(y) < static_cast<uint64_t>(f_.in_h)) add_row<kFirst>(row, taps, acc);
      add_rows<kFirst + 1, kLast>(row + f_.in_row, y + 1, taps, acc);
    }
  }

  template <int kRow>
  DWCONV_INLINE void add_row(const T* row, const Taps& taps, Vec<A> (&acc)[kOpen][kVectors]) const {
    Samples<A, kStride, kVectors + 1> samples;
    DWCONV_UNROLL
    for (int i = 0; i < kStride * kVectors; ++i) __builtin_prefetch(row + f_.prefetch_distance + i * kLanes<A>);
    samples.template read_row<kKind == StripKind::kMasked>(row, masks_, all_);
    add_columns<kRow, 0>(samples, taps, acc);
  }

  template <int kRow, int kColumn>
  DWCONV_INLINE void add_columns(const Samples<A, kStride, kVectors + 1>& samples, const Taps& taps,
                                 Vec<A> (&acc)[kOpen][kVectors]) const {
    if constexpr (kColumn < kKernel) {
      Vec<A> x[kVectors];
      DWCONV_UNROLL
      for (int t = 0; t < kVectors; ++t) {
        const auto& of_phase = samples.v[kColumn % kStride];
        x[t] = shift_in<kColumn / kStride>(of_phase[t], of_phase[t + 1]);
      }
      DWCONV_UNROLL
      for (int k = 0; k < kOpen; ++k) {
        const int r = kRow - k * kStride;
        if (r < 0 || r >= kKernel) continue;
        const Vec<A> tap = taps[r * kKernel + kColumn];
        DWCONV_UNROLL
        for (int t = 0; t < kVectors; ++t) acc[k][t] += x[t] * tap;
      }
      add_columns<kRow, kColumn + 1>(samples, taps, acc);
    }
  }

  // References: a copy would read at once what has just been written piece by piece, and wait for it.
  const DirectFrame& f_;
  const DirectTile<T, A>& tile_;
  const LaneMask* const masks_;
  bool all_ = false;  // the last vector of samples has columns of the image
};

template <class T, class A, int kKernel, int kStride>
void direct_plane(const DirectFrame& f, const DirectTile<T, A>& tile, const LaneMask* masks) {
  for_strips<kLanes<A>, kKernel ? kWalkVectors<kKernel> : kAnyVectors>(f.out_w, [&]<int kVectors>(int64_t x) {
    const auto strip = [&]<StripKind kKind>() {
      if constexpr (kKernel > 0) {
        Walk<T, A, kKernel, kStride, kVectors, kKind>(f, tile, masks).run(x);
      } else {
        AnyFilter<T, A, kVectors, kKind>(f, tile, masks).run(x);
      }
    };
    if (!tile.inside) {
      strip.template operator()<StripKind::kMasked>();
    } else if (is_clamp(f.activation)) {
      strip.template operator()<StripKind::kPlain>();
    } else {
      strip.template operator()<StripKind::kCalls>();
    }
    masks += (kKernel ? kStride : f.blocks) * (kVectors + 1) + kVectors;
  });
}

template <class T, int kKernel, int kStride>
void depthwise_forward_nchw_direct(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  static_assert(kStride == 1 || (kStride == 2 && kKernel > 0));
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  LaneMask* const masks = static_cast<LaneMask*>(scratch);
  if constexpr (kKernel > 0) {
    fill_strip_masks<kLanes<A>, kWalkVectors<kKernel>>(p, kStride, 1, masks);
  } else {
    fill_strip_masks<kLanes<A>, kAnyVectors>(p, mask_blocks<A>(p), kLanes<A>, masks);
  }
  const T* const input_begin = static_cast<const T*>(args.input);
  const T* const input_end = end_of_input(p, input_begin);
  const int64_t needed = (p.in_h - 1) * p.in_stride_h + p.in_w + direct_reach<A>(p);
  const DirectFrame frame = {p.in_h,      p.in_stride_h,     p.pad_h,
                             p.out_w,     p.out_stride_h,    p.kernel_h,
                             p.kernel_w,  mask_blocks<A>(p), prefetch_distance_of<T>(p, row_tiles == 1),
                             p.activation};
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t plane = tile / row_tiles;
    const int64_t n = plane / p.channels;
    const int64_t c = plane % p.channels;
    const int64_t y = (tile % row_tiles) * args.rows_per_tile;
    const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
    const T* const input = input_begin + n * p.in_stride_n + c * p.in_stride_c;
    T* const out = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y * p.out_stride_h;
    const DirectTile<T, A> here = {
        input + (y * kStride - p.pad_h) * p.in_stride_h - p.pad_w,
        static_cast<const A*>(args.weight) + c * p.kernel_h * p.kernel_w,
        args.bias ? static_cast<const A*>(args.bias)[c] : A(0),
        out,
        y,
        rows,
        out + (rows - 1) * p.out_stride_h + p.out_w - kLanes<A>,
        input - input_begin >= p.pad_w && input_end - input >= needed,
    };
    direct_plane<T, A, kKernel, kStride>(frame, here, masks);
  }
}

inline constexpr Layout depthwise_forward_nchw_direct_weight_order = Layout::kNCHW;

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t depthwise_forward_nchw_direct_scratch(const CpuProblem& p, int64_t) {
  constexpr int64_t kVec = kLanes<typename AccumulateType<T>::type>;
  const int64_t blocks = mask_blocks<typename AccumulateType<T>::type>(p) > p.stride_w
                             ? mask_blocks<typename AccumulateType<T>::type>(p)
                             : p.stride_w;
  const int64_t masks = 2 * blocks + 1;  // a vector, at most
  return ceil_div(p.out_w, kVec) * masks * static_cast<int64_t>(sizeof(LaneMask));
}

}  // namespace dwconv::DWCONV_ISA
