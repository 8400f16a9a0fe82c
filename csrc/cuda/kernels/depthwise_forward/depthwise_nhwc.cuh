// Depthwise forward and strided input gradient in channels_last for square filters of 3, 5 and 7 (the formulas: taps.cuh).
//
// A block owns `slab` channels (32 to 128 bytes, whole sectors) of a tile of outputs. It copies the input under the tile, halo
// included, to shared memory once, [row][column][channel], by asynchronous 16-byte copies that also write the zeros of the
// padding.
//
//     lanes ->  channels of the slab, kVector a thread        a thread's patch: kRows x kColumns outputs, its
//     slots ->  patches of the tile, round robin              filter (K * K * kVector values) in registers
//
// A patch reads each row of its input once into registers and adds it to every output row that it reaches: 3x3 at stride 1 reads
// 2.25 values of shared memory an output instead of 9. A warp stores runs of a whole slab, 32 to 128 contiguous bytes a pixel.
//
// The plan guarantees: the tile's sides are multiples of the patch's; slab is a power of two and block_size() a multiple of its
// lanes; shared memory for the filters and the tile. Traffic: input (1 + halo), output once, the filters of the slab once a
// block.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/stage.cuh"
#include "cuda/kernels/taps.cuh"

namespace dwconv::cuda {

constexpr int kThreadChannels = 2;  // their filters must fit the registers
constexpr int kPatchRows = 4, kPatchColumns = 4;

// filter[tap][channel] of the slab in shared memory, from weight[channel][tap]; zeros past the last channel.
template <class T>
DWCONV_DEVICE void stage_filters(accumulate_t<T>* filters, const T* weight, int taps, int slab, int channels, bool flipped) {
  for (int i = thread_index(); i < taps * slab; i += block_size()) {
    const int channel = i / taps, tap = i - channel * taps;
    filters[(flipped ? taps - 1 - tap : tap) * slab + channel] = channel < channels ? load_one(weight + i) : accumulate_t<T>(0);
  }
}

template <class T, int V>
DWCONV_DEVICE void widen(const T* from, accumulate_t<T> (&to)[V]) {
  const Vector<T, V> vector = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_accumulate(vector.value[v]);
}

// kVector channels of one pixel to global memory, those below `channels`.
template <class T, int V>
DWCONV_DEVICE void store_channels(T* to, const accumulate_t<T> (&value)[V], int channels, bool aligned) {
  if (aligned) {
    store_packed(to, pack<T, V>(value));
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v < channels) store(to + v, Vector<T, 1>{{from_accumulate<T>(value[v])}});
    }
  }
}

// The outputs of a patch that exist, by store(address, row, column); `first` is the address of the patch's first.
template <class T, class Exists, class Store>
DWCONV_DEVICE void store_patch(T* first, int64_t stride_h, int64_t stride_w, const Exists& exists, const Store& store) {
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
    for (int k = 0; k < kPatchColumns; ++k) {
      if (exists(i, k)) store(first + k * stride_w, i, k);
    }
    first += stride_h;
  }
}

template <class T, class Taps>
DWCONV_KERNEL(kMostThreads, nhwc_blocks(Taps::kKernel))
depthwise_nhwc(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, V = kThreadChannels, kSpan = Taps::span(kPatchColumns);
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const auto [slab_index, tile_x, tile_y, n] = tile_of_block(args, block_index());
  const int slab = t.slab;
  const int64_t c0 = static_cast<int64_t>(slab_index) * slab;
  const int channels = static_cast<int>(p.channels - c0 < slab ? p.channels - c0 : slab);
  const int pad_h = static_cast<int>(p.pad_h), pad_w = static_cast<int>(p.pad_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int y0 = tile_y * t.tile_h + Taps::begin(pad_h), x0 = tile_x * t.tile_w + Taps::begin(pad_w);
  const int columns = args.in_columns.divisor;

  A* const filters = reinterpret_cast<A*>(shared_memory());
  T* const tile = reinterpret_cast<T*>(filters + K * K * slab);
  const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + c0;
  stage_pixels(tile, image, Taps::span(t.tile_h), Taps::origin(y0, pad_h), Taps::origin(x0, pad_w), args.in_columns,
               args.in_chunks, static_cast<int>(p.in_h), static_cast<int>(p.in_w), p.in_stride_h, static_cast<int>(p.in_stride_w),
               slab, channels, t.aligned);
  copy_commit();
  stage_filters(filters, static_cast<const T*>(args.weight) + c0 * K * K, K * K, slab, channels, args.flipped);
  copy_wait<0>();
  synchronize();

  const int lanes = slab / V;
  const int channel = thread_index() % lanes * V;
  if (channel >= channels) return;
  A filter[K][K][V], bias[V];
#pragma unroll
  for (int r = 0; r < K; ++r) {
#pragma unroll
    for (int s = 0; s < K; ++s) {
#pragma unroll
      for (int v = 0; v < V; ++v) filter[r][s][v] = filters[(r * K + s) * slab + channel + v];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool given = args.bias != nullptr && channel + v < channels;
    bias[v] = given ? load_bias<T>(args.bias, c0 + channel + v, args.wide_bias) : A(0);
  }

  T* const out = static_cast<T*>(args.output) + n * p.out_stride_n + c0 + channel;
  const int patches_w = t.tile_w / kPatchColumns, patches = patches_w * (t.tile_h / kPatchRows);
  for (int patch = thread_index() / lanes; patch < patches; patch += block_size() / lanes) {
    const int patch_row = patch / patches_w;
    const int y = patch_row * kPatchRows, x = (patch - patch_row * patches_w) * kPatchColumns;
    if (y0 + y >= out_h || x0 + x >= out_w) continue;
    A acc[kPatchRows][kPatchColumns][V];
#pragma unroll
    for (int i = 0; i < kPatchRows * kPatchColumns; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) acc[i / kPatchColumns][i % kPatchColumns][v] = bias[v];
    }
    const T* const from = tile + (Taps::advance(y) * columns + Taps::advance(x)) * slab + channel;
#pragma unroll
    for (int j = 0; j < Taps::span(kPatchRows); ++j) {
      A row[kSpan][V];
#pragma unroll
      for (int q = 0; q < kSpan; ++q) widen<T, V>(from + (j * columns + q) * slab, row[q]);
      multiply_row<Taps, kPatchRows, kPatchColumns, V>(j, row, filter, acc);
    }
    activate_short(p.activation, acc);
    T* const first = out + (y0 + y) * p.out_stride_h + (x0 + x) * p.out_stride_w;
    const bool inside = y0 + y >= 0 && y0 + y + kPatchRows <= out_h && x0 + x >= 0 && x0 + x + kPatchColumns <= out_w;
    if (inside && t.aligned) {
      store_patch<T>(
          first, p.out_stride_h, p.out_stride_w, [](int, int) { return true; },
          [&](T* to, int i, int k) { store_packed(to, pack<T, V>(acc[i][k])); });
    } else {
      store_patch<T>(
          first, p.out_stride_h, p.out_stride_w,
          [&](int i, int k) {
            return static_cast<unsigned>(y0 + y + i) < static_cast<unsigned>(out_h) &&
                   static_cast<unsigned>(x0 + x + k) < static_cast<unsigned>(out_w);
          },
          [&](T* to, int i, int k) { store_channels<T, V>(to, acc[i][k], channels - channel, t.aligned); });
    }
  }
}

}  // namespace dwconv::cuda
