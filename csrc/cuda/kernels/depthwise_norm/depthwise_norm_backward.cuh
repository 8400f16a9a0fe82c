// Backward of y = act(batch_norm(z)), z = depthwise(x), by the batch's statistics: the gradients of x and of the filters in one
// pass over x, z and dy, once BatchNorm's sums are there (batch_norm_sums.cuh). The gradient of z is never written to memory.
//
//   dz = scale (g - dbias / n - (z - mean) slope), g = dy act'                         batch_norm.cuh
//   dx[i, j] = sum over taps (r, s) of w[r, s] dz[(i + pad - r) / S, (j + pad - s) / S]      where S divides both
//   dw[r, s] = sum over (i, j) of x[i, j] dz of the same place
//
// Both take the same dz for a pixel of x, and x itself is read once, without a halo. A block goes over tiles of x, a slab of
// channels of each:
//
//     z, dy --dz in the accumulation type--> tile and halo in shared memory
//     x -----> registers, a patch of S x 4 pixels and one or two channels a thread --> dx
//                                                                                  `-> dw, summed over the tiles, then the block
//
// Here channels_last; depthwise_norm_backward_nchw.cuh has NCHW.
// The plan guarantees: channels and tensors made of aligned runs of 16 bytes; slab / V lanes, a power of two, side by side.
// Traffic: z and dy with the halo, x and dx once; parts of dw.
#pragma once

#include "cuda/kernels/batch_norm/batch_norm_values.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"
#include "cuda/kernels/depthwise_norm/args.h"

namespace dwconv::cuda {

// BatchNorm's gradient of a tile's part of z, rows x columns x slab, zeros outside of z.
template <class T>
DWCONV_DEVICE void stage_norm_gradient(const DepthwiseNormArgs& args, int64_t image, int64_t c0, int y0, int x0, int rows,
                                       int columns, accumulate_t<T>* tile) {
  using A = accumulate_t<T>;
  constexpr int V = 4;  // eight would leave no registers for the filters and their sums
  const DepthwiseProblem& p = args.problem;
  const int chunks = args.slab / V, chunk = thread_index() % chunks;  // chunks divide the block
  const int64_t c = c0 + chunk * V;
  if (c >= p.channels) return;  // whole chunks
  const BackwardValues<T, V, false> norm(args.norm, c);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int64_t start = image * p.out_h * p.out_w * p.channels + c;
  int pixel = thread_index() / chunks;
  int row = pixel / columns, column = pixel - row * columns;
  const int step = block_size() / chunks, step_rows = step / columns, step_columns = step - step_rows * columns;
  for (; pixel < rows * columns; pixel += step) {
    const int y = y0 + row, x = x0 + column;
    const bool inside =
        static_cast<unsigned>(y) < static_cast<unsigned>(out_h) && static_cast<unsigned>(x) < static_cast<unsigned>(out_w);
    const int64_t at = start + (inside ? (static_cast<int64_t>(y) * out_w + x) * p.channels : 0);
    A z[V], g[V];
    widen(load_packed<V>(static_cast<const T*>(args.norm.input) + at, inside), z);
    widen(load_packed<V>(static_cast<const T*>(args.norm.grad_output) + at, inside), g);
    norm.gradient(args.norm.activation, z, g);
    A* const to = tile + pixel * args.slab + chunk * V;
    Vector<A, V> run;
#pragma unroll
    for (int v = 0; v < V; ++v) run.value[v] = inside ? g[v] : A(0);
    *reinterpret_cast<Vector<A, V>*>(to) = run;
    column += step_columns, row += step_rows;
    if (column >= columns) column -= columns, ++row;
  }
}

// Adds what the dz that read(j, q) gives, row j and column q of those that a patch reaches, brings a patch's dx and dw.
template <class Taps, int V, class A, class Read>
DWCONV_DEVICE void add_patch(const Read& read, const A (&filter)[Taps::kKernel][Taps::kKernel][V],
                             const A (&x)[Taps::kStride][kGradientColumns][V], A (&dx)[Taps::kStride][kGradientColumns][V],
                             A (&dw)[Taps::kKernel][Taps::kKernel][V]) {
  constexpr int S = Taps::kStride, kSpan = Taps::span(kGradientColumns);
#pragma unroll
  for (int j = 0; j < Taps::span(S); ++j) {
    A dz[kSpan][V];
    read(j, dz);
    multiply_row<Taps, S, kGradientColumns, V>(j, dz, filter, dx);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const int r = Taps::tap(i, j);
      if (r < 0) continue;
#pragma unroll
      for (int column = 0; column < kGradientColumns; ++column) {
#pragma unroll
        for (int q = 0; q < kSpan; ++q) {
          const int s = Taps::tap(column, q);
          if (s < 0) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) dw[r][s][v] += x[i][column][v] * dz[q][v];
        }
      }
    }
  }
}

