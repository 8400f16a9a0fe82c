// The inverted residual in one kernel (Sandler et al., arXiv:1801.04381), for inference:
//
//   out = bias2 + sum_h w2[o, h] * act1(bias1[h] + depthwise(expanded)[h]), act2, + residual
//   expanded[h] = act0(bias0[h] + sum_c w0[h, c] * in[c]), and zeros around the image
//
// A block of 4 or 8 warps owns a tile of one image's output and a range of output channels. The input pixels that the tile reads,
// all their channels, stay in shared memory; hidden channels pass through it a slab (128 bytes) at a time:
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

// The expansion's weights and biases of a slab; zeros past the last hidden and input channel.
template <class T>
DWCONV_DEVICE void stage_expansion(const InvertedResidualArgs& args, int slab, unsigned char* weights, accumulate_t<T>* bias) {
  constexpr int kValues = kChunkValues<T>, kSlab = kSlabChannels<T>;
  const int64_t channel0 = static_cast<int64_t>(slab) * kSlab, hidden = args.block.problem.channels - channel0;
  const T* const first = static_cast<const T*>(args.expand_weight) + channel0 * args.in_channels;
  for (int i = thread_index(); i < kSlab * args.chunks.divisor; i += block_size()) {
    const int row = quotient(i, args.chunks), chunk = i - row * args.chunks.divisor;
    const int64_t left = args.in_channels - chunk * kValues;
    const bool valid = row < hidden && left > 0;
    const T* const from = first + (valid ? row * args.in_channels + chunk * kValues : 0);
    unsigned char* const to = weights + row * args.pitch + chunk * kChunkBytes;
    if (args.aligned_expand) {
      copy_async(to, from, valid);
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        reinterpret_cast<T*>(to)[v] = valid && v < left ? load<1>(from + v).value[0] : zero<T>();
      }
    }
  }
  const accumulate_t<T>* const biases = static_cast<const accumulate_t<T>*>(args.expand_bias) + channel0;
  for (int i = thread_index(); i < kSlab; i += block_size()) bias[i] = i < hidden ? load_one(biases + i) : accumulate_t<T>(0);
}

// V channels of an expanded pixel.
template <class T, int V>
DWCONV_DEVICE void read_expanded(const unsigned char* expanded, int pixel, int lane, accumulate_t<T> (&to)[V]) {
  const int byte = lane * V * static_cast<int>(sizeof(T));
  widen(*reinterpret_cast<const Packed<T, V>*>(expanded + swizzled(pixel, byte / kChunkBytes) + byte % kChunkBytes), to);
}

