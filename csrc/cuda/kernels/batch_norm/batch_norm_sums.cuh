// The sums over the batch of each channel (batch_norm.cuh): a part of them a block, then all parts joined.
//
// Statistics: a thread takes the mean of a few values, the squares about it, and joins these moments with those that it has; so
// do threads, one half with the other, and then parts, in float64: nothing cancels, whatever the mean. Backward's sums are joined
// in the same order. Every order is fixed by the plan: the same bits at each run. Source: Chan, Golub and LeVeque 1983,
// "Algorithms for computing the sample variance".
#pragma once

#include "cuda/kernels/batch_norm/batch_norm.cuh"

namespace dwconv::cuda {

// Of N channels: count, mean and sum of squares about it.
template <class A, int N>
struct Moments {
  A count = 0, mean[N] = {}, squares[N] = {};

  DWCONV_DEVICE void join(A more, const A (&its_mean)[N], const A (&its_squares)[N]) {
    if (more == A(0)) return;
    const A together = count + more, share = more / together, between = count * share;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A difference = its_mean[i] - mean[i];
      mean[i] += difference * share;
      squares[i] += its_squares[i] + difference * difference * between;
    }
    count = together;
  }
  DWCONV_DEVICE void join(const Moments& other) { join(other.count, other.mean, other.squares); }
};

// Of N channels: of g and of g (x - mean).
template <class A, int N>
struct GradSums {
  A grad[N] = {}, product[N] = {};

  DWCONV_DEVICE void join(const GradSums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) grad[i] += other.grad[i], product[i] += other.product[i];
  }
};

// The sums of all rows to row 0. A block calls it once.
template <class Sums>
DWCONV_DEVICE void join_rows(Sums& own, int row, int lane, int rows, int lanes) {
  Sums* const shared = reinterpret_cast<Sums*>(shared_memory());
  if (row < rows) shared[row * lanes + lane] = own;
  int half = 1;
  while (2 * half < rows) half *= 2;
  for (; half > 0; half /= 2) {
    synchronize();
    if (row < half && row + half < rows) {
      own.join(shared[(row + half) * lanes + lane]);
      shared[row * lanes + lane] = own;
    }
  }
}

template <class A>
DWCONV_DEVICE void store_one(void* to, int64_t i, A value) {
  store(static_cast<A*>(to) + i, Vector<A, 1>{{value}});
}
template <class A, int N>
DWCONV_DEVICE void store_part(const BatchNormArgs& args, int64_t part, int64_t channel, const Moments<A, N>& sums) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t at = part * 3 * args.channels + channel + i;
    store_one(args.partial, at, sums.mean[i]);
    store_one(args.partial, at + args.channels, sums.squares[i]);
    store_one(args.partial, at + 2 * args.channels, sums.count);
  }
}
template <class A, int N>
DWCONV_DEVICE void store_part(const BatchNormArgs& args, int64_t part, int64_t channel, const GradSums<A, N>& sums) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t at = part * 2 * args.channels + channel + i;
    store_one(args.partial, at, sums.product[i]);
    store_one(args.partial, at + args.channels, sums.grad[i]);
  }
}

// The moments of runs of V values: of V channels, or with kSame of one.
template <class T, int V, bool kSame>
struct StatisticsOf {
  using A = accumulate_t<T>;
  static constexpr int kRuns = kSame && V > 4 ? 2 : 4, kChannels = kSame ? 1 : V;
  using Sums = Moments<A, kChannels>;

  DWCONV_DEVICE StatisticsOf(const BatchNormArgs&, int64_t) {}
  DWCONV_DEVICE void add(const BatchNormArgs& args, const Runs& runs, Sums& all) const {
    for (int i = 0; i < runs.count; i += kRuns) {
      const int count = least(runs.count - i, kRuns);
      const T* const from = static_cast<const T*>(args.input) + runs.first + i * runs.step;
      Packed<T, V> in[kRuns];
#pragma unroll
      for (int r = 0; r < kRuns; ++r) in[r] = load_packed<V>(from + (r < count ? r * runs.step : 0), r < count);
      A x[kRuns][V], mean[kChannels] = {}, squares[kChannels] = {};
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        widen(in[r], x[r]);
#pragma unroll
        for (int v = 0; v < V; ++v) mean[kSame ? 0 : v] += x[r][v];  // absent ones are zero
      }
      const A values = static_cast<A>(kSame ? count * V : count), share = A(1) / values;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) mean[c] *= share;
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (r >= count) break;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A apart = x[r][v] - mean[kSame ? 0 : v];
          squares[kSame ? 0 : v] += apart * apart;
        }
      }
      all.join(values, mean, squares);
    }
  }
};

// Backward's sums of the same.
template <class T, int V, bool kSame>
struct GradSumsOf {
  using A = accumulate_t<T>;
  static constexpr int kChannels = kSame ? 1 : V;
  using Sums = GradSums<A, kChannels>;
  ChannelConstants<A, V, kSame> constants;

  DWCONV_DEVICE GradSumsOf(const BatchNormArgs& args, int64_t channel) : constants(args, channel) {}
  DWCONV_DEVICE void add(const BatchNormArgs& args, const Runs& runs, Sums& all) const {
    for_each_gradient<T, V>(args, runs, [&](A(&x)[V], A(&g)[V], int64_t) {
      constants.centre_and_differentiate(args.activation, x, g);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        all.grad[kSame ? 0 : v] += g[v];
        all.product[kSame ? 0 : v] += g[v] * x[v];
      }
    });
  }
};

