// Depthwise forward and strided input gradient in NCHW for square filters of 3, 5 and 7 (the formulas: taps.cuh).
//
// A block owns a tile of outputs in each of `slab` planes (n, c): small planes go several to a block. The input under the tile
// lies in shared memory as it lies in global memory (stage.cuh: whole rows of a plane are one flat piece, so that widths of 14 or
// 7 move in 16-byte chunks too), each byte read once. A thread computes one patch of 4 x 7 (4 x 6) outputs of one plane with the
// plane's filter in registers; seven columns, because then neighbouring lanes lie an odd number of elements apart and no two
// share a bank of shared memory. The outputs go back through shared memory, so that global stores are 16-byte chunks as well.
//
// The plan guarantees: planes * patches <= block_size(); shared memory for the larger of the two tiles.
// Traffic: input (1 + halo rows), output once; a filter is read once a patch, from L1.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/stage.cuh"
#include "cuda/kernels/taps.cuh"

namespace dwconv::cuda {

// Patches of the strided input gradient begin at multiples of the stride; three input columns apart serves the banks as well.
constexpr int kPlanePatchRows = 4, kPlanePatchColumns = 7, kTransposedPatchColumns = 6;

// One plane's filter into registers.
template <class T, int K>
DWCONV_DEVICE void load_filter(const T* weight, bool flipped, accumulate_t<T> (&filter)[K][K][1]) {
#pragma unroll
  for (int i = 0; i < K * K; ++i) filter[i / K][i % K][0] = load_one(weight + (flipped ? K * K - 1 - i : i));
}

// Samples x .. x + kSpan of a row whose column 0 is `row[0]`; zeros outside 0 .. width.
template <int kSpan, class T>
DWCONV_DEVICE void load_row(const T* row, int x, int width, accumulate_t<T> (&to)[kSpan][1]) {
#pragma unroll
  for (int q = 0; q < kSpan; ++q) {
    const bool inside = static_cast<unsigned>(x + q) < static_cast<unsigned>(width);
    to[q][0] = inside ? to_accumulate(row[x + q]) : accumulate_t<T>(0);
  }
}

template <class T, class Taps>
DWCONV_KERNEL(kMostThreads, nchw_blocks(Taps::kKernel))
depthwise_nchw(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, kRows = kPlanePatchRows;
  constexpr int kColumns = Taps::kTransposed ? kTransposedPatchColumns : kPlanePatchColumns, kSpan = Taps::span(kColumns);
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  int block = block_index();
  const int64_t group = block % slabs_of(t);
  block /= slabs_of(t);
  const int tile_x = static_cast<int>(block % t.tiles_w), tile_y = static_cast<int>(block / t.tiles_w);

  const int64_t plane0 = group * t.slab, left = p.batch * p.channels - plane0;
  const int planes = static_cast<int>(left < t.slab ? left : t.slab);
  const ImageNumbers numbers(plane0, p.channels, args.channels);
  const int pad_h = static_cast<int>(p.pad_h), pad_w = static_cast<int>(p.pad_w);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int y0 = tile_y * t.tile_h + Taps::begin(pad_h), x0 = tile_x * t.tile_w + Taps::begin(pad_w);
  const int in_y0 = Taps::origin(y0, pad_h), in_x0 = Taps::origin(x0, pad_w);
  // The rectangles inside the planes, of input and output.
  const int in_top = most(in_y0, 0), in_left = args.in_whole ? 0 : most(in_x0, 0);
  const int in_bottom = least(in_y0 + Taps::span(t.tile_h), in_h), in_right = least(in_x0 + Taps::span(t.tile_w), in_w);
  const int out_top = most(y0, 0), out_left = args.out_whole ? 0 : most(x0, 0);
  const int out_bottom = least(y0 + t.tile_h, out_h), out_right = least(x0 + t.tile_w, out_w);

  T* const shared = reinterpret_cast<T*>(shared_memory());
  const PlaneTile<T> in = {shared,
                           args.in_pitch,
                           args.in_whole != 0,
                           most(in_bottom - in_top, 0),
                           args.in_whole ? in_w : most(in_right - in_left, 0),
                           p.in_stride_h};
  const PlaneTile<T> out = {
      shared,        args.out_pitch, args.out_whole != 0, out_bottom - out_top, args.out_whole ? out_w : out_right - out_left,
      p.out_stride_h};
  const T* const in_corner = static_cast<const T*>(args.input) + in_top * p.in_stride_h + in_left;
  T* const out_corner = static_cast<T*>(args.output) + out_top * p.out_stride_h + out_left;
  const auto in_first = [&](int q) { return in_corner + numbers.offset(q, p.in_stride_n, p.in_stride_c); };
  const auto out_first = [&](int q) { return out_corner + numbers.offset(q, p.out_stride_n, p.out_stride_c); };
  if (in.rows > 0 && in.columns > 0) {
    const int64_t before = in_top * p.in_stride_h + in_left;
    stage_planes(in, planes, before, (in_h - 1) * p.in_stride_h + in_w - before, args.in_chunks, in_first);
  }
  copy_commit();
  copy_wait<0>();
  synchronize();

  const int patches_w = t.tile_w / kColumns, patches = patches_w * (t.tile_h / kRows);
  const int q = thread_index() / patches, patch = thread_index() - q * patches;
  const int y = patch / patches_w * kRows, x = patch % patches_w * kColumns;
  const bool active = q < planes && y0 + y < out_h && x0 + x < out_w;
  A acc[kRows][kColumns][1];
  if (active) {
    const int64_t c = numbers.inner(q);
    A filter[K][K][1];
    load_filter(static_cast<const T*>(args.weight) + c * K * K, args.flipped, filter);
    const A bias = args.bias != nullptr ? load_bias<T>(args.bias, c, args.wide_bias) : A(0);
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) acc[i / kColumns][i % kColumns][0] = bias;
    const T* const first = in_first(q);
#pragma unroll
    for (int j = 0; j < Taps::span(kRows); ++j) {
      const int row = in_y0 + Taps::advance(y) + j;
      if (row < in_top || row >= in_bottom) continue;
      A values[kSpan][1];
      load_row<kSpan>(in.row(q, row - in_top, first), in_x0 + Taps::advance(x) - in_left, in.columns, values);
      multiply_row<Taps, kRows, kColumns, 1>(j, values, filter, acc);
    }
  }
  synchronize();  // the input's tile becomes the output's
  if (active) {
    activate_short(p.activation, acc);
    const T* const first = out_first(q);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (y0 + y + i < out_top || y0 + y + i >= out_bottom) continue;
      T* const row = out.row(q, y0 + y + i - out_top, first) - out_left;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (x0 + x + k >= out_left && x0 + x + k < out_right) row[x0 + x + k] = from_accumulate<T>(acc[i][k][0]);
      }
    }
  }
  synchronize();
  unstage_planes(out, planes, args.out_chunks, out_first);
}

}  // namespace dwconv::cuda
