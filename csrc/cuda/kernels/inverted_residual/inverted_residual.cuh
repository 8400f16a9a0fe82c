// The inverted residual in one kernel (Sandler et al., arXiv:1801.04381), for inference:
//
//   out = bias2 + sum_h w2[o, h] * act1(bias1[h] + depthwise(expanded)[h]), act2, + residual
//   expanded[h] = act0(bias0[h] + sum_c w0[h, c] * in[c]), and zeros around the image
//
// A block of 4 or 8 warps owns a tile of one image's output and a range of output channels, whose sums some or all of them share.
// The input pixels that the tile reads, all their channels, stay in shared memory; hidden channels pass through it a slab (128
// bytes) at a time:
//
//     input pixels, w0 --product, act0, round--> expanded slab --depthwise, act1, round--> slot    w2 (slab)
//                                                                                             \     /
//                                      sums in registers over all slabs: 32 rows x 64 columns a warp
//                                                             |
//                                    shared memory --> bias2, act2, residual --> out
//
// In both layouts a pixel's channels lie side by side in shared memory. In channels_last pixels are the rows of the last product,
// in NCHW its columns: what is consecutive in the output is a row of sums, as in separable_forward.cuh.
//
// The weights and filters of the next slab are on their way while one is computed.
//
// The plan guarantees: the pixels that the warps cover hold tile_rows * tile_w; their outputs are a range of `splits`; shared
// memory for all parts. Traffic: input (1 + halo) rows and columns once a split, output and residual once; the expanded image
// never; all weights once a block, from L2.
#pragma once

#include "cuda/kernels/inverted_residual/expand.cuh"
#include "cuda/kernels/separable/separable_forward.cuh"

