// Squeeze-and-excitation (Hu et al., arXiv:1709.01507), both layouts: of each image the mean of every channel, then two layers.
//
//   gate[n, c] = open(expand_bias[c] + sum_s expand[s, c] * act(reduce_bias[s] + sum_k reduce[s, k] * mean[n, k]))
//
// Three stages, of tiles within an image: the means of kMeanVectors vectors of channels (channels_last) or of one channel (NCHW),
// a vector of the hidden layer, the gates of kMeanVectors vectors. Each sum is taken in one order, whatever the tile: of an image
// by rows and then over the rows, or of a dense plane as one row; over k lane by lane, over s one after the other.
// Traffic: the input once, which the layer before has just written; the layers' weights once an image.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/args.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

// The means of kVectors vectors of channels, the last of which has `lanes`.
template <class T, class A, int kVectors>
DWCONV_INLINE void mean_of_channels(const CpuProblem& p, const T* image, int lanes, A* mean) {
  constexpr int kVec = kLanes<A>;
  const auto load_vector = [&](const T* at, int j) { return load_lanes(at + j * kVec, j + 1 < kVectors ? kVec : lanes); };
  Vec<A> sum[kVectors] = {};
  for (int64_t y = 0; y < p.in_h; ++y) {
    Vec<A> row[kVectors] = {};
    const T* at = image + y * p.in_stride_h;
    for (int64_t x = 0; x < p.in_w; ++x, at += p.in_stride_w) {
      DWCONV_UNROLL
      for (int j = 0; j < kVectors; ++j) row[j] += lanes == kVec ? load(at + j * kVec) : load_vector(at, j);
    }
    DWCONV_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[j] += row[j];
  }
  const A pixels = static_cast<A>(p.in_h * p.in_w);
  DWCONV_UNROLL
  for (int j = 0; j < kVectors; ++j) store_lanes(mean + j * kVec, sum[j] / pixels, j + 1 < kVectors ? kVec : lanes);
}

template <class T, class A>
DWCONV_INLINE Vec<A> sum_of_row(const T* at, int64_t width) {
  constexpr int kVec = kLanes<A>, kSums = 4;
  Vec<A> sum[kSums] = {};
  int64_t x = 0;
  for (; x + kSums * kVec <= width; x += kSums * kVec) {
    DWCONV_UNROLL
    for (int j = 0; j < kSums; ++j) sum[j] += load(at + x + j * kVec);
  }
  for (; x < width; x += kVec) sum[0] += load_lanes(at + x, lanes_left(width - x, kVec));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// sums[i] = sum_k a[k] * rows[i][k], where rows are `count` elements apart
template <int kRows, class T, class A>
DWCONV_INLINE void dot_rows(const A* a, const T* rows, int64_t count, A* sums) {
  constexpr int kVec = kLanes<A>;
  Vec<A> sum[2][kRows] = {};
  int64_t k = 0;
  for (; k + 2 * kVec <= count; k += 2 * kVec) {
    DWCONV_UNROLL
    for (int j = 0; j < 2; ++j) {
      const Vec<A> factor = load(a + k + j * kVec);
      DWCONV_UNROLL
      for (int i = 0; i < kRows; ++i) sum[j][i] += factor * load(rows + i * count + k + j * kVec);
    }
  }
  for (; k < count; k += kVec) {
    const int lanes = lanes_left(count - k, kVec);
    const Vec<A> factor = load_lanes(a + k, lanes);
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) sum[0][i] += factor * load_lanes(rows + i * count + k, lanes);
  }
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) sums[i] = sum_lanes(sum[0][i] + sum[1][i]);
}

template <class A>
DWCONV_INLINE Vec<A> open_gate(Vec<A> x, GateKind gate) {
  if (gate == GateKind::kSigmoid) return sigmoid<A>(x).open;
  return at_most(at_least(x + A(3), A(0)), A(6)) / A(6);
}

// Values [first, first + kVec) of an image's hidden layer, as far as there are so many.
template <class T, class A>
void hidden_values(const SqueezeArgs& args, const A* mean, int64_t first, A* hidden) {
  constexpr int kVec = kLanes<A>, kRows = 4;  // at once: enough sums to hide an FMA's latency
  const int64_t channels = args.problem.channels, end = first + lanes_left(args.squeezed - first, kVec);
  const T* row = static_cast<const T*>(args.reduce_weight) + first * channels;
  int64_t s = first;
  for (; s + kRows <= end; s += kRows, row += kRows * channels) dot_rows<kRows>(mean, row, channels, hidden + s);
  for (; s < end; ++s, row += channels) dot_rows<1>(mean, row, channels, hidden + s);
  Vec<A> sums = load(hidden + first);
  if (args.reduce_bias != nullptr) {
    sums += load_lanes(static_cast<const T*>(args.reduce_bias) + first, static_cast<int>(end - first));
  }
  store(hidden + first, activate<A>(sums, args.problem.activation));
}

