// The pointwise product of a warp: 32 pixels by 64 output channels, 64 sums a thread, from operands in shared memory.
//
// Both operands, pixels x input channels and output channels x input channels, are kept as rows of 128 bytes (a slab of 64
// float16, 32 float32 or 16 float64 channels) whose 16-byte chunks are permuted by chunk ^ (row % 8): eight rows read at the same
// channel lie in different banks. A matrix fragment of mma.sync m16n8k16 (16-bit) or m16n8k8 (tf32) is two chunks of a row in
// either type, so that one walk of ldmatrix serves them all (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Without tensor cores
// a thread owns 8 x 8 sums and reads chunks as vectors.
#pragma once

#include "device.cuh"

namespace dwconv::cuda {

constexpr int kSlabBytes = 128;
constexpr int kChunks = kSlabBytes / kChunkBytes;
constexpr int kWarpPixels = 32, kWarpOutputs = 64;

DWCONV_DEVICE int swizzled(int row, int chunk) { return row * kSlabBytes + (chunk ^ (row % kChunks)) * kChunkBytes; }

// Tensor cores. Sums: [2 of 16 pixels][8 of 8 outputs][4], fragments as PTX lays them out.
template <class T>
struct TensorTile {
  static constexpr bool kTensor = true;
  static constexpr int kStagedPixels = 16;
  float sum[2][8][4];

  DWCONV_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i / 32][i / 4 % 8][i % 4] = 0;
  }

  static DWCONV_DEVICE void prepare(uint32_t (&fragment)[4]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = bits_of(round_tf32(float_of(fragment[i])));
    }
  }

  // `pixels` and `outputs` point at row 0 of the whole operands; the warp's rows begin at m0 and n0, multiples of 8.
  DWCONV_DEVICE void multiply(const unsigned char* pixels, int m0, const unsigned char* outputs, int n0) {
    const int lane = thread_index() % kWarp, row = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // matrices: rows 0-7 and 8-15 of the first chunk, then of the second
        load_matrices(a[i], pixels + swizzled(m0 + i * 16 + matrix % 2 * 8 + row, k + matrix / 2));
        prepare(a[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // matrices: both chunks of 8 outputs, then of the next 8
        uint32_t b[4];
        load_matrices(b, outputs + swizzled(n0 + (j + matrix / 2) * 8 + row, k + matrix % 2));
        prepare(b);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_matrices<T>(sum[i][j], a[i], first);
          multiply_matrices<T>(sum[i][j + 1], a[i], second);
        }
      }
    }
  }

  // The part-th kStagedPixels of the pixels to staging[pixel * pitch + output].
  DWCONV_DEVICE void write(int part, float* staging, int pitch) const {
    const int lane = thread_index() % kWarp, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i != part) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) staging[(row + e / 2 * 8) * pitch + j * 8 + column + e % 2] = sum[i][j][e];
      }
    }
  }
};

// Multiply-adds. Lane l owns pixels l / 8 * 8 + 0 .. 7 and outputs l % 8 + 8 * (0 .. 7), so that the rows that lanes read
// together are neighbours.
template <class T>
struct ScalarTile {
  static constexpr bool kTensor = false;
  using A = accumulate_t<T>;
  static constexpr int kStagedPixels =
      32 / static_cast<int>(sizeof(A));  // cards without tensor cores have 64 KiB of shared memory
  static constexpr int kValues = kChunkValues<T> < 4 ? kChunkValues<T> : 4;  // of the input channels, a step
  A sum[8][8];

  DWCONV_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i / 8][i % 8] = 0;
  }

  DWCONV_DEVICE void multiply(const unsigned char* pixels, int m0, const unsigned char* outputs, int n0) {
    const int lane = thread_index() % kWarp;
    constexpr int kSteps = kChunkValues<T> / kValues;
#pragma unroll 1
    for (int step = 0; step < kChunks * kSteps; ++step) {
      const int chunk = step / kSteps, part = step % kSteps * kValues * static_cast<int>(sizeof(T));
      A a[8][kValues];
#pragma unroll
      for (int i = 0; i < 8; ++i) read(pixels + swizzled(m0 + lane / 8 * 8 + i, chunk) + part, a[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        A b[kValues];
        read(outputs + swizzled(n0 + j * 8 + lane % 8, chunk) + part, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int v = 0; v < kValues; ++v) sum[i][j] += a[i][v] * b[v];
        }
      }
    }
  }

  DWCONV_DEVICE void write(int part, A* staging, int pitch) const {
    const int lane = thread_index() % kWarp;
    if (lane / 8 != part * kStagedPixels / 8) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / kStagedPixels != part % (8 / kStagedPixels)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) staging[i % kStagedPixels * pitch + j * 8 + lane % 8] = sum[i][j];
    }
  }

 private:
  static DWCONV_DEVICE void read(const unsigned char* from, A (&to)[kValues]) {
    const Vector<T, kValues> vector = *reinterpret_cast<const Vector<T, kValues>*>(from);
#pragma unroll
    for (int v = 0; v < kValues; ++v) to[v] = to_accumulate(vector.value[v]);
  }
};

}  // namespace dwconv::cuda