namespace dwconv::cuda {

// Of a block: its image, and the first row and column of its tile.
struct ImageTile {
  int n, y, x;
};

template <bool kChannelsLast>
DWCONV_DEVICE void map_tile(const InvertedResidualArgs& args, const ImageTile& tile, const TileMap& map, unsigned char* inside) {
  const SeparableBlockArgs& b = args.block;
  const DepthwiseProblem& p = b.problem;
  const int64_t plane = p.out_h * p.out_w, image = tile.n * plane * b.out_channels;
  for (int i = thread_index(); i < b.pixels; i += block_size()) {
    const int row = quotient(i, b.tile_columns), y = tile.y + row, x = tile.x + i - row * b.tile_w;
    const bool exists = row < b.tile_rows && y < p.out_h && x < p.out_w;
    const int64_t at = static_cast<int64_t>(y) * p.out_w + x;
    map.pixel[i] = exists ? image + at * (kChannelsLast ? b.out_channels : 1) : -1;
  }
  const int y0 = static_cast<int>(tile.y * p.stride_h - p.pad_h), x0 = static_cast<int>(tile.x * p.stride_w - p.pad_w);
  for (int i = thread_index(); i < args.in_pixels; i += block_size()) {
    const int row = quotient(i, args.columns), y = y0 + row, x = x0 + i - row * args.in_columns;
    inside[i] = row < args.in_rows && y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
  }
}

// The input's pixels, zeros outside the image. NCHW: neighbouring threads read neighbouring pixels of a plane.
template <class T, bool kChannelsLast>
DWCONV_DEVICE void stage_input(const InvertedResidualArgs& args, const ImageTile& tile, unsigned char* to) {
  constexpr int kValues = kChunkValues<T>;
  const DepthwiseProblem& p = args.block.problem;
  const int chunks = args.chunks.divisor;
  const int y0 = static_cast<int>(tile.y * p.stride_h - p.pad_h), x0 = static_cast<int>(tile.x * p.stride_w - p.pad_w);
  const T* const image = static_cast<const T*>(args.block.input) + tile.n * p.in_stride_n;
  for (int i = thread_index(); i < args.in_pixels * chunks; i += block_size()) {
    const int outer = quotient(i, kChannelsLast ? args.chunks : args.pixels);
    const int inner = i - outer * (kChannelsLast ? chunks : args.in_pixels);
    const int pixel = kChannelsLast ? outer : inner, chunk = kChannelsLast ? inner : outer;
    const int row = quotient(pixel, args.columns), y = y0 + row, x = x0 + pixel - row * args.in_columns;
    const int64_t left = args.in_channels - chunk * kValues;
    const bool valid = left > 0 && row < args.in_rows && y >= 0 && y < p.in_h && x >= 0 && x < p.in_w;
    const T* const from = image + (valid ? y * p.in_stride_h + x * p.in_stride_w + chunk * kValues * p.in_stride_c : 0);
    unsigned char* const line = to + pixel * args.pitch + chunk * kChunkBytes;
    if (kChannelsLast && args.block.aligned_in) {
      copy_async(line, from, valid);
    } else {
      Vector<T, kValues> run;
#pragma unroll
      for (int v = 0; v < kValues; ++v) run.value[v] = valid && v < left ? load<1>(from + v * p.in_stride_c).value[0] : zero<T>();
      *reinterpret_cast<Vector<T, kValues>*>(line) = run;
    }
  }
}

// Hidden channels from a slab's first on, as many as count.
template <class T>
DWCONV_DEVICE int channels_left(const InvertedResidualArgs& args, int slab) {
  const int64_t left = args.block.problem.channels - static_cast<int64_t>(slab) * kSlabChannels<T>;
  return left < kSlabChannels<T> ? static_cast<int>(left) : kSlabChannels<T>;
}

// The expansion's weights of a slab; zeros past the last hidden and input channel. A line's indices have 32 bits: it fits shared
// memory.
template <class T>
DWCONV_DEVICE void stage_expansion(const InvertedResidualArgs& args, int slab, unsigned char* weights) {
  constexpr int kValues = kChunkValues<T>, kSlab = kSlabChannels<T>;
  const int depth = static_cast<int>(args.in_channels), hidden = channels_left<T>(args, slab), chunks = args.chunks.divisor;
  const T* const first = static_cast<const T*>(args.expand_weight) + slab * args.in_channels * kSlab;
#pragma unroll 1
  for (int i = this_thread(); i < kSlab * chunks; i += block_size()) {
    const int row = quotient(i, args.chunks), chunk = i - row * chunks, left = depth - chunk * kValues;
    const bool valid = row < hidden && left > 0;
    const T* const from = first + (row * depth + chunk * kValues);
    unsigned char* const to = weights + row * args.pitch + chunk * kChunkBytes;
    if (args.aligned_expand) {
      copy_async(to, from, valid);
    } else {
#pragma unroll 1
      for (int v = 0; v < kValues; ++v) {
        reinterpret_cast<T*>(to)[v] = valid && v < left ? load<1>(from + v).value[0] : zero<T>();
      }
    }
  }
}

// filters[tap * slab's channels + channel], from dw_weight[channel][tap]; zeros past the last channel.
template <class T, class S>
DWCONV_DEVICE void stage_taps(const InvertedResidualArgs& args, int slab, accumulate_t<T>* filters) {
  constexpr int kSlab = kSlabChannels<T>;
  const int taps = S::kKernel > 0 ? S::kKernel * S::kKernel : args.taps;
  const int left = channels_left<T>(args, slab);
  const T* const from = static_cast<const T*>(args.block.dw_weight) + static_cast<int64_t>(slab) * kSlab * taps;
#pragma unroll 1
  for (int i = this_thread(); i < taps * kSlab; i += block_size()) {
    const int channel = i % kSlab;
    filters[i] = channel < left ? load_one(from + (channel * taps + i / kSlab)) : accumulate_t<T>(0);
  }
}

// The biases of the slab's expansion, and behind them of its filters; zeros past the last channel.
template <class T>
DWCONV_DEVICE void stage_biases(const InvertedResidualArgs& args, int slab, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabChannels<T>;
  const int left = channels_left<T>(args, slab);
#pragma unroll 1
  for (int i = this_thread(); i < 2 * kSlab; i += block_size()) {
    const int channel = i % kSlab;
    const A* const from = static_cast<const A*>(i < kSlab ? args.expand_bias : args.block.dw_bias);
    to[i] = channel < left ? load_one(from + static_cast<int64_t>(slab) * kSlab + channel) : A(0);
  }
}

// V channels of an expanded pixel.
template <class T, int V>
DWCONV_DEVICE void read_expanded(const unsigned char* expanded, int pixel, int lane, accumulate_t<T> (&to)[V]) {
  const int byte = lane * V * static_cast<int>(sizeof(T));
  widen(*reinterpret_cast<const Packed<T, V>*>(expanded + swizzled(pixel, byte / kChunkBytes) + byte % kChunkBytes), to);
}

// The depthwise stage: a thread makes V channels of kRun neighbouring pixels, zeros of channels past the last, which have not
// been expanded. Of a run that the tile cuts off it reads pixels that are there, and writes none.
template <class T, class S, int V, bool kRoundTf32>
DWCONV_DEVICE void convolve_expanded(const InvertedResidualArgs& args, int slab, const accumulate_t<T>* filters,
                                     const accumulate_t<T>* bias, const unsigned char* expanded, unsigned char* slot) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabChannels<T>, kLanes = kSlab / V, K = S::kKernel;
  const SeparableBlockArgs& b = args.block;
  const DepthwiseProblem& p = b.problem;
  const int lane = this_thread() % kLanes, runs_w = b.run_columns.divisor;  // block_size() is a multiple of kLanes
  const int64_t c = static_cast<int64_t>(slab) * kSlab + lane * V;
  filters += lane * V;
  bias += lane * V;
#pragma unroll 1
  for (int run = this_thread() / kLanes; run < b.tile_rows * runs_w; run += block_size() / kLanes) {
    const int tile_row = quotient(run, b.run_columns), column = (run - tile_row * runs_w) * kRun;
    A acc[kRun][V];
#pragma unroll
    for (int k = 0; k < kRun; ++k) read_shared(bias, acc[k]);
    if (c >= p.channels) {
    } else if constexpr (K > 0) {
      const int base = (tile_row * args.in_columns + column) * S::kStride;
#pragma unroll
      for (int r = 0; r < K; ++r) {
        A w[K][V];
#pragma unroll
        for (int s = 0; s < K; ++s) read_shared(filters + (r * K + s) * kSlab, w[s]);
#pragma unroll
        for (int q = 0; q < (kRun - 1) * S::kStride + K; ++q) {
          A value[V];
          read_expanded<T, V>(expanded, base + r * args.in_columns + q, lane, value);
          add_filter_row<S, V>(w, q, value, acc);
        }
      }
    } else {
      const int stride_w = static_cast<int>(p.stride_w), kernel_w = static_cast<int>(p.kernel_w);
      const int base = tile_row * static_cast<int>(p.stride_h) * args.in_columns + column * stride_w;
#pragma unroll 1
      for (int r = 0; r < static_cast<int>(p.kernel_h); ++r) {
#pragma unroll 1
        for (int s = 0; s < kernel_w; ++s) {
          A tap[V];
          read_shared(filters + (r * kernel_w + s) * kSlab, tap);
          const int at = base + r * static_cast<int>(p.dilation_h) * args.in_columns + s * static_cast<int>(p.dilation_w);
#pragma unroll
          for (int k = 0; k < kRun; ++k) {
            if (column + k >= b.tile_w) continue;
            A value[V];
            read_expanded<T, V>(expanded, at + k * stride_w, lane, value);
#pragma unroll
            for (int v = 0; v < V; ++v) acc[k][v] += tap[v] * value[v];
          }
        }
      }
    }
    activate_all(p.activation, acc);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (column + k < b.tile_w) write_pixel<T, V, kRoundTf32>(slot, tile_row * b.tile_w + column + k, lane, acc[k]);
    }
  }
}

