// Fused block for inference, both layouts:
//
//   out = pw_act(pw_weight . dw_act(depthwise(in) + dw_bias) + pw_bias) + residual
//
// A tile is a range of output rows (across images) times a range of output channels. Its depthwise result goes to scratch as
// [pixel][channel], in the accumulation type, and stays in L2; the pointwise product reads it from there.
//
//   product[i, j] = sum_k middle[i, k] * panel[k, j]     i pixels, k channels, j output channels
//
// Register tile: kGemmRows pixels by kGemmColumns vectors of output channels; the weights are packed in panels of as many
// output channels, [ceil(out_channels / kPanel)][channels][kPanel]. kDepthBlock channels of a panel are walked for all pixels
// of the tile in turn; between the blocks the sums rest in scratch, [pixel][kPanel]. Sums over k run in order, in one accumulator
// within a block and in one over the blocks: the result does not depend on the tile. Bias, activation and residual are applied
// to the registers.
//
// NCHW: a vector of planes at a time is transposed into the depthwise stage (transpose.h), and each panel's product is
// transposed back; everything between is the same.
// Traffic: input (plus halo rows) and output once; the pointwise weights once a tile of pixels, from L2 or L3.
#pragma once

#include "depthwise_forward_nchw_transposed.h"

namespace dwconv::DWCONV_ISA {

#if DWCONV_VECTOR_BYTES == 64
inline constexpr int kGemmRows = 14;  // 28 sums + 2 of the panel + 1 broadcast of 32 registers
#elif DWCONV_VECTOR_BYTES == 32
inline constexpr int kGemmRows = 6;  // 12 + 2 + 1 of 16
#else
inline constexpr int kGemmRows = 4;
#endif
inline constexpr int kGemmColumns = 2;
template <class A>
inline constexpr int kPanel = kGemmColumns * kLanes<A>;

// One float32 accumulator over 1024 channels is 4.5 times less accurate than nn.Conv2d; with one a block of 256 it is twice. The
// price is a load, an addition and a store for every 256 FMAs, 2 % of the time (4 % with blocks of 128).
inline constexpr int64_t kDepthBlock = 256;

// Scratch of a worker, in elements of the accumulation type. The pitch of the middle keeps pixels out of one another's cache
// sets where the channels are a power of two; it is padded to whole register tiles.
template <class A>
DWCONV_INLINE int64_t middle_pitch(int64_t channels) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A> + 64 / static_cast<int64_t>(sizeof(A));
}
template <class A>
DWCONV_INLINE int64_t padded_pixels(int64_t pixels) {
  return (pixels + kGemmRows - 1) / kGemmRows * kGemmRows;
}

template <class A>
DWCONV_INLINE const A* at_bytes(const A* base, int64_t bytes) {
  return reinterpret_cast<const A*>(reinterpret_cast<const char*>(base) + bytes);
}

// acc[i] = sum_k a[i * pitch + k] * panel[k].
template <class A, int kRows>
DWCONV_INLINE void gemm_tile(int64_t depth, const A* a, int64_t pitch, const A* panel, Vec<A> (&acc)[kRows][kGemmColumns]) {
  constexpr int kVec = kLanes<A>;
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kGemmColumns; ++j) acc[i][j] = Vec<A>{};
  }
  // Seven rows are within reach of one base by the address forms [base + {1, 2, 4} * p1], [base + {1, 2} * p3], [base + p5];
  // a pointer a row would not fit into the general registers. The empty asm keeps the compiler from making those pointers.
  int64_t p1 = pitch * static_cast<int64_t>(sizeof(A)), p3 = 3 * p1, p5 = 5 * p1;
  asm("" : "+r"(p1), "+r"(p3), "+r"(p5));
  const A* low = a;
  const A* high = a + 7 * pitch;
  for (int64_t k = 0; k < depth; ++k, ++low, ++high, panel += kGemmColumns * kVec) {
    Vec<A> b[kGemmColumns];
    DWCONV_UNROLL
    for (int j = 0; j < kGemmColumns; ++j) b[j] = load(panel + j * kVec);
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const A* const base = i < 7 ? low : high;
      const int row = i % 7;
      const A* const at = row == 0   ? base
                          : row == 3 ? at_bytes(base, p3)
                          : row == 5 ? at_bytes(base, p5)
                          : row == 6 ? at_bytes(base, 2 * p3)
                                     : at_bytes(base, row * p1);
      const Vec<A> factor = broadcast(*at);
      DWCONV_UNROLL
      for (int j = 0; j < kGemmColumns; ++j) acc[i][j] += factor * b[j];
    }
  }
}

// Where a register tile's result goes: rows out_pitch apart, `rows` of them, `columns` output channels of the panel.
template <class O>
struct GemmTarget {
  O* out;
  const O* residual;  // like out, or null
  int64_t pitch;
  int rows, columns;
};

// `depth` channels of the product, from channel `begin` of the middle and the panel on.
struct DepthBlock {
  int64_t begin, depth;
  bool first, last;
};

