// Which taps join which input and output samples of a small patch, all known when the kernel is compiled.
//
//   Forward<K, S>      out[i] = sum over r of w[r] * in[i * S + r - pad]
//   Transposed<K, S>   out[i] = sum over the j and r with j * S + r - pad = i of w[r] * in[j]     (the input gradient)
//
// A patch of outputs begins at a multiple of S from the tile's origin, and the tile's origin lies where the phases of the stride
// begin, so that tap(i, j), the tap between the patch's output i and the j-th sample that the patch reads, is a constant.
#pragma once

#include "cuda/kernels/device.cuh"

namespace dwconv::cuda {

template <int K, int S>
struct Forward {
  static constexpr int kKernel = K, kStride = S;
  static constexpr bool kTransposed = false;
  static constexpr int span(int outputs) { return (outputs - 1) * S + K; }
  static constexpr int tap(int i, int j) { return j - i * S >= 0 && j - i * S < K ? j - i * S : -1; }
  // The first sample read for output `first`, and how far the reads move for `outputs` outputs.
  static DWCONV_DEVICE int origin(int first, int pad) { return first * S - pad; }
  static DWCONV_DEVICE int advance(int outputs) { return outputs * S; }
  // Where the first tile begins: at the first output.
  static DWCONV_DEVICE int begin(int pad) { return 0; }
};

template <int K, int S>
struct Transposed {
  static constexpr int kKernel = K, kStride = S;
  static constexpr bool kTransposed = true;
  static constexpr int kBefore = (K - 1) / S;  // samples before the one at the patch's origin
  static constexpr int span(int outputs) { return (outputs - 1) / S + kBefore + 1; }
  static constexpr int tap(int i, int j) {
    return i + S * kBefore - S * j >= 0 && i + S * kBefore - S * j < K ? i + S * kBefore - S * j : -1;
  }
  static DWCONV_DEVICE int origin(int first, int pad) { return (first + pad) / S - kBefore; }
  static DWCONV_DEVICE int advance(int outputs) { return outputs / S; }
  static DWCONV_DEVICE int begin(int pad) { return -(pad % S); }
};

// acc[i][x][v] += w[r][s][v] * in[j][q][v] over a patch, with one row j of the input in `row`: 0 <= j < Taps::span(kRows).
template <class Taps, int kRows, int kColumns, int kVector, class A>
DWCONV_DEVICE void multiply_row(int j, const A (&row)[Taps::span(kColumns)][kVector],
                                const A (&filter)[Taps::kKernel][Taps::kKernel][kVector], A (&acc)[kRows][kColumns][kVector]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = Taps::tap(i, j);
    if (r < 0) continue;
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
#pragma unroll
      for (int q = 0; q < Taps::span(kColumns); ++q) {
        const int s = Taps::tap(x, q);
        if (s < 0) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) acc[i][x][v] += filter[r][s][v] * row[q][v];
      }
    }
  }
}

}  // namespace dwconv::cuda