template <template <class, int, bool> class Of, class T, int V, bool kChannelsLast>
DWCONV_DEVICE void sum_part(const BatchNormArgs& args) {
  const NormThread thread(args);
  int64_t block = block_index();
  if constexpr (kChannelsLast) {
    const int64_t part = divided(block, args.slabs), slab = block - part * args.slabs;
    const int64_t channel = (slab * args.lanes + thread.lane) * V;
    const bool exists = channel < args.channels;
    typename Of<T, V, false>::Sums sums;
    Of<T, V, false>(args, exists ? channel : 0).add(args, runs_of_pixels(args, thread, channel, part), sums);
    join_rows(sums, thread.row, thread.lane, args.rows, args.lanes);
    if (thread.row == 0 && exists) store_part(args, part, channel, sums);
  } else {
    const int64_t part = divided(block, args.channels), channel = block - part * args.channels;
    const int64_t range = divided(part, args.pieces), ranges = args.parts / args.pieces;
    const int64_t end = divided(args.batch * (range + 1), ranges);
    typename Of<T, V, true>::Sums sums;
    const Of<T, V, true> of(args, channel);
    for (int64_t n = divided(args.batch * range, ranges) + thread.row; n < end; n += args.rows) {
      of.add(args, runs_of_plane<V>(args, thread, n * args.channels + channel, part - range * args.pieces), sums);
    }
    join_rows(sums, thread_index(), 0, kNormThreads, 1);
    if (thread_index() == 0) store_part(args, part, channel, sums);
  }
}

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kNormThreads, kNormBlocks)
batch_norm_statistics(BatchNormArgs args) {
  if (args.aligned) {
    sum_part<StatisticsOf, T, kChunkValues<T>, kChannelsLast>(args);
  } else {
    sum_part<StatisticsOf, T, 1, kChannelsLast>(args);
  }
}

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kNormThreads, kNormBlocks)
batch_norm_grad_sums(BatchNormArgs args) {
  if (args.aligned) {
    sum_part<GradSumsOf, T, kChunkValues<T>, kChannelsLast>(args);
  } else {
    sum_part<GradSumsOf, T, 1, kChannelsLast>(args);
  }
}

// A block has kJoinedChannels channels, kJoiningThreads threads each; each takes every kJoiningThreads-th part, the values of
// several at a time, since parts may be thousands. join(values) has kValues of a part.
template <class A, int kValues, class Sums, class Join>
DWCONV_DEVICE bool join_parts(const JoinPartsArgs& args, int64_t* channel, Sums& sums, const Join& join) {
  constexpr int kAtOnce = 4;
  const int lane = thread_index() % kJoinedChannels, row = thread_index() / kJoinedChannels;
  *channel = static_cast<int64_t>(block_index()) * kJoinedChannels + lane;
  const bool exists = *channel < args.channels;
  const A* const partial = static_cast<const A*>(args.partial) + (exists ? *channel : 0);
  for (int part = row; exists && part < args.parts; part += kAtOnce * kJoiningThreads) {
    A value[kAtOnce][kValues];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t each = part + i * kJoiningThreads;
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        value[i][k] = each < args.parts ? load_one(partial + (each * kValues + k) * args.channels) : A(0);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (part + i * kJoiningThreads < args.parts) join(value[i]);
    }
  }
  join_rows(sums, row, lane, kJoiningThreads, kJoinedChannels);
  return exists && row == 0;
}

// Whether this thread has the moments of all parts of a channel.
template <class A>
DWCONV_DEVICE bool join_moments(const JoinPartsArgs& args, int64_t* channel, Moments<double, 1>& sums) {
  return join_parts<A, 3>(args, channel, sums, [&](const A(&value)[3]) {
    const double mean[1] = {value[0]}, squares[1] = {value[1]};
    sums.join(value[2], mean, squares);
  });
}

template <class A>
DWCONV_KERNEL(kJoinedChannels* kJoiningThreads, 1)
batch_norm_join_statistics(JoinPartsArgs args) {
  int64_t channel = 0;
  Moments<double, 1> sums;
  if (!join_moments<A>(args, &channel, sums)) return;
  store_one(args.first, channel, static_cast<A>(sums.mean[0]));
  store_one(args.second, channel, static_cast<A>(sums.squares[0] / sums.count));
}

// The means alone, in T.
template <class T>
DWCONV_KERNEL(kJoinedChannels* kJoiningThreads, 1)
join_means(JoinPartsArgs args) {
  using A = accumulate_t<T>;
  int64_t channel = 0;
  Moments<double, 1> sums;
  if (!join_moments<A>(args, &channel, sums)) return;
  store(static_cast<T*>(args.first) + channel, Vector<T, 1>{{from_accumulate<T>(static_cast<A>(sums.mean[0]))}});
}

template <class A>
DWCONV_KERNEL(kJoinedChannels* kJoiningThreads, 1)
batch_norm_join_grad_sums(JoinPartsArgs args) {
  int64_t channel = 0;
  GradSums<double, 1> sums;
  const bool first = join_parts<A, 2>(args, &channel, sums, [&](const A(&value)[2]) {
    sums.product[0] += value[0];
    sums.grad[0] += value[1];
  });
  if (!first) return;
  const double variance = load_one(static_cast<const A*>(args.variance) + channel);
  store_one(args.first, channel, static_cast<A>(sums.product[0] / sqrt(variance + args.eps)));
  store_one(args.second, channel, static_cast<A>(sums.grad[0]));
}

}  // namespace dwconv::cuda
