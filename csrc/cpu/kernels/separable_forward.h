// Fused block for inference, both layouts:
//
//   out = pw_act(pw_weight . dw_act(depthwise(in) + dw_bias) + pw_bias) + residual
//
// A tile is `rows_per_tile` whole output rows of one image. Its depthwise result goes to scratch in the accumulation type
// and stays in L1/L2; the pointwise product reads it from there, so the intermediate is never written to memory.
//
//              product[i, j] = sum_k a[i, k] * b[k, j]        register tile: kGemmRows x kGemmColumns vectors
//   NHWC       i pixels, k channels, j output channels        a = scratch[pixel][channel], b = packed weight panels
//   NCHW       i output channels, k channels, j pixels        a = weights, b = scratch[channel][pixel]
//
// For each panel of j the tile's a is walked once, so a panel (channels x kGemmColumns vectors) is reused from L1/L2 by all
// rows i. Sums over k run in order, in one accumulator each: the result does not depend on the tile.
// Traffic: input and output once (plus halo rows, from L2), all pointwise weights once per tile, from L2/L3.
#pragma once

#include "activate.h"

namespace dwconv::DWCONV_ISA {

#if DWCONV_VECTOR_BYTES == 64
inline constexpr int kGemmRows = 7, kGemmColumns = 4;  // 28 accumulators + 4 + 1 broadcast operand of 32 registers
#elif DWCONV_VECTOR_BYTES == 32
inline constexpr int kGemmRows = 6, kGemmColumns = 2;  // 12 + 2 + 1 of 16
#else
inline constexpr int kGemmRows = 4, kGemmColumns = 2;  // 8 + 2 + 1 of 16
#endif
template <class A>
inline constexpr int kPanel = kGemmColumns * kLanes<A>;

// c[i * kPanel + j] = sum_k a[i * a_stride + k] * b[k * b_stride + j], kRows rows.
template <class A, int kRows>
void gemm_tile(int64_t depth, const A* a, int64_t a_stride, const A* b, int64_t b_stride, A* c) {
  constexpr int kVec = kLanes<A>;
  Vec<A> acc[kRows][kGemmColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> column[kGemmColumns];
    DWCONV_UNROLL for (int j = 0; j < kGemmColumns; ++j) column[j] = load(b + k * b_stride + j * kVec);
    DWCONV_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec<A> factor = broadcast(a[i * a_stride + k]);
      DWCONV_UNROLL for (int j = 0; j < kGemmColumns; ++j) acc[i][j] += factor * column[j];
    }
  }
  DWCONV_UNROLL for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL for (int j = 0; j < kGemmColumns; ++j) store(c + i * kPanel<A> + j * kVec, acc[i][j]);
  }
}

template <class A, int kRows = kGemmRows>
DWCONV_INLINE void gemm_rows(int rows, int64_t depth, const A* a, int64_t a_stride, const A* b, int64_t b_stride, A* c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_tile<A, kRows>(depth, a, a_stride, b, b_stride, c);
    gemm_rows<A, kRows - 1>(rows, depth, a, a_stride, b, b_stride, c);
  }
}

// Bias, activation, residual and store of `count` elements of one product row. `bias` is a vector of `count` where
// bias_step is 1, one value where it is 0.
template <class T, class A>
DWCONV_INLINE void finish_row(const SeparableArgs& args, const A* product, const A* bias, int64_t bias_step, int64_t offset,
                              int64_t count) {
  constexpr int kVec = kLanes<A>;
  for (int64_t j = 0; j < count; j += kVec) {
    const int lanes = lanes_left(count - j, kVec);
    Vec<A> v = load(product + j);
    if (bias != nullptr) v += bias_step ? load_lanes(bias + j, lanes) : broadcast(*bias);
    v = activate<A>(v, args.activation);
    if (args.residual != nullptr) v += load_lanes(static_cast<const T*>(args.residual) + offset + j, lanes);
    store_lanes(static_cast<T*>(args.output) + offset + j, v, lanes);
  }
}