template <class T, class Tile, class S, bool kChannelsLast>
DWCONV_DEVICE void inverted_block(const InvertedResidualArgs& args) {
  using A = accumulate_t<T>;
  // Channels a thread of the depthwise stage: its sums must fit the registers beside the projection's.
  constexpr int kSlab = kSlabChannels<T>, kVectors = sizeof(T) == 2 ? 4 : 2;
  constexpr bool kRoundTf32 = Tile::kTensor && std::is_same_v<T, float>;
  const SeparableBlockArgs& b = args.block;
  const auto first = [&] {  // output channel
    int block = block_index();
    in_order(block);
    return static_cast<int64_t>(block % b.splits) * b.outputs;
  };
  // Warps beyond those that share the sums expand and convolve only.
  const auto projects = [&](const Place& mine) { return mine.column < b.warps_n * kWarpColumns; };
  int block = block_index() / b.splits;
  ImageTile at;
  at.x = block % b.tiles_w * b.tile_w;
  block /= b.tiles_w;
  at.y = block % args.tiles_h * b.tile_rows;
  at.n = block / args.tiles_h;

  // Shared memory. Addresses are made again wherever they are used, as in share(): there are no registers for them beside the
  // sums.
  const auto area = [](int32_t from) {
    in_order(from);
    return shared_memory() + from;
  };
  const auto values = [&](int32_t from) { return reinterpret_cast<A*>(area(from)); };
  const auto stage = [&](int slab) {
    const int which = slab % 2;
    stage_expansion<T>(args, slab, area(args.weights_at) + which * kSlab * args.pitch);
    stage_weights<T>(b, first(), b.outputs, slab, area(args.ring_at) + which * b.outputs * kSlabBytes);
    stage_taps<T, S>(args, slab, values(args.filters_at) + which * args.taps * kSlab);
    stage_biases<T>(args, slab, values(args.biases_at) + which * 2 * kSlab);
  };
  TileMap map = {};
  map.pixel = reinterpret_cast<int64_t*>(shared_memory());
  map_tile<kChannelsLast>(args, at, map, shared_memory() + b.pixels * 8);
  stage_input<T, kChannelsLast>(args, at, area(args.input_at));
  stage(0);
  copy_commit();
  Tile tile;
  tile.clear();
#pragma unroll 1
  for (int slab = 0; slab < b.slabs; ++slab) {
    const int which = slab % 2;
    copy_wait<0>();
    synchronize();  // this slab's weights are there, and the last slab's have been read
    if (slab + 1 < b.slabs) stage(slab + 1);
    copy_commit();
    expand_slab<T, Tile::kTensor>(args, channels_left<T>(args, slab), area(args.input_at),
                                  area(args.weights_at) + which * kSlab * args.pitch, values(args.biases_at) + which * 2 * kSlab,
                                  area(b.pixels * 8), area(args.expanded_at));
    synchronize();  // expanded; and the last slab's slot has been read
    convolve_expanded<T, S, kVectors, kRoundTf32>(args, slab, values(args.filters_at) + which * args.taps * kSlab,
                                                  values(args.biases_at) + (which * 2 + 1) * kSlab, area(args.expanded_at),
                                                  area(b.map_bytes));
    synchronize();
    const Place mine = share<Tile>(b);
    if (!projects(mine)) continue;
    const unsigned char *const slot = area(b.map_bytes), *const ring = area(args.ring_at) + which * b.outputs * kSlabBytes;
    tile.multiply(kChannelsLast ? slot : ring, mine.row, Columns<T, false>{kChannelsLast ? ring : slot, 0}, mine.column);
  }
  synchronize();  // the ring and the expanded slab become the staging area
  if (projects(share<Tile>(b))) finish_sums<T, kChannelsLast>(b, map, tile, first(), values(args.ring_at));
}

template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, kSeparableBlocks)
inverted_tensor(InvertedResidualArgs args) {
#if DWCONV_HAS_AMPERE
  inverted_block<T, TensorTile<T>, S, kChannelsLast>(args);
#endif
}
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, 1)
inverted_scalar(InvertedResidualArgs args) {
#if !DWCONV_HAS_AMPERE || !defined(__CUDA_ARCH__)
  inverted_block<T, ScalarTile<T>, S, kChannelsLast>(args);
#else
  if constexpr (sizeof(T) > 2) inverted_block<T, ScalarTile<T>, S, kChannelsLast>(args);  // older GPUs' 16-bit path
#endif
}

}  // namespace dwconv::cuda
