// The expansion of an inverted residual: a slab (128 bytes) of hidden channels of the pixels that a tile reads, from the input's
// pixels and the weights in shared memory, to shared memory:
//
//   expanded[pixel][channel] = act(bias[channel] + sum_c weight[channel][c] * input[pixel][c]), zero outside the image
//
// Input and weights are lines of `pitch` bytes, an odd number of chunks of 16, so that eight lines read at the same chunk lie in
// different banks without a swizzle; a line has as many chunks as its channels fill, an even number, and zeros past them. The
// result lies in lines of 128 bytes, swizzled (warp_tile.cuh). A warp has 32 pixels by the slab at a time.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/inverted_residual/inverted_args.h"
#include "cuda/kernels/warp_tile.cuh"

namespace dwconv::cuda {

template <class T>
constexpr int kSlabChannels = kSlabBytes / static_cast<int>(sizeof(T));

// Tensor cores: sums as in TensorTile, of 8 columns a fragment.
template <class T>
struct TensorExpansion {
  static constexpr int kFragments = kSlabChannels<T> / 8;
  float sum[2 * kFragments][4];

  // From the biases of the slab.
  DWCONV_DEVICE void begin(const float* bias) {
    const int column = thread_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = sum[kFragments + j][e] = bias[j * 8 + column + e % 2];
    }
  }

  DWCONV_DEVICE void multiply(const unsigned char* pixels, const unsigned char* weights, int pitch, int chunks) {
    const int lane = thread_index() % kWarp, row = lane % 8, matrix = lane / 8;
    pixels += (matrix % 2 * 8 + row) * pitch + matrix / 2 * kChunkBytes;
    weights += (matrix / 2 * 8 + row) * pitch + matrix % 2 * kChunkBytes;
#pragma unroll 1
    for (int k = 0; k < chunks * kChunkBytes; k += 2 * kChunkBytes) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(a[i], pixels + i * 16 * pitch + k);
        TensorTile<T>::prepare(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kFragments; j += 2) {
        uint32_t b[4];
        load_matrices(b, weights + j * 8 * pitch + k);
        TensorTile<T>::prepare(b);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_matrices<T>(sum[i * kFragments + j], a[i], first);
          multiply_matrices<T>(sum[i * kFragments + j + 1], a[i], second);
        }
      }
    }
  }

  // Rounded to T; inside: of the warp's pixels.
  DWCONV_DEVICE void write(const unsigned char* inside, int pixel0, unsigned char* expanded) const {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pixel = i * 8 + lane / 4;
      const bool exists = inside[pixel];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        const float (&all)[4] = sum[i / 2 * kFragments + j];
        const float pair[2] = {exists ? all[i % 2 * 2] : 0.0f, exists ? all[i % 2 * 2 + 1] : 0.0f};
        const int byte = (j * 8 + lane % 4 * 2) * static_cast<int>(sizeof(T));
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
  static constexpr int kColumns = kSlabChannels<T> / 8, kValues = 2;  // input channels a step
  A sum[8][kColumns];

  DWCONV_DEVICE void begin(const A* bias) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i][j] = bias[j * 8 + thread_index() % 8];
    }
  }

  DWCONV_DEVICE void multiply(const unsigned char* pixels, const unsigned char* weights, int pitch, int chunks) {
    constexpr int kStep = kValues * static_cast<int>(sizeof(T));
    const int lane = thread_index() % kWarp;
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

  DWCONV_DEVICE void write(const unsigned char* inside, int pixel0, unsigned char* expanded) const {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pixel = lane / 8 * 8 + i;
      const bool exists = inside[pixel];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const A one[1] = {exists ? sum[i][j] : A(0)};
        const int byte = (j * 8 + lane % 8) * static_cast<int>(sizeof(T));
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

template <class T, bool kTensor>
DWCONV_DEVICE void expand_slab(const InvertedResidualArgs& args, const unsigned char* input, const unsigned char* weights,
                               const accumulate_t<T>* bias, const unsigned char* inside, unsigned char* expanded) {
  const int warps = block_size() / kWarp;
#pragma unroll 1
  for (int pixel = thread_index() / kWarp * kWarpRows; pixel < args.in_pixels; pixel += warps * kWarpRows) {
    std::conditional_t<kTensor, TensorExpansion<T>, ScalarExpansion<T>> sums;
    sums.begin(bias);
    sums.multiply(input + pixel * args.pitch, weights, args.pitch, args.chunks.divisor);
    activate_all(args.expand_activation, sums.sum);
    sums.write(inside + pixel, pixel, expanded);
  }
}

}  // namespace dwconv::cuda
