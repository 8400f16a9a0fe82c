// depthwise_norm_backward.cuh in NCHW: a block has one channel, and goes over tiles of several images' planes, small ones of
// many.
//
//     z, dy --dz--> lines of the tile and its halo, of each image, in shared memory
//     x -----> registers, a patch of S x 4 pixels a thread --> dx
//                                                      `-> dw, summed over the tiles, then the block
//
// The plan guarantees: lines begin on multiples of 16 bytes of shared memory, with room for a patch's reads behind the last.
// Traffic: z and dy with the halo, x and dx once; parts of dw.
#pragma once

#include "cuda/kernels/depthwise_norm/depthwise_norm_backward.cuh"

namespace dwconv::cuda {

// Four pixels of a plane's row, zeros where the mask has no bit.
template <class T>
DWCONV_DEVICE void load_pixels(const T* from, unsigned mask, accumulate_t<T> (&to)[kGradientColumns][1]) {
  constexpr int kWidth = kGradientColumns;
  if (mask == 15 && reinterpret_cast<uintptr_t>(from) % (kWidth * sizeof(T)) == 0) {
    const Vector<T, kWidth> run = load<kWidth>(from);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i][0] = to_accumulate(run.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i][0] = mask >> i & 1 ? load_one(from + i) : accumulate_t<T>(0);
  }
}
template <class T>
DWCONV_DEVICE void store_pixels(T* to, unsigned mask, const accumulate_t<T> (&value)[kGradientColumns][1]) {
  constexpr int kWidth = kGradientColumns;
  if (mask == 15 && reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(T)) == 0) {
    accumulate_t<T> run[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) run[i] = value[i][0];
    store_packed(to, pack<T, kWidth>(run));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (mask >> i & 1) store_packed(to + i, pack<T, 1>(value[i]));
    }
  }
}

template <class T, int K, int S>
DWCONV_KERNEL(kDepthwiseNormThreads, kDepthwiseNormBlocks)
depthwise_norm_backward_nchw(DepthwiseNormArgs args) {
  using A = accumulate_t<T>;
  using Taps = Transposed<K, S>;
  constexpr int kSpan = Taps::span(kGradientColumns), kRun = kGradientColumns / S;  // a patch's dz begin on a multiple of kRun
  const DepthwiseProblem& p = args.problem;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w), pitch = args.pitch;
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int pad_h = static_cast<int>(p.pad_h), pad_w = static_cast<int>(p.pad_w);
  const int64_t part = divided(block_index(), p.channels), channel = block_index() - part * p.channels;
  const int rows = Taps::span(args.tile_h), columns = Taps::span(args.tile_w);
  const int patches_w = args.tile_w / kGradientColumns, patches = args.tile_h / S * patches_w;  // of an image's tile
  A* const tile = reinterpret_cast<A*>(shared_memory());

  const BackwardValues<T, 1, true> norm(args.norm, channel);
  A filter[K][K][1], grad[K][K][1] = {};
  fetch_filters<T, K, 1>(static_cast<const T*>(args.weight) + channel * (K * K), false, filter);
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t index = divided(args.tiles * part, args.parts); index < end; ++index) {
    const int64_t strip = divided(index, args.tiles_w), group = divided(strip, args.tiles_h), image0 = group * args.slab;
    const int y0 = Taps::begin(pad_h) + static_cast<int>(strip - group * args.tiles_h) * args.tile_h;
    const int x0 = Taps::begin(pad_w) + static_cast<int>(index - strip * args.tiles_w) * args.tile_w;
    const int images = p.batch - image0 < args.slab ? static_cast<int>(p.batch - image0) : args.slab;
    const int out_y0 = Taps::origin(y0, pad_h), out_x0 = Taps::origin(x0, pad_w);
    synchronize();  // the tile before has been read
    for (int i = thread_index(); i < images * rows * columns; i += block_size()) {
      const int line = i / columns, column = i - line * columns, image = line / rows;
      const int y = out_y0 + line - image * rows, x = out_x0 + column;
      A z[1] = {}, g[1] = {};
      if (static_cast<unsigned>(y) < static_cast<unsigned>(out_h) && static_cast<unsigned>(x) < static_cast<unsigned>(out_w)) {
        const int64_t at = (((image0 + image) * p.channels + channel) * out_h + y) * out_w + x;
        z[0] = load_one(static_cast<const T*>(args.norm.input) + at);
        g[0] = load_one(static_cast<const T*>(args.norm.grad_output) + at);
        norm.gradient(args.norm.activation, z, g);
      }
      tile[line * pitch + column] = g[0];
    }
    synchronize();
    for (int i = thread_index(); i < images * patches; i += block_size()) {
      const int image = i / patches, patch = i - image * patches, patch_y = patch / patches_w;
      const int i0 = y0 + patch_y * S, j0 = x0 + (patch - patch_y * patches_w) * kGradientColumns;
      const int64_t start = (((image0 + image) * p.channels + channel) * in_h + i0) * in_w + j0;
      const unsigned inside = columns_inside<kGradientColumns>(j0, in_w);
      unsigned mask[S];
      A x[S][kGradientColumns][1], sum[S][kGradientColumns][1] = {};
#pragma unroll
      for (int s = 0; s < S; ++s) {
        mask[s] = static_cast<unsigned>(i0 + s) < static_cast<unsigned>(in_h) ? inside : 0;
        load_pixels(static_cast<const T*>(args.input) + start + s * in_w, mask[s], x[s]);
      }
      const A* const from = tile + (image * rows + Taps::advance(patch_y * S)) * pitch + Taps::advance(j0 - x0);
      const auto read = [&](int j, A(&dz)[kSpan][1]) {
#pragma unroll
        for (int q = 0; q < kSpan; q += kRun) {
          const Vector<A, kRun> run = *reinterpret_cast<const Vector<A, kRun>*>(from + j * pitch + q);
#pragma unroll
          for (int v = 0; v < kRun; ++v) {
            if (q + v < kSpan) dz[q + v][0] = run.value[v];
          }
        }
      };
      add_patch<Taps, 1>(read, filter, x, sum, grad);
#pragma unroll
      for (int s = 0; s < S; ++s) store_pixels(static_cast<T*>(args.grad_input) + start + s * in_w, mask[s], sum[s]);
    }
  }

  // The threads' sums: of 32 at a time, then of these.
  constexpr int kGroups = kDepthwiseNormThreads / kWarp;
  synchronize();
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) tile[tap * (kDepthwiseNormThreads + 1) + thread_index()] = grad[tap / K][tap % K][0];
  synchronize();
  A sum = 0;
  const int tap = thread_index() / kGroups, group = thread_index() % kGroups;
  if (tap < K * K) {
    for (int i = 0; i < kWarp; ++i) sum += tile[tap * (kDepthwiseNormThreads + 1) + group * kWarp + i];
  }
  synchronize();
  if (tap < K * K) tile[thread_index()] = sum;
  synchronize();
  if (thread_index() < K * K) {
    sum = 0;
    for (int i = 0; i < kGroups; ++i) sum += tile[thread_index() * kGroups + i];
    store_one(args.partial, (part * p.channels + channel) * (K * K) + thread_index(), sum);
  }
}

}  // namespace dwconv::cuda
