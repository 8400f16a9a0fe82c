// One output of a causal convolution in one dimension, and the window that the next one reads:
//
//   out[n, c] = act(bias[c] + sum_{j < K - 1} w[c, j] * state[n, c, j * dilation] + w[c, K - 1] * in[n, c])
//   state[n, c, :] = state[n, c, 1:], in[n, c]
//
// A thread is a channel of an image, whose window no other thread reads or writes. Those of a warp lie side by side where the
// state is channels-last; else a warp's windows are one run, whose lines the first loads bring to L1 for the others. Sums and
// roundings are those of the forward kernels (depthwise_any.cuh), so that a stream one step at a time has the bits of the whole.
// Traffic: filters, state and input once, output and state once.
#pragma once

#include "cuda/kernels/activate.cuh"

namespace dwconv::cuda {

template <class T>
DWCONV_KERNEL(kStepThreads, 1)
depthwise_step(StepArgs args) {
  using A = accumulate_t<T>;
  const int64_t i = static_cast<int64_t>(block_index()) * block_size() + thread_index();
  if (i >= args.batch * args.channels) return;
  const int64_t n = i / args.channels, c = i - n * args.channels, taps = args.taps, length = (taps - 1) * args.dilation;
  const T* const weight = static_cast<const T*>(args.weight) + c * taps;
  const T* const input = static_cast<const T*>(args.input) + n * args.in_stride_n + c * args.in_stride_c;
  T* const state = static_cast<T*>(args.state) + n * args.state_stride_n + c * args.state_stride_c;
  const Vector<T, 1> sample = load<1>(input);
  A sum[1] = {args.bias != nullptr ? load_one(static_cast<const T*>(args.bias) + c) : A(0)};
  if (args.dilation == 1) {  // each sample is read once
    for (int64_t j = 0; j < length; ++j) {
      const Vector<T, 1> value = load_written<1>(state + j * args.state_stride_w);
      sum[0] += load_one(weight + j) * to_accumulate(value.value[0]);
      if (j > 0) store(state + (j - 1) * args.state_stride_w, value);
    }
  } else {
    for (int64_t j = 0; j < taps - 1; ++j) {
      const Vector<T, 1> value = load_written<1>(state + j * args.dilation * args.state_stride_w);
      sum[0] += load_one(weight + j) * to_accumulate(value.value[0]);
    }
    for (int64_t j = 1; j < length; ++j) {
      store(state + (j - 1) * args.state_stride_w, load_written<1>(state + j * args.state_stride_w));
    }
  }
  if (length > 0) store(state + (length - 1) * args.state_stride_w, sample);
  sum[0] += load_one(weight + taps - 1) * to_accumulate(sample.value[0]);
  if (!is_inlined(args.activation.kind)) sum[0] = to_accumulate(from_accumulate<T>(sum[0]));  // there, a pass over the output
  activate_all(args.activation, sum);
  store(static_cast<T*>(args.output) + i, Vector<T, 1>{{from_accumulate<T>(sum[0])}});
}

}  // namespace dwconv::cuda
