// LayerNorm over the channels of each pixel (Ba et al., arXiv:1607.06450, as in ConvNeXt), channels_last:
//
//   y[c] = (x[c] - mean) / sqrt(variance + eps) * weight[c] + bias[c]
//
// The mean first and then the squares about it, so that nothing cancels: a pixel is read three times, from L1. Traffic: input and
// output once.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

template <class T, int = 0>
int64_t layer_norm_nhwc_scratch(const CpuProblem&, int64_t) {
  return 0;
}

// The sum of term(first channel, lanes) over vectors of channels, in order.
template <class A, class Term>
DWCONV_INLINE A sum_over_channels(int64_t channels, Term term) {
  constexpr int kVec = kLanes<A>, kSums = 4;
  Vec<A> sum[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kVec <= channels; c += kSums * kVec) {
    DWCONV_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] += term(c + j * kVec, kVec);
  }
  for (; c < channels; c += kVec) sum[0] += term(c, lanes_left(channels - c, kVec));
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T, class A>
void normalize_pixel(const LayerNormArgs& args, const T* x, T* y) {
  constexpr int kVec = kLanes<A>;
  const int64_t channels = args.problem.channels;
  const A count = static_cast<A>(channels);
  const A mean = sum_over_channels<A>(channels, [&](int64_t c, int lanes) { return load_lanes(x + c, lanes); }) / count;
  A means[kVec];  // of which a vector in part takes as many lanes as there are channels
  store(means, broadcast(mean));
  const auto deviation = [&](int64_t c, int lanes) { return load_lanes(x + c, lanes) - load_lanes(means, lanes); };
  const A squares = sum_over_channels<A>(channels, [&](int64_t c, int lanes) {
    const Vec<A> d = deviation(c, lanes);
    return d * d;
  });
  const A scale = A(1) / static_cast<A>(__builtin_sqrt(squares / count + static_cast<A>(args.eps)));
  const A *const weight = static_cast<const A*>(args.weight), *const bias = static_cast<const A*>(args.bias);
  for (int64_t c = 0; c < channels; c += kVec) {
    const int lanes = lanes_left(channels - c, kVec);
    Vec<A> v = deviation(c, lanes) * scale;
    if (weight != nullptr) v *= load_lanes(weight + c, lanes);
    if (bias != nullptr) v += load_lanes(bias + c, lanes);
    store_lanes(y + c, v, lanes);
  }
}

// A tile is rows_per_tile of the batch's rows.
template <class T>
void layer_norm_nhwc(const LayerNormArgs& args, void* /*scratch*/, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t rows = p.batch * p.in_h;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t first = tile * args.rows_per_tile;
    const int64_t last = first + args.rows_per_tile < rows ? first + args.rows_per_tile : rows;
    T* y = static_cast<T*>(args.output) + first * p.in_w * p.channels;
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(args.input) + row / p.in_h * p.in_stride_n + row % p.in_h * p.in_stride_h;
      for (int64_t i = 0; i < p.in_w; ++i, x += p.in_stride_w, y += p.channels) normalize_pixel<T, A>(args, x, y);
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