template <class T, int K, int S>
DWCONV_KERNEL(kDepthwiseNormThreads, kDepthwiseNormBlocks)
depthwise_norm_backward_nhwc(DepthwiseNormArgs args) {
  using A = accumulate_t<T>;
  using Taps = Transposed<K, S>;
  constexpr int V = depthwise_norm_channels(K), kColumns = kGradientColumns, kSpan = Taps::span(kColumns);
  const DepthwiseProblem& p = args.problem;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w), slab = args.slab;
  const int pad_h = static_cast<int>(p.pad_h), pad_w = static_cast<int>(p.pad_w);
  const int64_t part = divided(block_index(), args.slabs), c0 = (block_index() - part * args.slabs) * slab;
  const int lanes = slab / V, slot = thread_index() / lanes, slots = block_size() / lanes;
  const int lane = (thread_index() - slot * lanes) * V;
  const int64_t channel = c0 + lane;
  const bool works = channel < p.channels;  // whole runs of V
  const int rows = Taps::span(args.tile_h), columns = Taps::span(args.tile_w), patches_w = args.tile_w / kColumns;
  A* const tile = reinterpret_cast<A*>(shared_memory());

  A filter[K][K][V] = {}, grad[K][K][V] = {};
  if (works) fetch_filters<T, K, V>(static_cast<const T*>(args.weight) + channel * (K * K), false, filter);
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t index = divided(args.tiles * part, args.parts); index < end; ++index) {
    const int64_t strip = divided(index, args.tiles_w), image = divided(strip, args.tiles_h);
    const int y0 = Taps::begin(pad_h) + static_cast<int>(strip - image * args.tiles_h) * args.tile_h;
    const int x0 = Taps::begin(pad_w) + static_cast<int>(index - strip * args.tiles_w) * args.tile_w;
    synchronize();  // the tile before has been read
    stage_norm_gradient<T>(args, image, c0, Taps::origin(y0, pad_h), Taps::origin(x0, pad_w), rows, columns, tile);
    synchronize();
    if (!works) continue;
    const int64_t start = image * p.in_h * p.in_w * p.channels + channel;
    for (int patch = slot; patch < args.tile_h / S * patches_w; patch += slots) {
      const int patch_y = patch / patches_w, patch_x = (patch - patch_y * patches_w) * kColumns;
      const int i0 = y0 + patch_y * S, j0 = x0 + patch_x;
      A x[S][kColumns][V], sum[S][kColumns][V] = {};
#pragma unroll
      for (int i = 0; i < S; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const bool inside = static_cast<unsigned>(i0 + i) < static_cast<unsigned>(in_h) &&
                              static_cast<unsigned>(j0 + j) < static_cast<unsigned>(in_w);
          const int64_t at = inside ? (static_cast<int64_t>(i0 + i) * in_w + j0 + j) * p.channels : 0;
          widen(load_packed<V>(static_cast<const T*>(args.input) + start + at, inside), x[i][j]);
        }
      }
      const A* const from = tile + (Taps::advance(patch_y * S) * columns + Taps::advance(patch_x)) * slab + lane;
      const auto read = [&](int j, A(&dz)[kSpan][V]) {
#pragma unroll
        for (int q = 0; q < kSpan; ++q) {
          const Vector<A, V> run = *reinterpret_cast<const Vector<A, V>*>(from + (j * columns + q) * slab);
#pragma unroll
          for (int v = 0; v < V; ++v) dz[q][v] = run.value[v];
        }
      };
      add_patch<Taps, V>(read, filter, x, sum, grad);
#pragma unroll
      for (int i = 0; i < S; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (static_cast<unsigned>(i0 + i) >= static_cast<unsigned>(in_h) ||
              static_cast<unsigned>(j0 + j) >= static_cast<unsigned>(in_w)) {
            continue;
          }
          const int64_t at = start + (static_cast<int64_t>(i0 + i) * in_w + j0 + j) * p.channels;
          store_packed(static_cast<T*>(args.grad_input) + at, pack<T, V>(sum[i][j]));
        }
      }
    }
  }

  // The slots' sums, in their order.
  synchronize();
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
#pragma unroll
    for (int v = 0; v < V; ++v) tile[(slot * K * K + tap) * slab + lane + v] = grad[tap / K][tap % K][v];
  }
  synchronize();
  for (int i = thread_index(); i < K * K * slab; i += block_size()) {
    const int tap = i / slab;
    const int64_t c = c0 + i - tap * slab;
    if (c >= p.channels) continue;
    A sum = 0;
    for (int s = 0; s < slots; ++s) sum += tile[s * K * K * slab + i];
    store_one(args.partial, (part * p.channels + c) * (K * K) + tap, sum);
  }
}

}  // namespace dwconv::cuda
