// From NCHW to channels_last, with an activation: between the depthwise and the pointwise kernel of a block in NCHW that is not
// fused. The matrix units want the input channels of a pixel side by side.
//
// A block moves a tile of 64 channels by 64 pixels of an image through shared memory: a warp reads along a plane and writes along
// the channels, 16 bytes a thread. Traffic: input once, output once.
#pragma once

#include "cuda/kernels/activate.cuh"

namespace dwconv::cuda {

// kBehind: the launch may begin before the one of the values has ended.
template <class T, bool kBehind = false>
DWCONV_KERNEL(kMostThreads, 4)
channels_last_values(TransposeArgs args) {
  if constexpr (kBehind) wait_for_previous();
  using A = accumulate_t<T>;
  constexpr int kPitch = kTransposed + (sizeof(T) < 4 ? 2 : 1);             // an odd number of words, against bank conflicts
  constexpr int kRun = sizeof(T) <= 4 ? 4 : 2, kRuns = kTransposed / kRun;  // pixels a load
  constexpr int kRows = 256 / kRuns, kEach = kTransposed / kRows;
  T* const tile = reinterpret_cast<T*>(shared_memory());
  int64_t block = block_index();
  const int64_t image_tiles = args.channel_tiles * args.pixel_tiles, n = divided(block, image_tiles);
  block -= n * image_tiles;
  const int64_t c_tile = divided(block, args.pixel_tiles), c0 = c_tile * kTransposed;
  const int64_t p0 = (block - c_tile * args.pixel_tiles) * kTransposed;
  const int channels = args.channels - c0 < kTransposed ? static_cast<int>(args.channels - c0) : kTransposed;
  const int pixels = args.pixels - p0 < kTransposed ? static_cast<int>(args.pixels - p0) : kTransposed;

  const int pixel = thread_index() % kRuns * kRun, row = thread_index() / kRuns;
  const int64_t step = kRows * args.pixels;
  const T* from = static_cast<const T*>(args.input) + (n * args.channels + c0 + row) * args.pixels + p0 + pixel;
  Vector<T, kRun> value[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (row + i * kRows >= channels) continue;
    if (args.aligned_in) {  // then the pixels end where a run does
      if (pixel < pixels) value[i] = load_written<kRun>(from + i * step);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        if (pixel + k < pixels) value[i].value[k] = load_written<1>(from + i * step + k).value[0];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (row + i * kRows >= channels) continue;
    if (args.activation.kind != ActivationKind::kIdentity) {
      A run[kRun];
#pragma unroll
      for (int k = 0; k < kRun; ++k) run[k] = to_accumulate(value[i].value[k]);
      activate_all(args.activation, run);
#pragma unroll
      for (int k = 0; k < kRun; ++k) value[i].value[k] = from_accumulate<T>(run[k]);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) tile[(pixel + k) * kPitch + row + i * kRows] = value[i].value[k];
  }
  synchronize();

  constexpr int V = kChunkValues<T>, kVectors = kTransposed / V;
  const int c = thread_index() % kVectors * V, left = channels - c;
  T* const to = static_cast<T*>(args.output) + (n * args.pixels + p0) * args.channels + c0 + c;
#pragma unroll 1
  for (int q = thread_index() / kVectors; q < pixels; q += 256 / kVectors) {
    Vector<T, V> run;
#pragma unroll
    for (int v = 0; v < V; ++v) run.value[v] = tile[q * kPitch + c + v];
    T* const out = to + q * args.channels;
    if (args.aligned_out && left >= V) {
      store(out, run);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < left) store(out + v, Vector<T, 1>{{run.value[v]}});
      }
    }
  }
}

}  // namespace dwconv::cuda
