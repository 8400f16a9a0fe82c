// The pointwise product of a warpgroup (4 warps) by wgmma: 64 rows by 128 columns, 64 sums a thread, as many as in warp_tile.cuh.
// The matrix units read both operands from shared memory themselves, as warp_tile.cuh lays them out; but columns by depth, NCHW's
// pixels, lie in lines of 64 pixels (128 bytes) a channel, swizzled as rows are, one group of 64 pixels behind the other.
#pragma once

#include "cuda/kernels/warp_tile.cuh"

namespace dwconv::cuda {

// Byte of a pixel of a channel in such a slot of 64 channels of 16-bit values.
DWCONV_DEVICE int line_byte(int channel, int pixel) {
  return pixel / 64 * (64 * kSlabBytes) + swizzled(channel, pixel % 64 / 8) + pixel % 8 * 2;
}

template <class T>
struct GroupTile {
  static constexpr bool kTensor = true, kLines = true;
  static constexpr int kStagedRows = 16;
  static constexpr int kRows = 64, kColumns = 128, kWarps = 4;
  float sum[64];

  static DWCONV_DEVICE Place place(int part) { return {thread_index() / kWarp % kWarps * kStagedRows, part * kWarpColumns}; }

  DWCONV_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = 0;
  }

  // Begins the product; its operands are in use until complete().
  template <bool kByDepth>
  DWCONV_DEVICE void multiply(const unsigned char* rows, int m0, const Columns<T, kByDepth>& columns, int n0) {
    constexpr int kDepth = 16, kGroup = 64 * kSlabBytes;
    begin_products();
#pragma unroll
    for (int k = 0; k < kSlabBytes / 2; k += kDepth) {
      const unsigned char* const from =
          kByDepth ? columns.shared + n0 / 64 * kGroup + k * kSlabBytes : columns.shared + n0 * kSlabBytes + k * 2;
      multiply_group<T, kByDepth>(sum, rows + m0 * kSlabBytes + k * 2, from, kGroup);
    }
    commit_products();
  }

  DWCONV_DEVICE void complete() {
    complete_products();
#pragma unroll
    for (int i = 0; i < 64; ++i) in_order(sum[i]);
  }

  // The part-th half of the warp's columns to staging[row * pitch + column].
  DWCONV_DEVICE void write(int part, float* staging, int pitch) const {
    const int lane = thread_index() % kWarp, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j / 8 != part) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Vector<float, 2> pair = {sum[4 * j + 2 * e], sum[4 * j + 2 * e + 1]};
        *reinterpret_cast<Vector<float, 2>*>(staging + (row + e * 8) * pitch + j % 8 * 8 + column) = pair;
      }
    }
  }
};

}  // namespace dwconv::cuda
