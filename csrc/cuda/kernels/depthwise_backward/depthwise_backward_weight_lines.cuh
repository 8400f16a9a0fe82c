// Depthwise weight and bias gradient, first stage, for the filters of depthwise_lines.cuh, both layouts:
//
//   grad_weight[c, k] = sum_{n, y, x} grad[n, c, y, x] * in[n, c, y, x + k - P]      grad_bias[c] = sum grad
//
// A block owns `slab` channels and a part of the tiles of grad_output, which are pieces of lines. Threads read both tensors as
// there, hold the K sums of their channels, and are added pairwise at the end, as in the other kernels.
//
// The plan guarantees what it does there, and shared memory for K values a thread, or one of each of its channels where they are
// more. Traffic: input and grad_output once, in channels_last (1 + (K - 1) / piece) times the input.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_lines.cuh"

namespace dwconv::cuda {

// Adds the block's sums and writes the part's.
template <class T, int K, int V, class A>
DWCONV_DEVICE void finish_lines(const BackwardWeightTileArgs& args, A (&sums)[V][K], A (&bias)[V], int64_t part, int64_t channel,
                                int slot, int slots, int lane, int lanes) {
  A* const scratch = reinterpret_cast<A*>(shared_memory());
  const int64_t channels = args.problem.channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    add_slots(sums[v], scratch, slot, slots, lane, lanes, true);
    if (slot != 0 || channel + v >= channels || args.partial == nullptr) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) store_sum<T>(args, args.partial, (part * channels + channel + v) * K + k, sums[v][k]);
  }
  if (args.partial_bias == nullptr) return;
  add_slots(bias, scratch, slot, slots, lane, lanes, true);
  if (slot != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (channel + v < channels) store_sum<T>(args, args.partial_bias, part * channels + channel + v, bias[v]);
  }
}

template <class T, int K>
DWCONV_KERNEL(kLineThreads, kLineBlocks)
depthwise_backward_weight_lines_nchw(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int kRun = LineSamples<T>::kRun;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t slab = block_index() % slabs_of(t), part = block_index() / slabs_of(t);
  const LineThread at(t, slab, 0, kRun);  // its line is a channel
  const int pad = static_cast<int>(p.pad_w), in_w = static_cast<int>(p.in_w);
  A sums[1][K] = {}, bias[1] = {};
  const int64_t last = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < last && at.line < p.channels; ++tile) {
    const auto [n, y, x0] = grad_tile(tile, t);
    const int end = least(x0 + t.tile_w, static_cast<int>(p.out_w));
    const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + at.line * p.in_stride_c + y * p.in_stride_h;
    const T* const grad =
        static_cast<const T*>(args.grad_output) + n * p.out_stride_n + at.line * p.out_stride_c + y * p.out_stride_h;
#pragma unroll 1
    for (int x = x0 + at.x; x < end; x += at.strips * kRun) {
      const Packed<T, kRun> packed = load_packed<kRun>(grad + x, true);
      const LineSamples<T> samples(in, x, in_w, pad, K - 1 - pad);
      A g[kRun];
      widen(packed, g);
#pragma unroll
      for (int i = 0; i < kRun; ++i) bias[0] += g[i];
      with_padding<K - 1>(pad, [&](auto padding) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
#pragma unroll
          for (int k = 0; k < K; ++k) sums[0][k] += g[i] * samples[i + k - decltype(padding)::value];
        }
      });
    }
  }
  finish_lines<T, K, 1>(args, sums, bias, part, at.line, thread_index() - at.q * at.strips, at.strips, at.q, t.slab);
}

template <class T, int K>
DWCONV_KERNEL(kLineThreads, kWeightPieceBlocks)
depthwise_backward_weight_lines_nhwc(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int V = kLineChannels<T>;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t slab = block_index() % slabs_of(t), part = block_index() / slabs_of(t);
  const int in_w = static_cast<int>(p.in_w), shift = K - 1 - static_cast<int>(p.pad_w);
  const PieceThread<T> thread(p, t, slab, 0);
  A sums[V][K] = {}, bias[V] = {};
  const int64_t last = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < last && thread.channel < p.channels; ++tile) {
    const auto [n, y, x0] = grad_tile(tile, t);
    const PieceThread<T> at(p, t, slab, x0 / t.tile_w);
    if (at.x >= at.end) continue;
    const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + y * p.in_stride_h + at.channel;
    const T* const grad = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + y * p.out_stride_h + at.channel;
    Packed<T, V> next[kLineGroup], next_grad[kLineGroup];
    const auto fetch = [&](int x, int i) {
      next[i] = fetch_sample<V>(in, p.in_stride_w, x + shift + i, at.end + shift, in_w);
      next_grad[i] = fetch_sample<V>(grad, p.out_stride_w, x + i, at.end, at.end);
    };
#pragma unroll
    for (int i = 0; i < kLineGroup; ++i) fetch(at.x, i);
    A window[K - 1][V];
    begin_window<K>(in, p.in_stride_w, at.x + shift, in_w, window);
#pragma unroll 1
    for (int x = at.x; x < at.end; x += kLineGroup) {
#pragma unroll
      for (int i = 0; i < kLineGroup; ++i) {
        A sample[V], g[V];
        widen(next[i], sample);
        widen(next_grad[i], g);
        fetch(x + kLineGroup, i);
        if (x + i < at.end) {  // 0 * NaN is no 0
#pragma unroll
          for (int v = 0; v < V; ++v) {
            bias[v] += g[v];
#pragma unroll
            for (int k = 0; k < K - 1; ++k) sums[v][k] += g[v] * window[k][v];
            sums[v][K - 1] += g[v] * sample[v];
          }
        }
        move_window<K>(window, sample);
      }
    }
  }
  finish_lines<T, K, V>(args, sums, bias, part, thread.channel, thread.piece, thread.pieces, thread.lane, t.slab / V);
}

}  // namespace dwconv::cuda
