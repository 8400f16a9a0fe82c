// One output of a causal convolution in one dimension, and the window that the next one reads:
//
//   out[n, c] = act(bias[c] + sum_{j < K - 1} w[c, j] * state[n, c, j * dilation] + w[c, K - 1] * in[n, c])
//   state[n, c, :] = state[n, c, 1:], in[n, c]
//
// The sums are in the order of the forward kernels, so that a stream one step at a time has the bits of the whole.
//
// A tile is kStepChannels channels of an image. Of filters of 2 to 4 taps (Mamba's) whose windows lie one after the other, the
// compiler makes shuffles of the loads and stores; all others go value by value. Traffic: filters, state and input once, output
// and state once.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

template <class T, int = 0>
int64_t depthwise_step_scratch(const CpuProblem&, int64_t) {
  return 0;
}

// In the accumulation type: where they lie, or in the buffer, of whole vectors.
template <class A, class T>
DWCONV_INLINE const A* widened(const T* values, int64_t count, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return values;
  } else {
    constexpr int kVec = kLanes<A>;
    for (int64_t i = 0; i < count; i += kVec) store(buffer + i, load_lanes(values + i, lanes_left(count - i, kVec)));
    return buffer;
  }
}

template <int K, class A>
void add_window(int64_t count, const A* __restrict__ w, const A* __restrict__ state, const A* __restrict__ in,
                A* __restrict__ sum) {
  for (int64_t c = 0; c < count; ++c) {
    A acc = sum[c];
    DWCONV_UNROLL
    for (int j = 0; j < K - 1; ++j) acc += w[c * K + j] * state[c * (K - 1) + j];
    sum[c] = acc + w[c * K + K - 1] * in[c];
  }
}

template <int K, class T>
void move_window(int64_t count, T* __restrict__ state, const T* __restrict__ in) {
  for (int64_t c = 0; c < count; ++c) {
    DWCONV_UNROLL
    for (int j = 0; j < K - 2; ++j) state[c * (K - 1) + j] = state[c * (K - 1) + j + 1];
    state[c * (K - 1) + K - 2] = in[c];
  }
}

template <int K, class A, class T>
DWCONV_NOINLINE void dense_windows(int64_t count, const T* w, T* state, const T* in, const A* wide_in, A* sum) {
  A filters[kStepChannels * K], windows[kStepChannels * (K - 1)];
  add_window<K>(count, widened(w, count * K, filters), widened<A>(state, count * (K - 1), windows), wide_in, sum);
  move_window<K>(count, state, in);
}

template <class A, class T>
DWCONV_NOINLINE void any_windows(const StepArgs& args, int64_t count, const T* w, T* state, const T* in, const A* wide_in,
                                 A* sum) {
  const CpuProblem& p = args.problem;
  const int64_t taps = p.kernel_w, step = args.state_stride_w, length = (taps - 1) * p.dilation_w;
  const int64_t channel = args.state_stride_c;
  // Tap by tap: as a chain of one channel's sums the compiler would make products of their own of it, which round once more.
  for (int64_t j = 0; j < taps - 1; ++j) {
    const T* const sample = state + j * p.dilation_w * step;
    for (int64_t c = 0; c < count; ++c) sum[c] += to_accumulate(w[c * taps + j]) * to_accumulate(sample[c * channel]);
  }
  for (int64_t c = 0; c < count; ++c) sum[c] += to_accumulate(w[c * taps + taps - 1]) * wide_in[c];
  if (length == 0) return;
  if (channel == 1) {
    for (int64_t j = 0; j < length - 1; ++j) {
      for (int64_t c = 0; c < count; ++c) state[j * step + c] = state[(j + 1) * step + c];
    }
  } else {
    for (int64_t c = 0; c < count; ++c) {
      T* const window = state + c * channel;
      for (int64_t j = 0; j < length - 1; ++j) window[j * step] = window[(j + 1) * step];
    }
  }
  for (int64_t c = 0; c < count; ++c) state[c * channel + (length - 1) * step] = in[c * p.in_stride_c];
}

template <class T>
void depthwise_step(const StepArgs& args, void* /*scratch*/, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t pieces = (p.channels + kStepChannels - 1) / kStepChannels;
  const bool dense = p.dilation_w == 1 && p.in_stride_c == 1 && args.state_stride_c == p.kernel_w - 1 &&
                     (args.state_stride_w == 1 || p.kernel_w == 2);
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t n = tile / pieces, first = tile % pieces * kStepChannels;
    const int64_t count = p.channels - first < kStepChannels ? p.channels - first : kStepChannels;
    const T* const w = static_cast<const T*>(args.weight) + first * p.kernel_w;
    const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + first * p.in_stride_c;
    T* const state = static_cast<T*>(args.state) + n * args.state_stride_n + first * args.state_stride_c;
    A wide_in[kStepChannels], sum[kStepChannels] = {};
    for (int64_t c = 0; c < count; ++c) wide_in[c] = to_accumulate(in[c * p.in_stride_c]);
    if (args.bias != nullptr) {
      const T* const bias = static_cast<const T*>(args.bias) + first;
      for (int64_t c = 0; c < count; ++c) sum[c] = to_accumulate(bias[c]);
    }
    switch (dense ? p.kernel_w : 0) {
      case 2:
        dense_windows<2>(count, w, state, in, wide_in, sum);
        break;
      case 3:
        dense_windows<3>(count, w, state, in, wide_in, sum);
        break;
      case 4:
        dense_windows<4>(count, w, state, in, wide_in, sum);
        break;
      default:
        any_windows(args, count, w, state, in, wide_in, sum);
    }
    T* const out = static_cast<T*>(args.output) + n * p.channels + first;
    for (int64_t c = 0; c < count; c += kVec)
      store_lanes(out + c, activate<A>(load(sum + c), p.activation), lanes_left(count - c, kVec));
  }
}

}  // namespace dwconv::DWCONV_ISA
