// depthwise_rows_nhwc and depthwise_rows_nchw for an output of which statistics are wanted: each block leaves the moments of its
// tile as one of the parts that a kernel of batch_norm_sums.cuh joins, and the sweep that would take them is saved. Parts are of
// the batch, for BatchNorm, or of an image, for squeeze-and-excitation, whose mean is of what the activation has made.
//
// Values count as they have been rounded: what the next layer reads. A row of a strip, up to four values a channel in
// channels_last and a run of a plane in NCHW, is a group of its own. Traffic: that of the kernel without, and three values a
// channel of each tile.
#pragma once

#include "cuda/kernels/batch_norm/batch_norm_sums.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_rows_nchw.cuh"
#include "cuda/kernels/depthwise_norm/args.h"

namespace dwconv::cuda {

// What a tile has of V channels, from one of image n on.
template <class A, int V>
DWCONV_DEVICE void store_moments(const DepthwiseStatisticsArgs& args, int64_t n, int tile_y, int tile_x, int64_t channel,
                                 const Moments<A, V>& moments) {
  const DepthwiseProblem& p = args.convolution.problem;
  const Tiling& t = args.convolution.tiling;
  const int64_t tile = static_cast<int64_t>(tile_y) * t.tiles_w + tile_x;
  BatchNormArgs to;
  to.channels = args.by_image ? p.batch * p.channels : p.channels;
  to.partial = args.partial;
  const int64_t tiles = static_cast<int64_t>(t.tiles_h) * t.tiles_w;
  store_part(to, args.by_image ? tile : n * tiles + tile, args.by_image ? n * p.channels + channel : channel, moments);
}

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
  convolve_rows<T, Taps, V>(conv, block_index(), [&](auto& row) { activate_all(conv.problem.activation, row); }, taken);
  join();

  const int lanes = conv.lanes.divisor, strip = quotient(thread_index(), conv.lanes), lane = thread_index() - strip * lanes;
  const auto [slab, tile_x, tile_y, n] = tile_of_block(conv, block_index());
  const int64_t channel = static_cast<int64_t>(slab) * conv.tiling.slab + lane * V;
  join_rows(moments, strip, lane, conv.tiling.tile_w / kStripColumns, lanes);
  if (strip == 0 && channel < conv.problem.channels) store_moments(args, n, tile_y, tile_x, channel, moments);
}

template <class T, class Taps, int kBytes>
DWCONV_KERNEL(kPlaneRowThreads, plane_statistics_blocks(Taps::kKernel))
depthwise_rows_statistics_nchw(DepthwiseStatisticsArgs args) {
  using A = accumulate_t<T>;
  constexpr int kColumns = kBytes / static_cast<int>(sizeof(T));
  const DepthwiseTileArgs& conv = args.convolution;
  const DepthwiseProblem& p = conv.problem;
  const PlaneThread thread(conv.tiling, block_index(), kColumns);
  Moments<A, 1> moments;
  const auto taken = [&](const Packed<T, kColumns>& packed) {
    A value[kColumns], mean[1] = {}, squares[1] = {};
    widen(packed, value);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) mean[0] += value[x];
    mean[0] *= A(1) / kColumns;
#pragma unroll
    for (int x = 0; x < kColumns; ++x) squares[0] += (value[x] - mean[0]) * (value[x] - mean[0]);
    moments.join(A(kColumns), mean, squares);
  };
  convolve_plane_rows<T, Taps, kColumns>(conv, thread, [&](auto& row) { activate_all(p.activation, row); }, taken);

  const int strips = conv.tiling.tile_w / kColumns, planes = conv.tiling.slab;
  join_rows(moments, thread.q < planes ? thread.strip : strips, thread.q, strips, planes);
  if (thread.strip > 0 || thread.q >= planes || thread.plane >= p.batch * p.channels) return;
  const int64_t n = divided(thread.plane, p.channels);
  store_moments(args, n, thread.tile_y, thread.tile_x, thread.plane - n * p.channels, moments);
}

}  // namespace dwconv::cuda