// One register tile: a block of channels added to the sums so far, [kRows][kPanel]; after the last one, to the target.
// bias: kPanel values.
template <class O, class A, int kRows>
void gemm_rows(const SeparableArgs& args, const DepthBlock& block, const A* a, int64_t pitch, const A* panel, A* sums,
               const A* bias, const GemmTarget<O>& to) {
  constexpr int kVec = kLanes<A>;
  Vec<A> acc[kRows][kGemmColumns];
  gemm_tile<A, kRows>(block.depth, a + block.begin, pitch, panel + block.begin * kPanel<A>, acc);
  if (!block.first) {
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DWCONV_UNROLL
      for (int j = 0; j < kGemmColumns; ++j) acc[i][j] += load(sums + i * kPanel<A> + j * kVec);
    }
  }
  if (!block.last) {
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DWCONV_UNROLL
      for (int j = 0; j < kGemmColumns; ++j) store(sums + i * kPanel<A> + j * kVec, acc[i][j]);
    }
    return;
  }
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kGemmColumns; ++j) acc[i][j] += load(bias + j * kVec);
  }
  activate_all<A>(acc, args.activation);
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i >= to.rows) break;
    DWCONV_UNROLL
    for (int j = 0; j < kGemmColumns; ++j) {
      const int left = to.columns - j * kVec;
      if (left <= 0) continue;
      Vec<A> v = acc[i][j];
      const int64_t offset = i * to.pitch + j * kVec;
      if (left >= kVec) {
        if (to.residual != nullptr) v += load(to.residual + offset);
        store(to.out + offset, v);
      } else {
        if (to.residual != nullptr) v += load_lanes(to.residual + offset, left);
        store_lanes(to.out + offset, v, left);
      }
    }
  }
}

// All pixels of a tile by one panel. sums: [padded pixels][kPanel].
template <class O, class A>
void gemm_panel(const SeparableArgs& args, const A* middle, int64_t pitch, int64_t pixels, const A* panel, A* sums, const A* bias,
                GemmTarget<O> to) {
  constexpr int kHalf = kGemmRows / 2;
  const int64_t channels = args.depthwise.problem.channels;
  for (int64_t k = 0; k < channels; k += kDepthBlock) {
    const int64_t depth = channels - k < kDepthBlock ? channels - k : kDepthBlock;
    const DepthBlock block = {k, depth, k == 0, k + depth == channels};
    for (int64_t i = 0; i < pixels;) {
      const int64_t left = pixels - i;
      const GemmTarget<O> here = {to.out + i * to.pitch, to.residual ? to.residual + i * to.pitch : nullptr, to.pitch,
                                  lanes_left(left, kGemmRows), to.columns};
      if (left > kHalf) {
        gemm_rows<O, A, kGemmRows>(args, block, middle + i * pitch, pitch, panel, sums + i * kPanel<A>, bias, here);
        i += kGemmRows;
      } else {
        gemm_rows<O, A, kHalf>(args, block, middle + i * pitch, pitch, panel, sums + i * kPanel<A>, bias, here);
        i += kHalf;
      }
    }
  }
}

// Output rows [row, row + rows) of the N * out_h: calls body(n, y, count, first pixel of the tile) for each image's share.
template <class Body>
DWCONV_INLINE void for_each_image(const DepthwiseProblem& p, int64_t row, int64_t rows, Body body) {
  for (int64_t done = 0; done < rows;) {
    const int64_t n = (row + done) / p.out_h, y = (row + done) % p.out_h;
    const int64_t count = rows - done < p.out_h - y ? rows - done : p.out_h - y;
    body(n, y, count, done * p.out_w);
    done += count;
  }
}

// The depthwise stage of the tile's rows into middle[pixel * pitch + channel].
template <class T, class A, bool kNhwc>
void depthwise_stage(const SeparableArgs& args, int64_t row, int64_t rows, int64_t pitch, A* staged, A* middle) {
  const DepthwiseProblem& whole = args.depthwise.problem;
  DepthwiseArgs stage = args.depthwise;
  DepthwiseProblem& p = stage.problem;
  p.batch = 1;
  p.out_stride_w = pitch;
  p.out_stride_h = whole.out_w * pitch;
  for_each_image(whole, row, rows, [&](int64_t n, int64_t y, int64_t count, int64_t pixel) {
    const T* const image = static_cast<const T*>(args.depthwise.input) + n * whole.in_stride_n;
    stage.rows_per_tile = p.out_h = count;
    if constexpr (kNhwc) {
      p.pad_h = whole.pad_h - y * whole.stride_h;
      stage.input = image;
      stage.output = middle + pixel * pitch;
      args.depthwise_kernel(stage, nullptr, 0, 1);
    } else {
      constexpr int kVec = kLanes<A>;
      const Range in_rows = input_rows(whole, y, count);
      p.in_h = in_rows.end - in_rows.begin;
      p.pad_h = whole.pad_h - y * whole.stride_h + in_rows.begin;
      p.in_stride_w = kVec;
      p.in_stride_h = whole.in_w * kVec;
      stage.input = staged;
      for (int64_t c = 0; c < whole.channels; c += kVec) {
        const int lanes = lanes_left(whole.channels - c, kVec);
        const T* from[kVec];
        for (int l = 0; l < lanes; ++l) from[l] = image + (c + l) * whole.in_stride_c + in_rows.begin * whole.in_stride_h;
        planes_to_lanes<T, A>(from, 0, lanes, p.in_h, whole.in_w, whole.in_stride_h, staged);
        p.channels = lanes;
        stage.weight = static_cast<const A*>(args.depthwise.weight) + c;
        stage.bias = args.depthwise.bias ? static_cast<const A*>(args.depthwise.bias) + c : nullptr;
        stage.output = middle + pixel * pitch + c;
        args.depthwise_kernel(stage, nullptr, 0, 1);
      }
    }
  });
}

