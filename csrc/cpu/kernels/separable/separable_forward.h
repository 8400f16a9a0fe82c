// Fused block for inference, both layouts:
//
//   out = pw_act(pw_weight . dw_act(depthwise(in) + dw_bias) + pw_bias) + residual
//
// A tile is a range of output rows (across images) times a range of output channels. Its depthwise result goes to scratch as
// [pixel][channel], in the type that the product multiplies, and stays in L2; the pointwise product (pointwise_product.h,
// pointwise_amx.h) reads it from there, a panel of output channels at a time.
//
// NCHW: a vector of planes at a time is transposed into the depthwise stage (transpose.h), and each panel's product is
// transposed back; everything between is the same.
// Traffic: input (plus halo rows) and output once; the pointwise weights once a tile of pixels, from L2 or L3.
#pragma once

#include "cpu/kernels/separable/expanded_rows.h"
#include "cpu/kernels/separable/patches.h"
#include "cpu/kernels/separable/pixels.h"

namespace dwconv::DWCONV_ISA {

// The depthwise stage of the tile's rows into middle[pixel * pitch + channel].
template <class T, class A, class M, bool kNhwc>
void depthwise_stage(const SeparableArgs& args, int64_t row, int64_t rows, int64_t pitch, A* staged, M* middle) {
  const CpuProblem& whole = args.depthwise.problem;
  DepthwiseArgs stage = args.depthwise;
  CpuProblem& p = stage.problem;
  p.batch = 1;
  p.prefetch_input = p.prefetch_output = false;  // separable_tiles prefetches them
  p.dtype = kNhwc ? kDType<T> : kDType<A>;
  p.out_dtype = kDType<M>;
  p.out_stride_w = pitch;
  p.out_stride_h = whole.out_w * pitch;
  for_each_image(whole, row, rows, [&](int64_t n, int64_t y, int64_t count, int64_t pixel) {
    const T* const image = static_cast<const T*>(args.depthwise.input) + n * whole.in_stride_n;
    stage.rows_per_tile = count;
    const A* const weight = static_cast<const A*>(args.depthwise.weight);
    if constexpr (kNhwc) {
      stage.weight = weight;
      p.out_h = count;
      p.pad_h = whole.pad_h - y * whole.stride_h;
      stage.input = image;
      stage.output = middle + pixel * pitch;
      args.depthwise_kernel(stage, nullptr, one_tile());
    } else {
      constexpr int kVec = kLanes<A>;
      const Range in_rows = crop_input(whole, y, count, &p);
      p.in_stride_w = kVec;
      p.in_stride_h = whole.in_w * kVec;
      stage.input = staged;
      for (int64_t c = 0; c < whole.channels; c += kVec) {
        const int lanes = lanes_left(whole.channels - c, kVec);
        const T* from[kVec];
        for (int l = 0; l < lanes; ++l) from[l] = image + (c + l) * whole.in_stride_c + in_rows.begin * whole.in_stride_h;
        planes_to_lanes<T, A>(from, 0, lanes, p.in_h, whole.in_w, whole.in_stride_h, staged);
        p.channels = lanes;
        stage.weight = weight + c;
        stage.bias = args.depthwise.bias ? static_cast<const A*>(args.depthwise.bias) + c : nullptr;
        stage.output = middle + pixel * pitch + c;
        args.depthwise_kernel(stage, nullptr, one_tile());
      }
    }
  });
}

// A panel's product, [pixel][kPanel], to the planes of its output channels.
template <class T, class A>
void product_to_planes(const SeparableArgs& args, int64_t row, int64_t rows, int64_t channel, int columns, const A* product) {
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.depthwise.problem;
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

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t separable_forward_nhwc_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using P = typename ProductOf<T>::type;
  using A = typename P::A;
  const int64_t pixel = middle_pitch<P>(p.channels) * sizeof(typename P::Middle) + kPanel<A> * sizeof(A);
  return P::padded_pixels(rows_per_tile * p.out_w) * pixel;
}

template <class T, int = 0>
int64_t separable_forward_nchw_transposed_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using P = typename ProductOf<T>::type;
  using A = typename P::A;
  const int64_t staged = most_input_rows(p, rows_per_tile < p.out_h ? rows_per_tile : p.out_h) * p.in_w * kLanes<A>;
  const int64_t product = P::padded_pixels(rows_per_tile * p.out_w) * kPanel<A>;
  const int64_t more = staged > product ? staged - product : 0;
  return separable_forward_nhwc_scratch<T>(p, rows_per_tile) + more * static_cast<int64_t>(sizeof(A));
}

