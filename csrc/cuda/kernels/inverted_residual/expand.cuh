// The expansion of an inverted residual: a slab (128 bytes) of hidden channels of the pixels that a tile reads, from the input's
// pixels and the weights in shared memory, to shared memory:
//
//   expanded[pixel][channel] = act(bias[channel] + sum_c weight[channel][c] * input[pixel][c]), zero outside the image
//
// Input and weights are lines of `pitch` bytes, an odd number of chunks of 16, so that eight lines read at the same chunk lie in
// different banks without a swizzle; a line has as many chunks as its channels fill, an even number, and zeros past them. The
// result lies in lines of 128 bytes, swizzled (warp_tile.cuh). A warp has 16 pixels by 32 channels at a time, as many sums as
// there are registers for beside the projection's; without tensor cores 32 by the slab. Groups of channels past the last are left
// out.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/inverted_residual/inverted_args.h"
#include "cuda/kernels/warp_tile.cuh"

namespace dwconv::cuda {

template <class T>
constexpr int kSlabChannels = kSlabBytes / static_cast<int>(sizeof(T));

// The index of the thread, not kept from one use to the next: what depends on it is made again wherever it is used, since there
// are no registers for it beside the sums.
DWCONV_DEVICE int this_thread() {
  int thread = thread_index();
  in_order(thread);
  return thread;
}

// Tensor cores: fragments of 16 pixels by 8 channels.
template <class T>
struct TensorExpansion {
  static constexpr int kFragments = 4, kPixels = 16, kChannels = 8 * kFragments;
  float sum[kFragments][4];

  // From the biases of the channels.
  DWCONV_DEVICE void begin(const float* bias) {
    const int column = this_thread() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = bias[j * 8 + column + e % 2];
    }
  }

  DWCONV_DEVICE void multiply(const unsigned char* pixels, const unsigned char* weights, int pitch, int chunks) {
    const int lane = this_thread() % kWarp, row = lane % 8, matrix = lane / 8;
    pixels += (matrix % 2 * 8 + row) * pitch + matrix / 2 * kChunkBytes;
    weights += (matrix / 2 * 8 + row) * pitch + matrix % 2 * kChunkBytes;
#pragma unroll 1
    for (int k = 0; k < chunks * kChunkBytes; k += 2 * kChunkBytes) {
      uint32_t a[4];
      load_matrices(a, pixels + k);
      TensorTile<T>::prepare(a);
#pragma unroll
      for (int j = 0; j < kFragments; j += 2) {
        uint32_t b[4];
        load_matrices(b, weights + j * 8 * pitch + k);
        TensorTile<T>::prepare(b);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_matrices<T>(sum[j], a, first);
        multiply_matrices<T>(sum[j + 1], a, second);
      }
    }
  }

  // Rounded to T; inside: of the warp's pixels.
  DWCONV_DEVICE void write(const unsigned char* inside, int pixel0, int channel0, unsigned char* expanded) const {
    const int lane = this_thread() % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pixel = i * 8 + lane / 4;
      const bool exists = inside[pixel];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        const float pair[2] = {exists ? sum[j][i * 2] : 0.0f, exists ? sum[j][i * 2 + 1] : 0.0f};
        const int byte = (channel0 + j * 8 + lane % 4 * 2) * static_cast<int>(sizeof(T));
        *reinterpret_cast<Packed<T, 2>*>(expanded + swizzled(pixel0 + pixel, byte / kChunkBytes) + byte % kChunkBytes) =
            pack<T, 2>(pair);
      }
    }
  }
};

// Multiply-adds. Lane l owns pixels l / 8 * 8 + 0 .. 7 and channels l % 8 + 8 * (0, 1, ...).
template <class T>
struct ScalarExpansion {
  using A = accumulate_t<T>;
  static constexpr int kPixels = 32, kChannels = kSlabChannels<T>, kColumns = kChannels / 8,
                       kValues = 2;  // input channels a step
  A sum[8][kColumns];

  DWCONV_DEVICE void begin(const A* bias) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i][j] = bias[j * 8 + this_thread() % 8];
    }
  }

  DWCONV_DEVICE void multiply(const unsigned char* pixels, const unsigned char* weights, int pitch, int chunks) {
    constexpr int kStep = kValues * static_cast<int>(sizeof(T));
    const int lane = this_thread() % kWarp;
    pixels += lane / 8 * 8 * pitch;
    weights += lane % 8 * pitch;
#pragma unroll 1
    for (int k = 0; k < chunks * kChunkBytes; k += kStep) {
      A a[8][kValues];
#pragma unroll
      for (int i = 0; i < 8; ++i) read(pixels + i * pitch + k, a[i]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        A b[kValues];
        read(weights + j * 8 * pitch + k, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int v = 0; v < kValues; ++v) sum[i][j] += a[i][v] * b[v];
        }
      }
    }
  }

  DWCONV_DEVICE void write(const unsigned char* inside, int pixel0, int channel0, unsigned char* expanded) const {
    const int lane = this_thread() % kWarp;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pixel = lane / 8 * 8 + i;
      const bool exists = inside[pixel];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const A one[1] = {exists ? sum[i][j] : A(0)};
        const int byte = (channel0 + j * 8 + lane % 8) * static_cast<int>(sizeof(T));
        *reinterpret_cast<Packed<T, 1>*>(expanded + swizzled(pixel0 + pixel, byte / kChunkBytes) + byte % kChunkBytes) =
            pack<T, 1>(one);
      }
    }
  }

 private:
  static DWCONV_DEVICE void read(const unsigned char* from, A (&to)[kValues]) {
    const Vector<T, kValues> vector = *reinterpret_cast<const Vector<T, kValues>*>(from);
#pragma unroll
    for (int v = 0; v < kValues; ++v) to[v] = to_accumulate(vector.value[v]);
  }
};

// channels: of the hidden ones, from the slab's first on.
template <class T, bool kTensor>
DWCONV_DEVICE void expand_slab(const InvertedResidualArgs& args, int channels, const unsigned char* input,
                               const unsigned char* weights, const accumulate_t<T>* bias, const unsigned char* inside,
                               unsigned char* expanded) {
  using Expansion = std::conditional_t<kTensor, TensorExpansion<T>, ScalarExpansion<T>>;
  constexpr int kGroups = kSlabChannels<T> / Expansion::kChannels;
  const int warps = block_size() / kWarp;
#pragma unroll 1
  for (int part = this_thread() / kWarp; part * Expansion::kPixels < args.in_pixels * kGroups; part += warps) {
    const int pixel = part / kGroups * Expansion::kPixels, channel = part % kGroups * Expansion::kChannels;
    if (channel >= channels) continue;
    Expansion sums;
    sums.begin(bias + channel);
    sums.multiply(input + pixel * args.pitch, weights + channel * args.pitch, args.pitch, args.chunks.divisor);
    activate_all(args.expand_activation, sums.sum);
    sums.write(inside + pixel, pixel, channel, expanded);
  }
}

}  // namespace dwconv::cuda
