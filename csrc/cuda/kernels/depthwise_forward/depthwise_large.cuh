// Depthwise forward for any filter at stride 1 and dilation 1, up to 31 x 31 and beyond, both layouts; with the filter flipped,
// its input gradient. Hundreds of multiply-adds an output: the kernel is bound by arithmetic and by reads of shared memory, not
// by traffic.
//
// The block's filters and the input under its tile, halo and zero padding included, lie in shared memory. A thread owns kRows x 8
// neighbouring outputs; along a filter row it walks the taps 8 (then 4, 2, 1) at a time: 15 inputs and 8 filter values for 64
// products a row of outputs. In NCHW a row of inputs serves 4 rows of outputs, where the filter has several; in channels_last a
// thread has one row of outputs but 2 channels.
//
// The plan guarantees: the tile's sides are multiples of kRows and 8; shared memory for filters and tile.
// Traffic: input (1 + halo), output once, filters once a block.
#pragma once

#include "cuda/kernels/depthwise_forward/depthwise_nchw.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_nhwc.cuh"

namespace dwconv::cuda {

constexpr int kLargeColumns = 8;
constexpr int kLargeChannels = 2;  // channels_last, a thread

// acc[i][x] += sum over kTaps taps of filter[i][s] * in[x + s]; filter row i may be absent. Values are `stride` apart.
template <int kTaps, int kRows, int V, class T, class A>
DWCONV_DEVICE void multiply_taps(const T* in, const T* const (&filter)[kRows], const bool (&present)[kRows], int stride,
                                 A (&acc)[kRows][kLargeColumns][V]) {
  A window[kLargeColumns + kTaps - 1][V];
#pragma unroll
  for (int q = 0; q < kLargeColumns + kTaps - 1; ++q) widen<T, V>(in + q * stride, window[q]);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!present[i]) continue;
#pragma unroll
    for (int s = 0; s < kTaps; ++s) {
      A w[V];
      widen<T, V>(filter[i] + s * stride, w);
#pragma unroll
      for (int x = 0; x < kLargeColumns; ++x) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[i][x][v] += w[v] * window[x + s][v];
      }
    }
  }
}

// A whole filter row, of each of the kRows output rows.
template <int kRows, int V, class T, class A>
DWCONV_DEVICE void multiply_filter_row(const T* in, const T* (&filter)[kRows], const bool (&present)[kRows], int taps, int stride,
                                       A (&acc)[kRows][kLargeColumns][V]) {
  const auto step = [&](auto count) {
    constexpr int kTaps = decltype(count)::value;
    multiply_taps<kTaps, kRows, V>(in, filter, present, stride, acc);
    in += kTaps * stride;
#pragma unroll
    for (int i = 0; i < kRows; ++i) filter[i] += kTaps * stride;
  };
  for (int left = taps; left >= 8; left -= 8) step(std::integral_constant<int, 8>{});
  if (taps & 4) step(std::integral_constant<int, 4>{});
  if (taps & 2) step(std::integral_constant<int, 2>{});
  if (taps & 1) step(std::integral_constant<int, 1>{});
}

// Filters as they are, [tap][channel], in the input's type.
template <class T>
DWCONV_DEVICE void copy_filters(T* filters, const T* weight, int taps, int slab, int channels, bool flipped) {
  for (int i = thread_index(); i < taps * slab; i += block_size()) {
    const int channel = i / taps, tap = i - channel * taps;
    filters[(flipped ? taps - 1 - tap : tap) * slab + channel] = channel < channels ? load<1>(weight + i).value[0] : zero<T>();
  }
}

template <class T>
DWCONV_KERNEL(kMostThreads, kLargeBlocks)
depthwise_large_nhwc(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int V = kLargeChannels;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  int block = block_index();
  const int64_t c0 = block % slabs_of(t) * t.slab;
  block /= slabs_of(t);
  const int x0 = static_cast<int>(block % t.tiles_w) * t.tile_w;
  block /= t.tiles_w;
  const int y0 = static_cast<int>(block % t.tiles_h) * t.tile_h;
  const int64_t n = block / t.tiles_h;
  const int slab = t.slab, channels = static_cast<int>(p.channels - c0 < slab ? p.channels - c0 : slab);
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w), taps = kernel_h * kernel_w;
  const int columns = args.in_columns.divisor;

  T* const tile = reinterpret_cast<T*>(shared_memory());
  T* const filters = tile + (t.tile_h + kernel_h - 1) * columns * slab;
  stage_pixels(tile, static_cast<const T*>(args.input) + n * p.in_stride_n + c0, t.tile_h + kernel_h - 1,
               y0 - static_cast<int>(p.pad_h), x0 - static_cast<int>(p.pad_w), args.in_columns, args.in_chunks,
               static_cast<int>(p.in_h), static_cast<int>(p.in_w), p.in_stride_h, static_cast<int>(p.in_stride_w), slab, channels,
               t.aligned);
  copy_commit();
  copy_filters(filters, static_cast<const T*>(args.weight) + c0 * taps, taps, slab, channels, args.flipped);
  copy_wait<0>();
  synchronize();

  const int lanes = slab / V, channel = thread_index() % lanes * V;
  if (channel >= channels) return;
  const int patches_w = t.tile_w / kLargeColumns;
  for (int patch = thread_index() / lanes; patch < patches_w * t.tile_h; patch += block_size() / lanes) {
    const int y = patch / patches_w, x = (patch - y * patches_w) * kLargeColumns;
    if (y0 + y >= p.out_h || x0 + x >= p.out_w) continue;
    A acc[1][kLargeColumns][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool given = args.bias != nullptr && channel + v < channels;
      const A bias = given ? load_bias<T>(args.bias, c0 + channel + v, args.wide_bias) : A(0);
#pragma unroll
      for (int k = 0; k < kLargeColumns; ++k) acc[0][k][v] = bias;
    }
    for (int r = 0; r < kernel_h; ++r) {
      const T* filter[1] = {filters + r * kernel_w * slab + channel};
      multiply_filter_row<1, V>(tile + ((y + r) * columns + x) * slab + channel, filter, {true}, kernel_w, slab, acc);
    }
    activate_short(p.activation, acc);
    T* const line = static_cast<T*>(args.output) + n * p.out_stride_n + (y0 + y) * p.out_stride_h + c0 + channel;
#pragma unroll
    for (int k = 0; k < kLargeColumns; ++k) {
      if (x0 + x + k < p.out_w) {
        store_channels<T, V>(line + (x0 + x + k) * p.out_stride_w, acc[0][k], channels - channel, t.aligned);
      }
    }
  }
}

