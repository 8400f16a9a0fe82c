// Depthwise correlation, channels last, stride 1, along rows of pixels (nhwc_family in heuristics.cpp says when):
//
//   out[n, y, j] = act(bias[j % C] + sum_{r, s} w[r, s, j % C] * in[n, y + r - pad_h, j + (s - pad_w) * C])
//
// with j = x * C + c: a row of pixels is a row of numbers, of which every tap takes one at the same distance. Lanes are
// consecutive j, pixels after pixels, so that none is idle but at the row's end; a vector's filter begins at channel j % C, for
// which packed weights go round (weight_pitch). Where channels are lanes, 24 of them fill vectors of 16 to three quarters, and
// a vector of a pixel that begins in the middle of a line reads two.
// Register tile: kFlatRows output rows by one vector. The filter is loaded once for all of them, an input vector once for the
// rows it reaches: 18 input and 9 filter loads for 36 FMAs. It goes along the rows in the order of their addresses, which the
// hardware's prefetchers follow. Sums run in the order of the kernel whose lanes are channels: the same bits.
// Tiles: `rows_per_tile` output rows of one image. Traffic: input (1.5 times from L2 at 3x3) and output once.
// Lanes in the padding read as zero and no memory there is touched; only vectors at a row's ends pay for it.
// The plan guarantees: dense rows (out_stride_w = in_stride_w = C), depth 1, no dilation; weights and bias packed as above.
#pragma once

#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kFlatRows = 4;

// kRows output rows of an image.
template <class T, int kKernel, int kRows>
struct FlatRows {
  using A = typename AccumulateType<T>::type;
  static constexpr int kVec = kLanes<A>, kInRows = kRows + kKernel - 1;
  static_assert(kInRows <= 7);  // RowSteps

  FlatRows(const DepthwiseArgs& args, const T* image, T* output, int64_t y)
      : channels(args.problem.channels),
        width(args.problem.out_w * channels),
        in_width(args.problem.in_w * channels),
        in_step(args.problem.in_stride_h),
        out_step(args.problem.out_stride_h),
        pad(args.problem.pad_w * channels),
        pitch(args.weight_pitch),
        in(image + (y - args.problem.pad_h) * in_step),
        out(output + y * out_step),
        filter(static_cast<const A*>(args.weight)),
        bias(static_cast<const A*>(args.bias)),
        activation(args.problem.activation) {
    for (int i = 0; i < kInRows; ++i) {
      rows |= uint32_t(static_cast<uint64_t>(y - args.problem.pad_h + i) < static_cast<uint64_t>(args.problem.in_h)) << i;
    }
  }

  // The vector at j, whose first channel is `channel`. kEdge: some of what its taps read may lie outside the row, or not all of
  // its lanes be of the row; kAllRows: all input rows are in the image.
  template <bool kEdge, bool kAllRows>
  DWCONV_INLINE void tile(const RowSteps& steps, const RowSteps& filter_steps, int64_t j, int64_t channel) const {
    // Filter and inputs in registers: the compiler would otherwise read them again for each multiply-add, across two lines as a
    // rule.
    Vec<A> w[kKernel][kKernel];
    DWCONV_UNROLL
    for (int r = 0; r < kKernel; ++r) {
      DWCONV_UNROLL
      for (int s = 0; s < kKernel; ++s) w[r][s] = in_register(load(filter_steps.row(filter + channel + s * pitch, r)));
    }
    Vec<A> acc[kRows][1];
    DWCONV_UNROLL
    for (int y = 0; y < kRows; ++y) acc[y][0] = bias ? load(bias + channel) : Vec<A>{};
    const int64_t first = j - pad;
    LaneMask lanes[kKernel];
    if (kEdge) {
      for (int s = 0; s < kKernel; ++s) lanes[s] = static_cast<LaneMask>(valid_columns(first + s * channels, 1, in_width, kVec));
    }
    DWCONV_UNROLL
    for (int i = 0; i < kInRows; ++i) {
      if (!kAllRows && !((rows >> i) & 1)) continue;
      const T* const row = steps.row(in + first, i);
      DWCONV_UNROLL
      for (int s = 0; s < kKernel; ++s) {
        const T* const at = row + s * channels;
        const Vec<A> x = in_register(kEdge ? load_edge(at, lanes[s]) : load(at));
        DWCONV_UNROLL
        for (int y = 0; y < kRows; ++y) {
          if (i - y >= 0 && i - y < kKernel) acc[y][0] += x * w[i - y][s];
        }
      }
    }
    activate_all<A>(acc, activation);
    const int columns = kEdge ? lanes_left(width - j, kVec) : kVec;
    DWCONV_UNROLL
    for (int y = 0; y < kRows; ++y) store_some<!kEdge>(out + y * out_step + j, acc[y][0], columns);
  }

