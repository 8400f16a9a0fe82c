// BatchNorm and activation in channels_last (batch_norm.h): a tile is one of `parts` ranges of pixels. A first call leaves each
// one's sums; a second one, with all channels' constants, writes it.
#pragma once

#include "cpu/kernels/batch_norm/batch_norm.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

// Pixels of a forward piece: enough to make little of joining it, few enough to find it in L2 for its squares. Of a backward
// piece: few additions.
template <class T>
DWCONV_INLINE int64_t piece_pixels(int64_t channels) {
  constexpr int64_t kPieceBytes = 64 << 10, kLeast = 16, kMost = 512;
  const int64_t pixels = kPieceBytes / (channels * static_cast<int64_t>(sizeof(T)));
  return pixels < kLeast ? kLeast : pixels > kMost ? kMost : pixels;
}

inline constexpr int64_t kBackwardPixels = 64;

// Prefetches the lines that are written a little later: in training they come from memory, and a store would wait for each.
template <class T>
DWCONV_INLINE void expect_later(const T* run, int64_t channels) {
  constexpr int64_t kAhead = 2048;  // bytes
  const char* const begin = reinterpret_cast<const char*>(run) + kAhead;
  prefetch_for_write(begin, begin + channels * static_cast<int64_t>(sizeof(T)));
}

// Three sums a channel and vector's worth more, in the accumulation type.
template <class T>
int64_t batch_norm_nhwc_sums_bytes(const CpuProblem& p) {
  using A = typename AccumulateType<T>::type;
  const int64_t a_sum = p.channels + kLanes<A>;
  return 3 * a_sum * static_cast<int64_t>(sizeof(A));
}

template <class T>
void part_moments(const BatchNormArgs& args, int64_t part, void* scratch) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels, most = piece_pixels<T>(channels);
  const PartOfPixels range = pixels_of_part(args, part);
  A* const mean = static_cast<A*>(scratch);
  A* const squares = mean + channels + kLanes<A>;
  A* const missed = squares + channels + kLanes<A>;
  double* const means = args.partial + part * 2 * channels;
  double* const all_squares = means + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) means[c] = 0;
  int64_t joined = 0;
  for (int64_t first = range.begin; first < range.end; first += most) {
    const int64_t count = range.end - first < most ? range.end - first : most;
    const T* const x = static_cast<const T*>(args.input) + first * channels;
    for (int64_t c = 0; c < channels + kLanes<A>; ++c) mean[c] = squares[c] = missed[c] = A(0);
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      for_each_vector<A, 4>(channels, [&]<bool kWhole>(int64_t c, int lanes, int) {
        store(mean + c, load(mean + c) + load_some<kWhole>(x + pixel * channels + c, lanes));
      });
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<A>(count);
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      for_each_vector<A, 4>(channels, [&]<bool kWhole>(int64_t c, int lanes, int) {
        const Vec<A> centred = load_some<kWhole>(x + pixel * channels + c, lanes) - load(mean + c);
        store(squares + c, load(squares + c) + centred * centred);
        store(missed + c, load(missed + c) + centred);
      });
    }
    const JoinWeights weights = join_weights(joined, count);
    for (int64_t c = 0; c < channels; ++c) {
      const Piece piece = corrected(count, mean[c], squares[c], missed[c]);
      join(weights, piece.mean, piece.squares, &means[c], &all_squares[c]);
    }
    joined += count;
  }
}

template <class A>
DWCONV_INLINE auto channel_normalisation(const BatchNormArgs& args) {
  const A* const k = static_cast<const A*>(args.constants);
  const int64_t pitch = args.constants_pitch;
  return normalisation<A, EachValue>({k}, {k + pitch}, {k + 2 * pitch}, args.problem.activation);
}

template <bool kClamp, class T>
void part_forward(const BatchNormArgs& args, int64_t part, void*) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
    T* const y = static_cast<T*>(args.output) + pixel * channels;
    expect_later(y, channels);
    forward_run<kClamp>(static_cast<const T*>(args.input) + pixel * channels, y, channels, norm);
  }
}

template <bool kClamp, class T>
void part_grad_sums(const BatchNormArgs& args, int64_t part, void* scratch) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels, most = kBackwardPixels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  A* const grads = static_cast<A*>(scratch);
  A* const products = grads + channels + kLanes<A>;
  double* const sums = args.partial + part * 2 * channels;
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  for (int64_t first = range.begin; first < range.end; first += most) {
    const int64_t end = range.end - first < most ? range.end : first + most;
    for (int64_t c = 0; c < channels + kLanes<A>; ++c) grads[c] = products[c] = A(0);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t run = pixel * channels;
      grad_sums_run<kClamp>(static_cast<const T*>(args.input) + run, static_cast<const T*>(args.grad_output) + run,
                            static_cast<T*>(args.output) + run, channels, norm,
                            [&]<bool>(int64_t c, int, Vec<A> g, Vec<A> product) {
                              store(grads + c, load(grads + c) + g);
                              store(products + c, load(products + c) + product);
                            });
    }
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += grads[c];
      sums[channels + c] += products[c];
    }
  }
}

template <bool kClamp, class T>
void part_backward(const BatchNormArgs& args, int64_t part, void*) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  const A* const k = static_cast<const A*>(args.constants);
  const EachValue<A> slope = {k + 3 * args.constants_pitch}, offset = {k + 4 * args.constants_pitch};
  for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
    const int64_t at = pixel * channels;
    expect_later(static_cast<const T*>(args.output) + at, channels);
    backward_run<kClamp>(static_cast<const T*>(args.input) + at, static_cast<const T*>(args.grad_output) + at,
                         static_cast<T*>(args.output) + at, channels, norm, slope, offset);
  }
}

template <class T>
void batch_norm_forward_nhwc(const BatchNormArgs& args, void* scratch, Tiles tiles) {
  const bool clamp = is_clamp(args.problem.activation);
  const auto run = args.wants_sums ? &part_moments<T> : clamp ? &part_forward<true, T> : &part_forward<false, T>;
  for (int64_t part; next_tile(tiles, &part);) run(args, part, scratch);
}

template <class T>
void batch_norm_backward_nhwc(const BatchNormArgs& args, void* scratch, Tiles tiles) {
  const bool clamp = is_clamp(args.problem.activation);
  const auto sums = clamp ? &part_grad_sums<true, T> : &part_grad_sums<false, T>;
  const auto write = clamp ? &part_backward<true, T> : &part_backward<false, T>;
  const auto run = args.wants_sums ? sums : write;
  for (int64_t part; next_tile(tiles, &part);) run(args, part, scratch);
}

template <class T, int = 0>
int64_t batch_norm_forward_nhwc_scratch(const CpuProblem& p, int64_t) {
  return batch_norm_nhwc_sums_bytes<T>(p);
}
template <class T, int = 0>
int64_t batch_norm_backward_nhwc_scratch(const CpuProblem& p, int64_t) {
  return batch_norm_nhwc_sums_bytes<T>(p);
}

}  // namespace dwconv::DWCONV_ISA