// The depthwise stage: a thread makes V channels of kRun neighbouring pixels, and keeps its channels' filters where they are
// small. Of a run that the tile cuts off it reads pixels that are there, and writes none.
template <class T, class S, int V, bool kRoundTf32>
DWCONV_DEVICE void convolve_expanded(const InvertedResidualArgs& args, int slab, const accumulate_t<T>* filters,
                                     const unsigned char* expanded, unsigned char* slot) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabChannels<T>, kLanes = kSlab / V, K = S::kKernel;
  const SeparableBlockArgs& b = args.block;
  const DepthwiseProblem& p = b.problem;
  const int lane = thread_index() % kLanes, runs_w = b.run_columns.divisor;  // block_size() is a multiple of kLanes
  const int64_t c = static_cast<int64_t>(slab) * kSlab + lane * V;
  filters += lane * V;
  A bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = c + v < p.channels ? load_bias<T>(b.dw_bias, c + v, b.wide_bias) : A(0);
  A w[K > 0 ? K : 1][K > 0 ? K : 1][V];
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) read_shared(filters + tap * kSlab, w[tap / K][tap % K]);
#pragma unroll 1
  for (int run = thread_index() / kLanes; run < b.tile_rows * runs_w; run += block_size() / kLanes) {
    const int tile_row = quotient(run, b.run_columns), column = (run - tile_row * runs_w) * kRun;
    A acc[kRun][V];
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) acc[k][v] = bias[v];
    }
    if constexpr (K > 0) {
      const int base = (tile_row * args.in_columns + column) * S::kStride;
#pragma unroll
      for (int r = 0; r < K; ++r) {
#pragma unroll
        for (int q = 0; q < (kRun - 1) * S::kStride + K; ++q) {
          A value[V];
          read_expanded<T, V>(expanded, base + r * args.in_columns + q, lane, value);
          add_filter_row<S, V>(w[r], q, value, acc);
        }
      }
    } else {
      const int stride_w = static_cast<int>(p.stride_w), kernel_w = static_cast<int>(p.kernel_w);
      const int base = tile_row * static_cast<int>(p.stride_h) * args.in_columns + column * stride_w;
      for (int r = 0; r < static_cast<int>(p.kernel_h); ++r) {
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
  constexpr int kSlab = kSlabChannels<T>, kVectors = sizeof(T) < 8 ? 4 : 2;
  constexpr bool kRoundTf32 = Tile::kTensor && std::is_same_v<T, float>;
  const SeparableBlockArgs& b = args.block;
  int block = block_index();
  const int64_t first = static_cast<int64_t>(block % b.splits) * b.outputs;
  block /= b.splits;
  ImageTile at;
  at.x = block % b.tiles_w * b.tile_w;
  block /= b.tiles_w;
  at.y = block % args.tiles_h * b.tile_rows;
  at.n = block / args.tiles_h;

  // Shared memory: the map, then what is swizzled, on multiples of 1024 bytes: slot, two slabs of w2, expanded slab; then input,
  // two slabs of w0, filters and biases of two slabs. The sums are staged where w2 and the expanded slab were.
  TileMap map = {};
  map.pixel = reinterpret_cast<int64_t*>(shared_memory());
  unsigned char* const inside = shared_memory() + b.pixels * 8;
  unsigned char* const slot = shared_memory() + b.map_bytes;
  unsigned char* const ring = slot + b.pixels * kSlabBytes;
  unsigned char* const expanded = ring + 2 * b.outputs * kSlabBytes;
  const int staging_bytes = block_size() / kWarp * Tile::kStagedRows * kStagingPitch * static_cast<int>(sizeof(A));
  unsigned char* const input = ring + most((2 * b.outputs + args.in_pixels) * kSlabBytes, staging_bytes);
  unsigned char* const weights = input + args.in_pixels * args.pitch;
  A* const filters = reinterpret_cast<A*>(weights + 2 * kSlab * args.pitch);
  const int filter_values = static_cast<int>(b.problem.kernel_h * b.problem.kernel_w) * kSlab;
  A* const biases = filters + 2 * filter_values;

  const auto stage = [&](int slab) {
    const int which = slab % 2;
    stage_expansion<T>(args, slab, weights + which * kSlab * args.pitch, biases + which * kSlab);
    stage_weights<T>(b, first, b.outputs, slab, ring + which * b.outputs * kSlabBytes);
    stage_slab_filters<T, S>(b, slab, filters + which * filter_values);
  };
  map_tile<kChannelsLast>(args, at, map, inside);
  stage_input<T, kChannelsLast>(args, at, input);
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
    expand_slab<T, Tile::kTensor>(args, input, weights + which * kSlab * args.pitch, biases + which * kSlab, inside, expanded);
    synchronize();  // expanded; and the last slab's slot has been read
    convolve_expanded<T, S, kVectors, kRoundTf32>(args, slab, filters + which * filter_values, expanded, slot);
    synchronize();
    const Place mine = share<Tile>(b);
    const unsigned char* const stage_of = ring + which * b.outputs * kSlabBytes;
    tile.multiply(kChannelsLast ? slot : stage_of, mine.row, Columns<T, false>{kChannelsLast ? stage_of : slot, 0}, mine.column);
  }
  synchronize();  // the ring and the expanded slab become the staging area
  finish_sums<T, kChannelsLast>(b, map, tile, first, reinterpret_cast<A*>(ring));
}

template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, 1)
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