  // Most are whole or empty; a masked load is slow but with AVX-512.
  static DWCONV_INLINE Vec<A> load_edge(const T* at, LaneMask lanes) {
    constexpr LaneMask kAll = static_cast<LaneMask>((1u << kVec) - 1u);
    if (DWCONV_VECTOR_BYTES == 64) return load_masked(at, lanes);
    return lanes == kAll ? load(at) : lanes == 0 ? Vec<A>{} : load_masked(at, lanes);
  }

  template <bool kAllRows>
  DWCONV_NOINLINE void all_columns() const {
    const FlatRows f = *this;  // a copy: stores could be to `this` for all the compiler knows
    const RowSteps steps(f.in_step * static_cast<int64_t>(sizeof(T)));
    const RowSteps filter_steps(kKernel * f.pitch * static_cast<int64_t>(sizeof(A)));
    const int64_t turn = kVec % f.channels;
    int64_t j = 0, channel = 0;
    const auto next = [&] {
      j += kVec;
      channel += turn;
      if (channel >= f.channels) channel -= f.channels;
    };
    const int64_t last = f.in_width - (kKernel - 1) * f.channels + f.pad;  // outputs from here on read beyond the row
    const int64_t inner_end = last < f.width ? last : f.width;
    for (; j < f.pad && j < f.width; next()) f.template tile<true, kAllRows>(steps, filter_steps, j, channel);
    for (; j + kVec <= inner_end; next()) f.template tile<false, kAllRows>(steps, filter_steps, j, channel);
    for (; j < f.width; next()) f.template tile<true, kAllRows>(steps, filter_steps, j, channel);
  }

  DWCONV_INLINE void run() const { rows == (1u << kInRows) - 1u ? all_columns<true>() : all_columns<false>(); }

  int64_t channels, width, in_width, in_step, out_step, pad, pitch;  // elements
  const T* in;                                                       // of the first tap's row, column 0
  T* out;
  const A* filter;
  const A* bias;
  Activation activation;
  uint32_t rows = 0;  // of the kInRows, those inside the image
};

template <class T, int kKernel, int kStride>
void depthwise_forward_nhwc_flat(const DepthwiseArgs& args, void* /*scratch*/, Tiles tiles) {
  static_assert(kStride == 1);
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t n = tile / row_tiles;
    const int64_t begin = (tile % row_tiles) * args.rows_per_tile;
    const int64_t end = begin + args.rows_per_tile < p.out_h ? begin + args.rows_per_tile : p.out_h;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
    T* const out = static_cast<T*>(args.output) + n * p.out_stride_n;
    for (int64_t y = begin; y < end;) {
      if (end - y < kFlatRows && end - begin >= kFlatRows) y = end - kFlatRows;  // some rows again rather than one by one
      const auto rows = [&]<int kRows>() {
        FlatRows<T, kKernel, kRows>(args, image, out, y).run();
        y += kRows;
      };
      if (end - y >= kFlatRows) {
        rows.template operator()<kFlatRows>();
      } else {
        rows.template operator()<1>();
      }
    }
  }
}

inline constexpr Layout depthwise_forward_nhwc_flat_weight_order = Layout::kNHWC;

template <class T, int = 0>
int64_t depthwise_forward_nhwc_flat_scratch(const CpuProblem&, int64_t) {
  return 0;
}

}  // namespace dwconv::DWCONV_ISA