template <class T, bool kNhwc>
void separable_tiles(const SeparableArgs& args, void* scratch, Tiles tiles) {
  using P = typename ProductOf<T>::type;
  using A = typename P::A;
  using M = typename P::Middle;
  const CpuProblem& p = args.depthwise.problem;
  const int64_t total_rows = p.batch * p.out_h;
  const int64_t pitch = middle_pitch<P>(p.channels);
  const int64_t depth = padded_channels<P>(p.channels);
  const int64_t panels = ceil_div(args.out_channels, kPanel<A>);
  const int64_t tile_pixels = args.rows_per_tile * p.out_w;
  M* const middle = static_cast<M*>(scratch);
  const int64_t middle_size = P::padded_pixels(tile_pixels) * pitch;
  // The product, or its sums so far; in NCHW the staging of the depthwise stage before.
  A* const product = reinterpret_cast<A*>(middle + middle_size);
  if (depth != p.channels) memset(middle, 0, middle_size * sizeof(M));  // the channels that no stage writes
  const P pointwise(tile_pixels);
  int64_t staged_row = -1;
  const bool in_place = kNhwc && reads_in_place<T, P>(args);
  ExpandedRows<T, P, kNhwc> expanded(args, pointwise, scratch);
  Patches<T, P> patches(args, scratch);
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t row = tile / args.splits * args.rows_per_tile;
    const int64_t rows = row + args.rows_per_tile < total_rows ? args.rows_per_tile : total_rows - row;
    const int64_t split = tile % args.splits;
    const int64_t pixels = rows * p.out_w;
    // In place a register tile's rows have to be there: those of the last one are copied.
    const int64_t placed = in_place ? pixels / kGemmRows * kGemmRows : 0;
    const M* const lying = in_place ? static_cast<const M*>(args.depthwise.input) + row * p.out_w * p.channels : nullptr;
    if (row != staged_row) {
      if (in_place) {
        if constexpr (kSame<T, M>)
          copy_pixels<A, T, M>(lying + placed * p.channels, p.channels, pixels - placed, p.channels, nullptr, pitch, middle);
      } else if (args.patches != nullptr) {
        patches.stage(row, rows);
        if constexpr (!kSame<A, M>) patches.copy(row, rows, pitch, middle);
      } else if (args.depthwise_kernel == nullptr) {
        copy_stage<T, A, M, kNhwc>(args, row, rows, pitch, product, middle);
      } else if (args.expand != nullptr) {
        expanded.stage(row, rows, pitch, middle);
      } else {
        depthwise_stage<T, A, M, kNhwc>(args, row, rows, pitch, product, middle);
      }
    }
    staged_row = row;
    const int64_t first_panel = panels * split / args.splits, end_panel = panels * (split + 1) / args.splits;
    const int64_t work = rows * p.out_w * p.channels;  // of a panel
    ProductPrefetch upcoming;
    upcoming.output = p.prefetch_output;
    if (p.prefetch_input && split + 1 == args.splits && row + rows < total_rows) {
      const int64_t left = total_rows - row - rows;
      upcoming.input = next_input(p, static_cast<const T*>(args.depthwise.input), row + rows, rows < left ? rows : left,
                                  (end_panel - first_panel) * work);
    }
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t j = panel * kPanel<A>;
      const int columns = lanes_left(args.out_channels - j, kPanel<A>);
      const M* const weight = static_cast<const M*>(args.pw_weight) + j * depth;
      const A* const bias = static_cast<const A*>(args.pw_bias) + j;
      if (panel + 1 < panels) upcoming.weights = {weight + depth * kPanel<A>, weight + 2 * depth * kPanel<A>, work};
      const auto multiply = [&](const auto& to) {
        if constexpr (kSame<A, M>) {
          if (args.patches != nullptr) return patches.multiply(row, rows, weight, bias, to, upcoming);
        }
        if (placed > 0) {
          pointwise.multiply(args.activation, lying, p.channels, placed, p.channels, weight, product, bias, to, upcoming);
        }
        if (placed < pixels) {
          pointwise.multiply(args.activation, middle, pitch, pixels - placed, p.channels, weight, product, bias,
                             from_row(to, placed, 0), upcoming);
        }
      };
      if constexpr (kNhwc) {
        const int64_t first = row * p.out_w * args.out_channels + j;
        const T* const residual = args.residual ? static_cast<const T*>(args.residual) + first : nullptr;
        multiply(GemmTarget<T>{static_cast<T*>(args.output) + first, residual, args.out_channels, 0, columns});
      } else {
        multiply(GemmTarget<A>{product, nullptr, kPanel<A>, 0, columns});
        product_to_planes<T, A>(args, row, rows, j, columns, product);
      }
    }
  }
}

template <class T>
void separable_forward_nhwc(const SeparableArgs& args, void* scratch, Tiles tiles) {
  separable_tiles<T, true>(args, scratch, tiles);
}

template <class T>
void separable_forward_nchw_transposed(const SeparableArgs& args, void* scratch, Tiles tiles) {
  separable_tiles<T, false>(args, scratch, tiles);
}

template <class T>
constexpr PointwiseFormat pointwise_format() {
  using P = typename ProductOf<T>::type;
  constexpr DType kind = sizeof(typename P::Middle) == 8   ? DType::kFloat64
                         : sizeof(typename P::Middle) == 4 ? DType::kFloat32
                                                           : DType::kBFloat16;
  return {kPanel<typename P::A>, P::kDepthMultiple, kind, P::kRows};
}

}  // namespace dwconv::DWCONV_ISA
