// The pointwise product of a warp: 32 rows by 64 columns, 64 sums a thread, from operands in shared memory. In channels_last the
// rows are pixels and the columns output channels; in NCHW it is the other way round, so that in both layouts a row of sums lies
// in the output as it lies here.
//
// Operands are slabs of 128 bytes of input channels (64 float16, 32 float32 or 16 float64):
//
//   by row:   a row (of either operand) of 128 bytes of channels, whose 16-byte chunks are permuted by chunk ^ (row % 8): eight
//             rows read at the same channel lie in different banks;
//   by depth: a line of columns a channel, `pitch` elements apart: 8 more than a multiple of 32, for the banks again. NCHW's
//   pixels
//             lie so.
//
// A matrix fragment of mma.sync m16n8k16 (16-bit) or m16n8k8 (tf32) is two chunks of a row in either type, so that one walk of
// ldmatrix serves them all (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Without tensor cores a thread owns 8 x 8 sums.
#pragma once

#include "cuda/kernels/device.cuh"

namespace dwconv::cuda {

constexpr int kSlabBytes = 128;
constexpr int kChunks = kSlabBytes / kChunkBytes;
constexpr int kWarpRows = 32, kWarpColumns = 64;

DWCONV_DEVICE int swizzled(int row, int chunk) { return row * kSlabBytes + (chunk ^ (row % kChunks)) * kChunkBytes; }

// The columns' operand.
template <class T, bool kByDepth>
struct Columns {
  const unsigned char* shared;
  int pitch;  // by depth, elements
};

// Where in the block's product the sums lie that a warp stages: kStagedRows rows by kWarpColumns columns.
struct Place {
  int row, column;
};

// Tensor cores. Sums: [2 of 16 rows][8 of 8 columns][4], fragments as PTX lays them out.
template <class T>
struct TensorTile {
  static constexpr bool kTensor = true, kLines = false;
  static constexpr int kStagedRows = 16;
  static constexpr int kRows = kWarpRows, kColumns = kWarpColumns, kWarps = 1;  // of the product, and the warps that share it
  float sum[2][8][4];

  static DWCONV_DEVICE Place place(int part) { return {part * kStagedRows, 0}; }
  DWCONV_DEVICE void complete() {}

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

  // Both chunks k and k + 1 of the columns n .. n + 7 and n + 8 .. n + 15.
  template <bool kByDepth>
  static DWCONV_DEVICE void read_columns(const Columns<T, kByDepth>& columns, int n, int k, uint32_t (&b)[4]) {
    const int lane = thread_index() % kWarp, row = lane % 8, matrix = lane / 8;
    if constexpr (!kByDepth) {
      load_matrices(b, columns.shared + swizzled(n + matrix / 2 * 8 + row, k + matrix % 2));
    } else if constexpr (sizeof(T) == 2) {
      const int channel = (k + matrix % 2) * kChunkValues<T> + row;
      load_transposed_matrices(b, reinterpret_cast<const T*>(columns.shared) + channel * columns.pitch + n + matrix / 2 * 8);
    } else {
      const T* const from =
          reinterpret_cast<const T*>(columns.shared) + (k * kChunkValues<T> + lane % 4) * columns.pitch + n + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = bits_of(from[i % 2 * kChunkValues<T> * columns.pitch + i / 2 * 8]);
    }
    prepare(b);
  }

  // `rows` and the columns point at row and column 0 of the whole operands; the warp's begin at m0 and n0, multiples of 8.
  template <bool kByDepth>
  DWCONV_DEVICE void multiply(const unsigned char* rows, int m0, const Columns<T, kByDepth>& columns, int n0) {
    int thread = thread_index();
    in_order(thread);  // not kept in registers beside the sums from one product to the next
    const int lane = thread % kWarp, row = lane % 8, matrix = lane / 8;
#pragma unroll 2  // the addresses of all would not fit the registers beside the sums
    for (int k = 0; k < kChunks; k += 2) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // matrices: rows 0-7 and 8-15 of the first chunk, then of the second
        load_matrices(a[i], rows + swizzled(m0 + i * 16 + matrix % 2 * 8 + row, k + matrix / 2));
        prepare(a[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        read_columns(columns, n0 + j * 8, k, b);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_matrices<T>(sum[i][j], a[i], first);
          multiply_matrices<T>(sum[i][j + 1], a[i], second);
        }
      }
    }
  }

  // The part-th kStagedRows of the rows to staging[row * pitch + column].
  DWCONV_DEVICE void write(int part, float* staging, int pitch) const {
    const int lane = thread_index() % kWarp, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i != part) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Vector<float, 2> pair = {sum[i][j][2 * e], sum[i][j][2 * e + 1]};
          *reinterpret_cast<Vector<float, 2>*>(staging + (row + e * 8) * pitch + j * 8 + column) = pair;
        }
      }
    }
  }
};

// Multiply-adds. Lane l owns rows l / 8 * 8 + 0 .. 7 and columns l % 8 + 8 * (0 .. 7), so that what lanes read together are
// neighbours.
template <class T>
struct ScalarTile {
  static constexpr bool kTensor = false, kLines = false;
  static constexpr int kRows = kWarpRows, kColumns = kWarpColumns, kWarps = 1;
  using A = accumulate_t<T>;
  static constexpr int kStagedRows = 32 / static_cast<int>(sizeof(A));  // GPUs without tensor cores have 64 KiB of shared memory
  static constexpr int kValues = 2;                                     // of the input channels, a step
  A sum[8][8];

  static DWCONV_DEVICE Place place(int part) { return {part * kStagedRows, 0}; }
  DWCONV_DEVICE void complete() {}
  DWCONV_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i / 8][i % 8] = 0;
  }

  template <bool kByDepth>
  DWCONV_DEVICE void multiply(const unsigned char* rows, int m0, const Columns<T, kByDepth>& columns, int n0) {
    const int lane = thread_index() % kWarp;
    constexpr int kSteps = kChunkValues<T> / kValues;
#pragma unroll 1
    for (int step = 0; step < kChunks * kSteps; ++step) {
      const int chunk = step / kSteps, part = step % kSteps * kValues * static_cast<int>(sizeof(T));
      A a[8][kValues];
#pragma unroll
      for (int i = 0; i < 8; ++i) read(rows + swizzled(m0 + lane / 8 * 8 + i, chunk) + part, a[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        A b[kValues];
        const int n = n0 + j * 8 + lane % 8;
        if constexpr (!kByDepth) {
          read(columns.shared + swizzled(n, chunk) + part, b);
        } else {
#pragma unroll
          for (int v = 0; v < kValues; ++v) {
            b[v] = to_accumulate(reinterpret_cast<const T*>(columns.shared)[(step * kValues + v) * columns.pitch + n]);
          }
        }
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
    if (lane / 8 != part * kStagedRows / 8) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / kStagedRows != part % (8 / kStagedRows)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) staging[i % kStagedRows * pitch + j * 8 + lane % 8] = sum[i][j];
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