// A panel's product, [pixel][kPanel], to the planes of its output channels.
template <class T, class A>
void product_to_planes(const SeparableArgs& args, int64_t row, int64_t rows, int64_t channel, int columns, const A* product) {
  constexpr int kVec = kLanes<A>;
  const DepthwiseProblem& p = args.depthwise.problem;
  const int64_t plane = p.out_h * p.out_w;
  for_each_image(p, row, rows, [&](int64_t n, int64_t y, int64_t count, int64_t pixel) {
    for (int j = 0; j < columns; j += kVec) {
      const int lanes = lanes_left(columns - j, kVec);
      const int64_t first = (n * args.out_channels + channel + j) * plane + y * p.out_w;
      T* to[kVec];
      const T* residual[kVec];
      for (int l = 0; l < lanes; ++l) {
        to[l] = static_cast<T*>(args.output) + first + l * plane;
        residual[l] = static_cast<const T*>(args.residual) + first + l * plane;
      }
      for (int l = lanes; l < kVec; ++l) residual[l] = residual[0];
      lanes_to_piece<T, A>(product + pixel * kPanel<A> + j, kPanel<A>, lanes, count * p.out_w, 0, 1, to,
                           args.residual ? residual : nullptr);
    }
  });
}

template <class T, bool kNhwc>
void separable_tiles(const SeparableArgs& args, void* scratch, int64_t tile_begin, int64_t tile_end) {
  using A = typename AccumulateType<T>::type;
  const DepthwiseProblem& p = args.depthwise.problem;
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t pitch = middle_pitch<A>(p.channels);
  const int64_t panels = (args.out_channels + kPanel<A> - 1) / kPanel<A>;
  A* const middle = static_cast<A*>(scratch);
  // The product, or its sums so far; in NCHW the staging of the depthwise stage before.
  A* const product = middle + padded_pixels<A>(args.rows_per_tile * p.out_w) * pitch;
  int64_t staged_row = -1;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row = tile / args.splits * args.rows_per_tile;
    const int64_t rows = row + args.rows_per_tile < total_rows ? args.rows_per_tile : total_rows - row;
    const int64_t split = tile % args.splits;
    if (row != staged_row) depthwise_stage<T, A, kNhwc>(args, row, rows, pitch, product, middle);
    staged_row = row;
    for (int64_t panel = panels * split / args.splits; panel < panels * (split + 1) / args.splits; ++panel) {
      const int64_t j = panel * kPanel<A>;
      const int columns = lanes_left(args.out_channels - j, kPanel<A>);
      const A* const weight = static_cast<const A*>(args.pw_weight) + j * p.channels;
      const A* const bias = static_cast<const A*>(args.pw_bias) + j;
      if constexpr (kNhwc) {
        const int64_t first = row * p.out_w * args.out_channels + j;
        const T* const residual = args.residual ? static_cast<const T*>(args.residual) + first : nullptr;
        gemm_panel<T, A>(args, middle, pitch, rows * p.out_w, weight, product, bias,
                         {static_cast<T*>(args.output) + first, residual, args.out_channels, 0, columns});
      } else {
        gemm_panel<A, A>(args, middle, pitch, rows * p.out_w, weight, product, bias, {product, nullptr, kPanel<A>, 0, columns});
        product_to_planes<T, A>(args, row, rows, j, columns, product);
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

// Bytes of scratch a worker needs.
template <class T>
int64_t separable_forward_nhwc_scratch(const DepthwiseProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t pixels = padded_pixels<A>(rows_per_tile * p.out_w);
  const int64_t pixel = middle_pitch<A>(p.channels) + kPanel<A>;
  return pixels * pixel * static_cast<int64_t>(sizeof(A));
}

template <class T>
int64_t separable_forward_nchw_scratch(const DepthwiseProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t staged = most_input_rows(p, rows_per_tile < p.out_h ? rows_per_tile : p.out_h) * p.in_w * kLanes<A>;
  const int64_t product = padded_pixels<A>(rows_per_tile * p.out_w) * kPanel<A>;
  const int64_t more = staged > product ? staged - product : 0;
  return separable_forward_nhwc_scratch<T>(p, rows_per_tile) + more * static_cast<int64_t>(sizeof(A));
}

}  // namespace dwconv::DWCONV_ISA
