// The second sweep of both passes (batch_norm.cuh): y from x, and dx from x and dy, once the sums of all channels are there.
//
// channels_last: a thread keeps the constants of its channels and walks down pixels; NCHW: of its plane, and walks along it.
#pragma once

#include "cuda/kernels/batch_norm/batch_norm_sums.cuh"

namespace dwconv::cuda {

template <class T, int V, bool kSame>
struct ForwardValues {
  using A = accumulate_t<T>;
  static constexpr int kRuns = 4;
  ChannelConstants<A, V, kSame> constants;

  DWCONV_DEVICE ForwardValues(const BatchNormArgs& args, int64_t channel) : constants(args, channel) {}
  DWCONV_DEVICE void write(const BatchNormArgs& args, const Runs& runs) const {
    for (int i = 0; i < runs.count; i += kRuns) {
      const int64_t at = runs.first + i * runs.step;
      Packed<T, V> in[kRuns];
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const bool wanted = i + r < runs.count;
        in[r] = load_packed<V>(static_cast<const T*>(args.input) + at + (wanted ? r * runs.step : 0), wanted);
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (i + r >= runs.count) break;
        A x[V], z[V];
        widen(in[r], x);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] -= constants.mean[constants.at(v)];
        constants.normalise(x, z);
        activate_all(args.activation, z);
        store_packed(static_cast<T*>(args.output) + at + r * runs.step, pack<T, V>(z));
      }
    }
  }
};

template <class T, int V, bool kSame>
struct BackwardValues {
  using A = accumulate_t<T>;
  using Constants = ChannelConstants<A, V, kSame>;
  Constants constants;
  A slope[Constants::kCount], mean_grad[Constants::kCount];

  DWCONV_DEVICE BackwardValues(const BatchNormArgs& args, int64_t channel) : constants(args, channel) {
    const A count = static_cast<A>(args.count);
#pragma unroll
    for (int v = 0; v < Constants::kCount; ++v) {
      slope[v] = load_one(static_cast<const A*>(args.grad_weight) + channel + v) / count * constants.inv_std[v];
      mean_grad[v] = load_one(static_cast<const A*>(args.grad_bias) + channel + v) / count;
    }
  }
  // x and dy become x - mean and dx.
  DWCONV_DEVICE void gradient(const Activation& activation, A (&x)[V], A (&dy)[V]) const {
    constants.centre_and_differentiate(activation, x, dy);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = constants.at(v);
      dy[v] = constants.scale[c] * ((dy[v] - mean_grad[c]) - slope[c] * x[v]);
    }
  }
  DWCONV_DEVICE void write(const BatchNormArgs& args, const Runs& runs) const {
    for_each_gradient<T, V>(args, runs, [&](A(&x)[V], A(&g)[V], int64_t element) {
      gradient(args.activation, x, g);
      store_packed(static_cast<T*>(args.output) + element, pack<T, V>(g));
    });
  }
};

template <template <class, int, bool> class Values, class T, int V, bool kChannelsLast>
DWCONV_DEVICE void write_values(const BatchNormArgs& args) {
  const NormThread thread(args);
  const int64_t block = block_index();
  if constexpr (kChannelsLast) {
    const int64_t part = divided(block, args.slabs), slab = block - part * args.slabs;
    const int64_t channel = (slab * args.lanes + thread.lane) * V;
    if (!thread.works || channel >= args.channels) return;
    Values<T, V, false>(args, channel).write(args, runs_of_pixels(args, thread, channel, part));
  } else {
    const int64_t planes = args.batch * args.channels, group = divided(block, args.pieces);
    const int64_t plane = group * args.rows + thread.row;
    if (!thread.works || plane >= planes) return;
    const int64_t channel = plane - divided(plane, args.channels) * args.channels;
    Values<T, V, true>(args, channel).write(args, runs_of_plane<V>(args, thread, plane, block - group * args.pieces));
  }
}

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kNormThreads, kNormBlocks)
batch_norm_forward(BatchNormArgs args) {
  if (args.aligned) {
    write_values<ForwardValues, T, kChunkValues<T>, kChannelsLast>(args);
  } else {
    write_values<ForwardValues, T, 1, kChannelsLast>(args);
  }
}

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kNormThreads, kNormBlocks)
batch_norm_backward(BatchNormArgs args) {
  if (args.aligned) {
    write_values<BackwardValues, T, kChunkValues<T>, kChannelsLast>(args);
  } else {
    write_values<BackwardValues, T, 1, kChannelsLast>(args);
  }
}

}  // namespace dwconv::cuda