// The gates of kVectors vectors of an image's channels from `first` on, the last of which has `lanes`.
template <class T, class A, int kVectors>
DWCONV_INLINE void gates_of_channels(const SqueezeArgs& args, const A* hidden, int64_t first, int lanes, T* output) {
  constexpr int kVec = kLanes<A>;
  const auto load_vector = [&](const T* at, int j) { return load_lanes(at + j * kVec, j + 1 < kVectors ? kVec : lanes); };
  Vec<A> sum[kVectors] = {};
  if (args.expand_bias != nullptr) {
    DWCONV_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[j] = load_vector(static_cast<const T*>(args.expand_bias) + first, j);
  }
  const T* weight = static_cast<const T*>(args.expand_weight) + first;
  for (int64_t s = 0; s < args.squeezed; ++s, weight += args.problem.channels) {
    const Vec<A> factor = broadcast(hidden[s]);
    DWCONV_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[j] += factor * (lanes == kVec ? load(weight + j * kVec) : load_vector(weight, j));
  }
  DWCONV_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    store_lanes(output + first + j * kVec, open_gate<A>(sum[j], args.gate), j + 1 < kVectors ? kVec : lanes);
  }
}

// body<kVectors>(first channel, lanes of its last vector) for tile `block` of kMeanVectors vectors of channels.
template <class A, class Body>
DWCONV_INLINE void for_channel_vectors(int64_t channels, int64_t block, Body body) {
  constexpr int kVec = kLanes<A>, kBlock = kMeanVectors * kVec;
  const int64_t first = block * kBlock, left = channels - first;
  if (left >= kBlock) return body.template operator()<kMeanVectors>(first, kVec);
  for (int64_t c = 0; c < left; c += kVec) body.template operator()<1>(first + c, lanes_left(left - c, kVec));
}

// A tile of the stages after the means, which no layout knows.
template <class T, class A>
void excite(const SqueezeArgs& args, int64_t tile) {
  constexpr int64_t kVec = kLanes<A>;
  const int64_t channels = args.problem.channels;
  const int64_t tiles =
      args.stage == SqueezeStage::kHidden ? ceil_div(args.squeezed, kVec) : ceil_div(channels, kMeanVectors * kVec);
  const int64_t n = tile / tiles, part = tile % tiles;
  A* const hidden = static_cast<A*>(args.hidden) + n * args.hidden_pitch;
  if (args.stage == SqueezeStage::kHidden) {
    return hidden_values<T, A>(args, static_cast<const A*>(args.mean) + n * channels, part * kVec, hidden);
  }
  for_channel_vectors<A>(channels, part, [&]<int kVectors>(int64_t c, int lanes) {
    gates_of_channels<T, A, kVectors>(args, hidden, c, lanes, static_cast<T*>(args.output) + n * channels);
  });
}

template <class T, int = 0>
int64_t squeeze_excitation_nhwc_scratch(const CpuProblem&, int64_t) {
  return 0;
}
template <class T, int = 0>
int64_t squeeze_excitation_nchw_scratch(const CpuProblem&, int64_t) {
  return 0;
}

template <class T>
void squeeze_excitation_nhwc(const SqueezeArgs& args, void* /*scratch*/, Tiles& tiles) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t blocks = ceil_div(p.channels, kMeanVectors * kLanes<A>);
  for (int64_t tile; next_tile(tiles, &tile);) {
    if (args.stage != SqueezeStage::kMean) {
      excite<T, A>(args, tile);
      continue;
    }
    const int64_t n = tile / blocks;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n;
    A* const mean = static_cast<A*>(args.mean) + n * p.channels;
    for_channel_vectors<A>(p.channels, tile % blocks, [&]<int kVectors>(int64_t c, int lanes) {
      mean_of_channels<T, A, kVectors>(p, image + c, lanes, mean + c);
    });
  }
}

template <class T>
void squeeze_excitation_nchw(const SqueezeArgs& args, void* /*scratch*/, Tiles& tiles) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const bool dense = p.in_stride_h == p.in_w;
  const int64_t rows = dense ? 1 : p.in_h, width = dense ? p.in_h * p.in_w : p.in_w;
  for (int64_t tile; next_tile(tiles, &tile);) {
    if (args.stage != SqueezeStage::kMean) {
      excite<T, A>(args, tile);
      continue;
    }
    const int64_t n = tile / p.channels, c = tile % p.channels;
    const T* const plane = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c;
    Vec<A> sum = {};
    for (int64_t y = 0; y < rows; ++y) sum += sum_of_row<T, A>(plane + y * p.in_stride_h, width);
    static_cast<A*>(args.mean)[tile] = sum_lanes(sum) / static_cast<A>(p.in_h * p.in_w);
  }
}

}  // namespace dwconv::DWCONV_ISA
