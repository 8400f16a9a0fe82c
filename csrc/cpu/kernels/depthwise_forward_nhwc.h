// Depthwise correlation, channels last: forward pass, and the input gradient's phases (problem.h).
//
//   out[n, y, x, c] = act(bias[c] + sum_{m, r, s} w[m, r, s, c] * in[n, y*stride_h + r*dilation_h - pad_h, ..., c + m*in_stride_m])
//
// Lanes are channels. A register tile is kPixelTile output columns of one row by one vector of channels: with a filter of
// known width each input column is loaded once per filter row and used for every output it reaches,
//
//   columns in   | 0 1 2 3 4 5 6 7 8 |      kPixelTile = 7, kKernelW = 3, stride 1: 9 + 3 loads for 21 FMAs
//   columns out    |_0_|_1_| ... |_6_|
//
// Order: rows, column tiles, channel vectors; so the kernel_h * (columns in) input streams are read forward, C elements at
// a time. 7 divides the widths of networks on 224-pixel images; elsewhere the last tile is partly idle.
// Tiles: `rows_per_tile` output rows of one image. Traffic: input and output once where kernel_h input rows fit in L1/L2.
// Samples in the padding are skipped, not multiplied by zero; only tiles that touch the edge pay for the test (kEdge).
#pragma once

#include "../../problem.h"
#include "activate.h"
#include "simd.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kPixelTile = 7;

struct RowRange {
  int64_t begin, end;
};

// The filter rows (or columns) whose sample origin + index * dilation lies in [0, size).
DWCONV_INLINE RowRange filter_range(int64_t origin, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = origin >= 0 ? 0 : (-origin + dilation - 1) / dilation;
  int64_t end = size <= origin ? 0 : (size - origin + dilation - 1) / dilation;
  if (end > taps) end = taps;
  if (begin > end) begin = end;
  return {begin, end};
}

// kKernelW == 0: any width, stride and dilation.
template <class T, class O, int kKernelW, int kStrideW, bool kEdge>
DWCONV_INLINE void nhwc_tile(const DepthwiseArgs& args, const T* image, O* out_row, int64_t y, int64_t x0, int columns,
                             int64_t c, int lanes) {
  using A = typename AccumulateType<T>::type;
  const DepthwiseProblem& p = args.problem;
  const int64_t stride_w = kKernelW ? kStrideW : p.stride_w;
  const A* const weight = static_cast<const A*>(args.weight) + c;
  const int64_t origin_h = y * p.stride_h - p.pad_h;
  const int64_t origin_w = x0 * stride_w - p.pad_w;
  const RowRange rows = filter_range(origin_h, p.dilation_h, p.kernel_h, p.in_h);

  Vec<A> acc[kPixelTile];
  const Vec<A> start = args.bias ? load_some<!kEdge>(static_cast<const A*>(args.bias) + c, lanes) : Vec<A>{};
  DWCONV_UNROLL for (int t = 0; t < kPixelTile; ++t) acc[t] = start;

  for (int64_t m = 0; m < p.depth; ++m) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* const in_row = image + m * p.in_stride_m + (origin_h + r * p.dilation_h) * p.in_stride_h + c;
      const A* const w = weight + (m * p.kernel_h + r) * p.kernel_w * p.channels;
      if constexpr (kKernelW > 0) {
        Vec<A> taps[kKernelW];
        DWCONV_UNROLL for (int s = 0; s < kKernelW; ++s) taps[s] = load_some<!kEdge>(w + s * p.channels, lanes);
        constexpr int kColumnsIn = (kPixelTile - 1) * kStrideW + kKernelW;
        DWCONV_UNROLL for (int i = 0; i < kColumnsIn; ++i) {
          const int64_t column = origin_w + i;
          if (kEdge && static_cast<uint64_t>(column) >= static_cast<uint64_t>(p.in_w)) continue;
          const Vec<A> x = load_some<!kEdge>(in_row + column * p.in_stride_w, lanes);
          DWCONV_UNROLL for (int t = 0; t < kPixelTile; ++t) {
            const int s = i - t * kStrideW;
            if (s >= 0 && s < kKernelW) acc[t] += x * taps[s];
          }
        }
      } else {
        for (int64_t s = 0; s < p.kernel_w; ++s) {
          const Vec<A> tap = load_some<!kEdge>(w + s * p.channels, lanes);
          DWCONV_UNROLL for (int t = 0; t < kPixelTile; ++t) {
            const int64_t column = origin_w + t * stride_w + s * p.dilation_w;
            if (kEdge && static_cast<uint64_t>(column) >= static_cast<uint64_t>(p.in_w)) continue;
            acc[t] += load_some<!kEdge>(in_row + column * p.in_stride_w, lanes) * tap;
          }
        }
      }
    }
  }
  O* out = out_row + x0 * p.out_stride_w + c;
  DWCONV_UNROLL for (int t = 0; t < kPixelTile; ++t) {
    if (kEdge && t >= columns) break;
    store_some<!kEdge>(out + t * p.out_stride_w, activate<A>(acc[t], p.activation), lanes);
  }
}

template <class T, class O, int kKernelW, int kStrideW>
void depthwise_forward_nhwc(const DepthwiseArgs& args, void*, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  const DepthwiseProblem& p = args.problem;
  const int64_t stride_w = kKernelW ? kStrideW : p.stride_w;
  const int64_t row_tiles = (p.out_h + args.rows_per_tile - 1) / args.rows_per_tile;
  const int64_t reach = (kPixelTile - 1) * stride_w + (p.kernel_w - 1) * p.dilation_w;
  constexpr int kVec = kLanes<A>;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t n = tile / row_tiles;
    const int64_t y_begin = (tile % row_tiles) * args.rows_per_tile;
    const int64_t y_end = y_begin + args.rows_per_tile < p.out_h ? y_begin + args.rows_per_tile : p.out_h;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
    for (int64_t y = y_begin; y < y_end; ++y) {
      O* const out_row = static_cast<O*>(args.output) + n * p.out_stride_n + y * p.out_stride_h;
      for (int64_t x0 = 0; x0 < p.out_w; x0 += kPixelTile) {
        const int columns = lanes_left(p.out_w - x0, kPixelTile);
        const int64_t first = x0 * stride_w - p.pad_w;
        const bool inside = columns == kPixelTile && first >= 0 && first + reach < p.in_w;
        int64_t c = 0;
        if (inside) {
          for (; c + kVec <= p.channels; c += kVec) {
            nhwc_tile<T, O, kKernelW, kStrideW, false>(args, image, out_row, y, x0, columns, c, kVec);
          }
        }
        for (; c < p.channels; c += kVec) {
          const int lanes = lanes_left(p.channels - c, kVec);
          nhwc_tile<T, O, kKernelW, kStrideW, true>(args, image, out_row, y, x0, columns, c, lanes);
        }
      }
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
