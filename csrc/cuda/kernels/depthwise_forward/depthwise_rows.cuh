// Depthwise forward in channels_last for square filters of 3 and 5 without shared memory: for tensors whose 16-byte runs of
// channels are aligned (the formula: taps.cuh).
//
// A thread owns V channels of a strip of 4 output columns and walks down the rows of its tile (row_walk.cuh). More channels share
// the instructions that are not arithmetic; fewer leave more threads where a problem is small.
//
//     lanes ->  channels of the slab         slots ->  strips of the tile
//
// Neighbouring strips read S + K - 2 columns twice, from L1; a tile's first rows are read twice, from L2.
//
// The plan guarantees: alignment of input, output and weight; tile_w a multiple of 4; slab lanes * strips == block_size().
// Traffic: input (1 + halo rows), output once, the filters of the slab once a block.
#pragma once

#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_nhwc.cuh"
#include "cuda/kernels/row_walk.cuh"

namespace dwconv::cuda {

constexpr int kStripColumns = 4;
// Steps whose rows are on their way beside the one that is multiplied: as many as the registers hold.
template <class T, int K, int S>
constexpr int kAhead = K == 3 && (S == 1 || sizeof(T) == 2) ? (K - 1) / S + 1
                       : K == 3 || S == 1                   ? 1
                                                            : 0;

// kCount pixels of a row, zeros where the mask has no bit. Most strips have all: they need no zeros and no look at the mask.
template <int kCount, int V, class T>
DWCONV_DEVICE void fetch_pixels(const T* row, int64_t stride_w, unsigned mask, Packed<T, V> (&to)[kCount]) {
  const char* const first = reinterpret_cast<const char*>(row);
  const int64_t step = stride_w * static_cast<int64_t>(sizeof(T));
  if (mask == (1u << kCount) - 1) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) to[q] = load_packed<V>(reinterpret_cast<const T*>(first + q * step), true);
  } else {
#pragma unroll
    for (int q = 0; q < kCount; ++q) to[q] = load_packed<V>(reinterpret_cast<const T*>(first + q * step), mask >> q & 1);
  }
}

// The filters of V neighbouring channels, V * K * K consecutive values.
template <class T, int K, int V>
DWCONV_DEVICE void fetch_filters(const T* weight, bool flipped, accumulate_t<T> (&filter)[K][K][V]) {
#pragma unroll
  for (int i = 0; i < K * K; ++i) {
    const Vector<T, V> run = load<V>(weight + i * V);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int v = (i * V + k) / (K * K), tap = (i * V + k) % (K * K);
      filter[tap / K][tap % K][v] = to_accumulate(run.value[k]);
    }
  }
  if (!flipped) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int tap = 0; tap < K * K / 2; ++tap) {
      const int other = K * K - 1 - tap;
      const accumulate_t<T> kept = filter[tap / K][tap % K][v];
      filter[tap / K][tap % K][v] = filter[other / K][other % K][v];
      filter[other / K][other % K][v] = kept;
    }
  }
}

// activate(row): in place; taken(x, packed): output x of a strip's row has been stored.
template <class T, class Taps, int V, class Activate, class Taken>
DWCONV_DEVICE void convolve_rows(const DepthwiseTileArgs& args, int block, const Activate& activate, const Taken& taken) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, S = Taps::kStride, kSpan = Taps::span(kStripColumns);
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const auto [slab, tile_x, tile_y, n] = tile_of_block(args, block);
  const int64_t c0 = static_cast<int64_t>(slab) * t.slab;
  const int lanes = args.lanes.divisor, strip = quotient(thread_index(), args.lanes);
  const int64_t channel = c0 + (thread_index() - strip * lanes) * V;
  const int in_h = static_cast<int>(p.in_h), out_w = static_cast<int>(p.out_w);
  const int y0 = tile_y * t.tile_h, x0 = tile_x * t.tile_w + strip * kStripColumns;
  if (channel >= p.channels || x0 >= out_w) return;

  const int rows = least(t.tile_h, static_cast<int>(p.out_h) - y0), in_rows = (rows - 1) * S + K;
  const int in_y0 = y0 * S - static_cast<int>(p.pad_h), in_x0 = x0 * S - static_cast<int>(p.pad_w);
  const unsigned inside = columns_inside<kSpan>(in_x0, static_cast<int>(p.in_w));
  const unsigned exists = columns_inside<kStripColumns>(x0, out_w);
  const T* const in = static_cast<const T*>(args.input) + n * p.in_stride_n + in_x0 * p.in_stride_w + channel;
  struct Row {
    Packed<T, V> pixel[kSpan];
  };
  InputRows<T> lines(in, p.in_stride_h, in_y0, in_rows, in_h);
  const auto fetch = [&](Row& row) {
    const bool wanted = lines.inside();
    fetch_pixels(lines.next(), p.in_stride_w, wanted ? inside : 0, row.pixel);
  };
  const auto prepare = [&](A(&filter)[K][K][V], A(&bias)[V]) {
    fetch_filters<T, K, V>(static_cast<const T*>(args.weight) + channel * (K * K), args.flipped, filter);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      bias[v] = args.bias != nullptr ? load_bias<T>(args.bias, channel + v, args.wide_bias) : A(0);
    }
  };
  T* out = static_cast<T*>(args.output) + n * p.out_stride_n + y0 * p.out_stride_h + x0 * p.out_stride_w + channel;
  const auto finish = [&](A(&row)[kStripColumns][V]) {
    activate(row);
    const bool all = exists == (1u << kStripColumns) - 1;
#pragma unroll
    for (int x = 0; x < kStripColumns; ++x) {
      if (!(all || exists >> x & 1)) continue;
      const Packed<T, V> packed = pack<T, V>(row[x]);
      store_packed(out + x * p.out_stride_w, packed);
      taken(x, packed);
    }
    out += p.out_stride_h;
  };
  walk_rows<Taps, kStripColumns, V, kAhead<T, K, S>, Row, A>(
      rows, fetch, prepare, [](const Row& row, int q, A(&value)[V]) { widen(row.pixel[q], value); }, finish);
}

template <class T, class Taps, int V>
DWCONV_KERNEL(row_threads(sizeof(T), V, Taps::kKernel, Taps::kStride), row_blocks(sizeof(T), V, Taps::kKernel, Taps::kStride))
depthwise_rows_nhwc(DepthwiseTileArgs args) {
  convolve_rows<T, Taps, V>(
      args, block_index(), [&](auto& row) { activate_short(args.problem.activation, row); }, [](int, const Packed<T, V>&) {});
}

}  // namespace dwconv::cuda
