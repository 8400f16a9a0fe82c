// Depthwise weight and bias gradient, first stage, in NCHW for square filters of 3 and 5 without staging: for the tensors of
// depthwise_rows_nchw.cuh (the formula: depthwise_backward_weight.cuh).
//
// A block owns `slab` channels and a part of the tiles of grad_output. A thread owns a strip of kBytes of columns of one channel
// and walks down the rows of each tile: it keeps the last rows of grad_output that an input row can reach, reads every row of
// both tensors once, straight to registers, as many ahead as they hold, and has the K * K sums of its channel. At the end the
// strips are added pairwise, as in the other kernels.
//
// The plan guarantees: tile_w a multiple of the strip's columns, slab * tile_w / columns <= block_size(); shared memory for
// kKernel values a thread. Traffic: input (1 + halo rows) and grad_output once.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows_nchw.cuh"

namespace dwconv::cuda {

template <class T, class Taps, int kBytes>
DWCONV_KERNEL(kPlaneRowThreads, kPlaneWeightRowBlocks)
depthwise_backward_weight_rows_nchw(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, S = Taps::kStride, kColumns = kBytes / static_cast<int>(sizeof(T));
  constexpr int kSpan = Taps::span(kColumns), kDelay = (K - 1) / S, kOpen = kDelay + 1;
  using Row = PlaneRow<T, Taps, kColumns>;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t c0 = block_index() % slabs_of(t) * t.slab, part = block_index() / slabs_of(t);
  const int strips = t.tile_w / kColumns, q = thread_index() / strips, strip = thread_index() - q * strips;
  const int64_t channel = c0 + q;
  const bool active = q < t.slab && channel < p.channels;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);

  A acc[K][K][1] = {}, bias[1] = {};
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < end; ++tile) {
    const auto [n, y0, first_x] = grad_tile(tile, t);
    const int x0 = first_x + strip * kColumns;
    if (!active || x0 >= out_w) continue;
    const int rows = least(t.tile_h, out_h - y0), in_rows = (rows - 1) * S + K, steps = rows + kDelay;
    const int in_y0 = y0 * S - static_cast<int>(p.pad_h);
    const unsigned inside = columns_inside<kSpan>(x0 * S - Row::kLeft, in_w);
    const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + channel * p.in_stride_c + x0 * S;
    const T* const out =
        static_cast<const T*>(args.grad_output) + n * p.out_stride_n + channel * p.out_stride_c + y0 * p.out_stride_h + x0;
    struct Step {
      Row row[S];
      Packed<T, kColumns> grad;
    };
    Step next[Row::kAhead];
    // Step i begins row i of grad_output and reads the input rows i * S .. i * S + S - 1 of the tile.
    const auto fetch = [&](int i, Step& to) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int j = i * S + s, y = in_y0 + j;
        const bool wanted = j < in_rows && y >= 0 && y < in_h;
        to.row[s].fetch(in + (wanted ? y * p.in_stride_h : 0), wanted ? inside : 0);
      }
      to.grad = load_packed<kColumns>(out + (i < rows ? i * p.out_stride_h : 0), i < rows);
    };
#pragma unroll
    for (int i = 0; i < Row::kAhead; ++i) fetch(i, next[i]);
    A grad[kOpen][kColumns];
    for (int base = 0; base < steps; base += kOpen) {
#pragma unroll
      for (int u = 0; u < kOpen; ++u) {
        const int i = base + u;
        if (i >= steps) break;
        Step copy;
        if (Row::kAhead == 1) {
          copy = next[0];
          if (i + 1 < steps) fetch(i + 1, next[0]);
        }
        const Step& now = Row::kAhead == 1 ? copy : next[u % Row::kAhead];
        const Vector<T, kColumns> begun = unpacked(now.grad);
#pragma unroll
        for (int x = 0; x < kColumns; ++x) {
          grad[u][x] = to_accumulate(begun.value[x]);
          bias[0] += grad[u][x];
        }
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int y = in_y0 + i * S + s;
          if (y < 0 || y >= in_h) continue;  // 0 * NaN is no 0: rows that do not exist are left out
          A row[kSpan];
#pragma unroll
          for (int k = 0; k < kSpan; ++k) row[k] = now.row[s].sample(k);
#pragma unroll
          for (int d = 0; d <= kDelay; ++d) {
            const int r = S * d + s, open = (u - d + kOpen) % kOpen;
            if (r >= K || i < d || i - d >= rows) continue;
#pragma unroll
            for (int x = 0; x < kColumns; ++x) {
#pragma unroll
              for (int k = 0; k < K; ++k) acc[r][k][0] += grad[open][x] * row[x * S + k];
            }
          }
        }
        if (Row::kAhead > 1 && i + Row::kAhead < steps) fetch(i + Row::kAhead, next[u % Row::kAhead]);
      }
    }
  }
  finish_part<T, K, 1>(args, acc, bias, reinterpret_cast<A*>(shared_memory()), part, channel, strip, strips, q, t.slab, active);
}

}  // namespace dwconv::cuda
