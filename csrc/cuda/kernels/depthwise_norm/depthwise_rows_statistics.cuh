// depthwise_rows_nhwc for an output that BatchNorm normalises by the batch's statistics: each block leaves the moments of its
// tile as one of the parts that batch_norm_join_statistics joins, and the sweep that would take them is saved.
//
// A row of a strip is a group of up to four values a channel, as they have been rounded: what BatchNorm reads. Traffic:
// depthwise_rows_nhwc's, and three values a channel of each tile.
#pragma once

#include "cuda/kernels/batch_norm/batch_norm_sums.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"
#include "cuda/kernels/depthwise_norm/args.h"

namespace dwconv::cuda {

template <class T, class Taps, int V>
DWCONV_KERNEL(row_threads(sizeof(T), V, Taps::kKernel, Taps::kStride),
              statistics_blocks(sizeof(T), V, Taps::kKernel, Taps::kStride))
depthwise_rows_statistics_nhwc(DepthwiseStatisticsArgs args) {
  using A = accumulate_t<T>;
  const DepthwiseTileArgs& conv = args.convolution;
  Moments<A, V> moments;
  A sum[V] = {}, squares[V] = {}, first[V] = {}, count = 0;
  // Of a row about its first value, which is near enough to the others that nothing is lost of four.
  const auto join = [&] {
    if (count == A(0)) return;
    const A share = A(1) / count;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A apart = sum[v] * share;
      squares[v] -= sum[v] * apart;
      first[v] += apart;
    }
    moments.join(count, first, squares);
    count = 0;
  };
  const auto taken = [&](int x, const Packed<T, V>& packed) {
    A value[V];
    widen(packed, value);
    if (x == 0) {  // a strip's rows have the same columns, the first among them
      join();
#pragma unroll
      for (int v = 0; v < V; ++v) first[v] = value[v], sum[v] = squares[v] = A(0);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A apart = value[v] - first[v];
        sum[v] += apart;
        squares[v] += apart * apart;
      }
    }
    count += A(1);
  };
  convolve_rows<T, Taps, V>(conv, block_index(), taken);
  join();

  const int lanes = conv.lanes.divisor, strip = quotient(thread_index(), conv.lanes), lane = thread_index() - strip * lanes;
  const auto [slab, tile_x, tile_y, n] = tile_of_block(conv, block_index());
  const int64_t part = (static_cast<int64_t>(n) * conv.tiles_h.divisor + tile_y) * conv.tiles_w.divisor + tile_x;
  const int64_t channel = static_cast<int64_t>(slab) * conv.tiling.slab + lane * V;
  join_rows(moments, strip, lane, conv.tiling.tile_w / kStripColumns, lanes);
  if (strip > 0 || channel >= conv.problem.channels) return;
  BatchNormArgs to;
  to.channels = conv.problem.channels;
  to.partial = args.partial;
  store_part(to, part, channel, moments);
}

}  // namespace dwconv::cuda