// kRows: 4, or 1 for filters of one row
template <class T, int kRows>
DWCONV_KERNEL(kMostThreads, kLargeBlocks)
depthwise_large_nchw(DepthwiseTileArgs args) {
  using A = accumulate_t<T>;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  int block = block_index();
  const int64_t plane0 = static_cast<int64_t>(block % slabs_of(t)) * t.slab, left = p.batch * p.channels - plane0;
  block /= slabs_of(t);
  const int planes = static_cast<int>(left < t.slab ? left : t.slab);
  const ImageNumbers numbers(plane0, p.channels, args.channels);
  const int x0 = static_cast<int>(block % t.tiles_w) * t.tile_w, y0 = static_cast<int>(block / t.tiles_w) * t.tile_h;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w), taps = kernel_h * kernel_w;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w), out_h = static_cast<int>(p.out_h),
            out_w = static_cast<int>(p.out_w);
  const int rows = t.tile_h + kernel_h - 1;  // of a plane in shared memory

  // [plane][row][column], then the filters. The columns are padded to an odd number of words, for the banks.
  T* const tile = reinterpret_cast<T*>(shared_memory());
  T* const filters = tile + t.slab * rows * args.in_pitch;
  stage_padded_planes(tile, planes, rows, args.in_columns, args.in_pitch, y0 - static_cast<int>(p.pad_h),
                      x0 - static_cast<int>(p.pad_w), in_h, in_w, p.in_stride_h,
                      [&](int q) { return static_cast<const T*>(args.input) + numbers.offset(q, p.in_stride_n, p.in_stride_c); });
  for (int i = thread_index(); i < planes * taps; i += block_size()) {
    const int q = i / taps, tap = i - q * taps;
    const int64_t c = numbers.inner(q);
    filters[q * taps + tap] =
        load<1>(static_cast<const T*>(args.weight) + c * taps + (args.flipped ? taps - 1 - tap : tap)).value[0];
  }
  synchronize();

  const int patches_w = t.tile_w / kLargeColumns, patches = patches_w * (t.tile_h / kRows);
  const int q = thread_index() / patches, patch = thread_index() - q * patches;
  const int y = patch / patches_w * kRows, x = patch % patches_w * kLargeColumns;
  const bool active = q < planes && y0 + y < out_h && x0 + x < out_w;
  A acc[kRows][kLargeColumns][1];
  if (active) {
    const int64_t c = numbers.inner(q);
    const A bias = args.bias != nullptr ? load_bias<T>(args.bias, c, args.wide_bias) : A(0);
#pragma unroll
    for (int i = 0; i < kRows * kLargeColumns; ++i) acc[i / kLargeColumns][i % kLargeColumns][0] = bias;
    for (int j = 0; j < kernel_h + kRows - 1; ++j) {
      const T* filter[kRows];
      bool present[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        present[i] = j - i >= 0 && j - i < kernel_h;
        filter[i] = filters + q * taps + (j - i) * kernel_w;
      }
      multiply_filter_row<kRows, 1>(tile + (q * rows + y + j) * args.in_pitch + x, filter, present, kernel_w, 1, acc);
    }
  }
  synchronize();  // the input's tile becomes the output's
  const PlaneTile<T> out = {tile,
                            args.out_pitch,
                            args.out_whole != 0,
                            least(y0 + t.tile_h, out_h) - y0,
                            args.out_whole ? out_w : least(x0 + t.tile_w, out_w) - x0,
                            p.out_stride_h};
  const auto out_first = [&](int k) {
    return static_cast<T*>(args.output) + numbers.offset(k, p.out_stride_n, p.out_stride_c) + y0 * p.out_stride_h + x0;
  };
  if (active) {
    activate_short(p.activation, acc);
    const T* const first = out_first(q);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (y + i >= out.rows) continue;
      T* const row = out.row(q, y + i, first) + x;
#pragma unroll
      for (int k = 0; k < kLargeColumns; ++k) {
        if (x0 + x + k < out_w) row[k] = from_accumulate<T>(acc[i][k][0]);
      }
    }
  }
  synchronize();
  unstage_planes(out, planes, args.out_chunks, out_first);
}

}  // namespace dwconv::cuda