template <class T, bool nhwc>
void separable_tiles(const SeparableArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  const DepthwiseProblem& whole = args.depthwise.problem;
  const int64_t row_tiles = (whole.out_h + args.rows_per_tile - 1) / args.rows_per_tile;
  const int64_t channels = whole.channels;
  char* const depthwise_scratch = static_cast<char*>(scratch);
  A* const product = reinterpret_cast<A*>(depthwise_scratch + args.depthwise_scratch_bytes);
  A* const middle = product + kGemmRows * kPanel<A>;
  const A* const pw_weight = static_cast<const A*>(args.pw_weight);
  const A* const pw_bias = static_cast<const A*>(args.pw_bias);

  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t n = tile / row_tiles;
    const int64_t y0 = tile % row_tiles * args.rows_per_tile;
    const int64_t rows = y0 + args.rows_per_tile < whole.out_h ? args.rows_per_tile : whole.out_h - y0;
    const int64_t pixels = rows * whole.out_w;
    // NCHW: each channel's pixels padded to whole panels, so that the product's reads need no masks.
    const int64_t middle_pitch = nhwc ? channels : (pixels + kPanel<A> - 1) / kPanel<A> * kPanel<A>;

    DepthwiseArgs depthwise = args.depthwise;
    DepthwiseProblem& p = depthwise.problem;
    p.batch = 1;
    p.pad_h = whole.pad_h - y0 * whole.stride_h;
    p.out_h = rows;
    p.out_stride_n = 0;
    p.out_stride_c = nhwc ? 1 : middle_pitch;
    p.out_stride_w = nhwc ? channels : 1;
    p.out_stride_h = whole.out_w * p.out_stride_w;
    depthwise.input = static_cast<const T*>(args.depthwise.input) + n * whole.in_stride_n;
    depthwise.output = middle;
    const int64_t tiles_a_plane = (rows + depthwise.rows_per_tile - 1) / depthwise.rows_per_tile;
    args.depthwise_kernel(depthwise, depthwise_scratch, 0, args.depthwise_columns * tiles_a_plane);

    const int64_t out = n * args.out_stride_n + y0 * whole.out_w * (nhwc ? args.out_channels : 1);
    if (nhwc) {
      for (int64_t j = 0; j < args.out_channels; j += kPanel<A>) {
        const A* const panel = pw_weight + j * channels;
        const int64_t count = lanes_left(args.out_channels - j, kPanel<A>);
        for (int64_t i = 0; i < pixels; i += kGemmRows) {
          const int rows_here = lanes_left(pixels - i, kGemmRows);
          gemm_rows<A>(rows_here, channels, middle + i * channels, channels, panel, kPanel<A>, product);
          for (int r = 0; r < rows_here; ++r) {
            finish_row<T, A>(args, product + r * kPanel<A>, pw_bias ? pw_bias + j : nullptr, 1,
                             out + (i + r) * args.out_channels + j, count);
          }
        }
      }
    } else {
      const int64_t plane = whole.out_h * whole.out_w;
      for (int64_t j = 0; j < pixels; j += kPanel<A>) {
        const int64_t count = lanes_left(pixels - j, kPanel<A>);
        for (int64_t i = 0; i < args.out_channels; i += kGemmRows) {
          const int rows_here = lanes_left(args.out_channels - i, kGemmRows);
          gemm_rows<A>(rows_here, channels, pw_weight + i * channels, channels, middle + j, middle_pitch, product);
          for (int r = 0; r < rows_here; ++r) {
            finish_row<T, A>(args, product + r * kPanel<A>, pw_bias ? pw_bias + i + r : nullptr, 0,
                             out + (i + r) * plane + j, count);
          }
        }
      }
    }
  }
}

template <class T>
void separable_forward_nhwc(const SeparableArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  separable_tiles<T, true>(args, scratch, tile_begin, tile_end);
}

template <class T>
void separable_forward_nchw(const SeparableArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  separable_tiles<T, false>(args, scratch, tile_begin, tile_end);
}

// Elements (of the accumulation type) a worker needs besides the depthwise kernel's own scratch.
inline int64_t separable_forward_scratch(int64_t channels, int64_t pixels, int64_t panel) {
  return kGemmRows * panel + channels * ((pixels + panel - 1) / panel * panel) + panel;
}

}  // namespace dwconv::DWCONV_ISA
