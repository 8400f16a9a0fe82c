// Depthwise weight and bias gradient, first stage, in channels_last for square filters of 3, 5 and 7 without staging: for tensors
// whose 16-byte runs of channels are aligned (the formula: depthwise_backward_weight.cuh).
//
// A block owns `slab` channels and a part of the tiles of grad_output. A thread owns V channels of a strip of 4
// columns and walks down the rows of each tile: it keeps the last rows of grad_output that an input row can reach, reads every
// row of both tensors once, straight to registers, one row ahead, and holds the K * K sums of its channels. At the end the strips
// are added pairwise, as in the other kernels.
//
// The plan guarantees: alignment of both tensors; tile_w a multiple of 4; slab lanes * strips == block_size(); shared memory for
// kKernel values a thread, or for one of each of its channels where they are more. Traffic: input (1 + halo rows) and grad_output
// once.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"

namespace dwconv::cuda {

// Whether the registers hold the next row beside the one that is multiplied.
template <int K, int S>
constexpr bool kReadsAhead = K == 3 || S == 1;

// acc += the products of input row s of step u (modulo the rows in progress) with the outputs (d rows back, column x) that exist.
template <int K, int S, int V, int kOpen, int kSpan, class A, class Exists>
DWCONV_DEVICE void correlate_strip(int s, int u, const A (&row)[kSpan][V], const A (&grad)[kOpen][kStripColumns][V],
                                   A (&acc)[K][K][V], const Exists& exists) {
#pragma unroll
  for (int d = 0; d < kOpen; ++d) {
    const int r = S * d + s, open = (u - d + kOpen) % kOpen;
    if (r >= K) continue;
#pragma unroll
    for (int x = 0; x < kStripColumns; ++x) {
      if (!exists(d, x)) continue;
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][k][v] += grad[open][x][v] * row[x * S + k][v];
      }
    }
  }
}

template <class T, class Taps, int V>
DWCONV_DEVICE void correlate_rows(const BackwardWeightTileArgs& args, int block) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, S = Taps::kStride, kSpan = Taps::span(kStripColumns);
  constexpr int kDelay = (K - 1) / S, kOpen = kDelay + 1;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t c0 = block % slabs_of(t) * t.slab, part = block / slabs_of(t);
  const int lanes = t.slab / V, strip = thread_index() / lanes, strips = block_size() / lanes;
  const int lane = thread_index() - strip * lanes;
  const int64_t channel = c0 + lane * V;
  const bool active = channel < p.channels;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);

  A acc[K][K][V] = {}, bias[V] = {};
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < end; ++tile) {
    const auto [n, y0, first_x] = grad_tile(tile, t);
    const int x0 = first_x + strip * kStripColumns;
    if (!active || x0 >= out_w) continue;
    const int rows = least(t.tile_h, out_h - y0), steps = rows + kDelay;
    const int in_y0 = y0 * S - static_cast<int>(p.pad_h), in_x0 = x0 * S - static_cast<int>(p.pad_w);
    const unsigned inside = columns_inside<kSpan>(in_x0, in_w), exists = columns_inside<kStripColumns>(x0, out_w);
    const bool whole = exists == (1u << kStripColumns) - 1;
    const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + in_x0 * p.in_stride_w + channel;
    const T* const out = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + x0 * p.out_stride_w + channel;
    Packed<T, V> next[S][kSpan], next_grad[kStripColumns];
    // Each step begins a row of grad_output and reads the next S input rows of the tile.
    InputRows<T> lines(in, p.in_stride_h, in_y0, (rows - 1) * S + K, in_h), grads(out, p.out_stride_h, y0, rows, out_h);
    const auto fetch = [&] {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const bool wanted = lines.inside();
        fetch_pixels(lines.next(), p.in_stride_w, wanted ? inside : 0, next[s]);
      }
      const bool begun = grads.inside();
      fetch_pixels(grads.next(), p.out_stride_w, begun ? exists : 0, next_grad);
    };
    if (kReadsAhead<K, S>) fetch();
    A grad[kOpen][kStripColumns][V];
    for (int base = 0; base < steps; base += kOpen) {
#pragma unroll
      for (int u = 0; u < kOpen; ++u) {
        const int i = base + u;
        if (i >= steps) break;
        if (!kReadsAhead<K, S>) fetch();
        Packed<T, V> now[S][kSpan];
#pragma unroll
        for (int k = 0; k < S * kSpan; ++k) now[k / kSpan][k % kSpan] = next[k / kSpan][k % kSpan];
#pragma unroll
        for (int x = 0; x < kStripColumns; ++x) {
          widen(next_grad[x], grad[u][x]);
#pragma unroll
          for (int v = 0; v < V; ++v) bias[v] += grad[u][x][v];
        }
        if (kReadsAhead<K, S> && i + 1 < steps) fetch();
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int y = in_y0 + i * S + s;
          if (y < 0 || y >= in_h) continue;
          A row[kSpan][V];
#pragma unroll
          for (int q = 0; q < kSpan; ++q) widen(now[s][q], row[q]);
          if (whole && i >= kDelay && i < rows) {
            correlate_strip<K, S, V>(s, u, row, grad, acc, [](int, int) { return true; });
          } else {  // 0 * NaN is no 0: outputs that do not exist are left out
            correlate_strip<K, S, V>(s, u, row, grad, acc,
                                     [&](int d, int x) { return i >= d && i - d < rows && (exists >> x & 1) != 0; });
          }
        }
      }
    }
  }
  finish_part<T, K, V>(args, acc, bias, reinterpret_cast<A*>(shared_memory()), part, channel, strip, strips, lane, lanes, active);
}

template <class T, class Taps, int V>
DWCONV_KERNEL(weight_row_threads(V, Taps::kKernel, Taps::kStride), weight_row_blocks(V, Taps::kKernel, Taps::kStride))
depthwise_backward_weight_rows_nhwc(BackwardWeightTileArgs args) {
  correlate_rows<T, Taps, V>(args, block_index());
}

}  // namespace dwconv::cuda
