// The fused inference block, and with no depthwise filter the activation and pointwise convolution alone:
//
//   out[n, o, y, x] = act2(bias2[o] + sum_c w2[o, c] * act1(bias1[c] + depthwise(in)[n, c, y, x])) + residual[n, o, y, x]
//
// As a matrix product: pixels are M, input channels K, output channels N. A block of 8 warps owns a tile of at most `pixels` = 32
// * warps_m pixels and walks its output channels 64 * warps_n at a time, and for each the input channels in slabs of 128 bytes:
//
//     input --depthwise, act1, round--> A slots in shared memory      w2 --cp.async--> ring of 2 or 3 stages in shared memory
//                                              \                       /
//                                     each warp: 32 pixels x 64 outputs in registers
//                                              |
//                     shared memory, 8 or 16 pixels a time --> bias2, act2, residual --> out, 16 bytes a store
//
// The depthwise result is computed once: all its slabs stay in shared memory while the outputs are walked (slots == slabs), or
// the block has one range of outputs and two slots take turns. Tiles are rows of the batch's images one below the other, so that
// small images fill a block together.
//
// The plan guarantees: warps_m * warps_n == 8; slots == slabs or a single range of outputs a block; tile_rows * tile_w <= pixels;
// shared memory for all three parts.
// Traffic: input (1 + halo) once a split, output and residual once; w2 once a block, from L2.
#pragma once

#include "activate.cuh"
#include "depthwise_large.cuh"
#include "warp_tile.cuh"

namespace dwconv::cuda {

constexpr int kRun = 4;                          // pixels of a row that a thread computes together
constexpr int kStagingPitch = kWarpOutputs + 4;  // of the staged sums, against bank conflicts
constexpr int kSeparableThreads = 256;

// The depthwise stage's filter: K x K at stride S, or any (K = 0).
template <int K, int S>
struct Stage {
  static constexpr int kKernel = K, kStride = S;
};

// The tile's first row, counted over all images, and column.
struct TilePosition {
  int64_t row0;
  int x0;
};

// V channels of `kRun` neighbouring outputs of one row, K x K taps at stride S; filters[tap * pitch + v].
template <class T, class S, int V, class Load>
DWCONV_DEVICE void depthwise_run(const DepthwiseProblem& p, int y, int x, const T* filters, int pitch,
                                 accumulate_t<T> (&acc)[kRun][V], Load load_input) {
  using A = accumulate_t<T>;
  if constexpr (S::kKernel > 0) {
    constexpr int K = S::kKernel, kSpan = (kRun - 1) * S::kStride + K;
    const int in_y = y * S::kStride - static_cast<int>(p.pad_h), in_x = x * S::kStride - static_cast<int>(p.pad_w);
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (in_y + r < 0 || in_y + r >= p.in_h) continue;
      A w[K][V];
#pragma unroll
      for (int s = 0; s < K; ++s) widen<T, V>(filters + (r * K + s) * pitch, w[s]);
#pragma unroll
      for (int q = 0; q < kSpan; ++q) {  // one input at a time: a row of them would not fit the registers beside the sums
        A value[V];
        load_input(in_y + r, in_x + q, value);
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const int i = (q - s) / S::kStride;
          if (q < s || i * S::kStride != q - s || i >= kRun) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) acc[i][v] += w[s][v] * value[v];
        }
      }
    }
  } else {
    const int kernel_w = static_cast<int>(p.kernel_w);
    for (int r = 0; r < static_cast<int>(p.kernel_h); ++r) {
      const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_h;
      if (row < 0 || row >= p.in_h) continue;
      for (int s = 0; s < kernel_w; ++s) {
        A w[V];
        widen<T, V>(filters + (r * kernel_w + s) * pitch, w);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          A value[V];
          load_input(static_cast<int>(row), (x + i) * p.stride_w + s * p.dilation_w - p.pad_w, value);
#pragma unroll
          for (int v = 0; v < V; ++v) acc[i][v] += w[v] * value[v];
        }
      }
    }
  }
}

// The depthwise stage of one slab into a slot. filters: [tap][channel of the slab] in shared memory; without a filter the
// input is passed on.
// V: channels a thread; channels_last, V > 1: runs of V channels lie on multiples of their size.
template <class T, class S, int V, bool kChannelsLast, bool kRoundTf32>
DWCONV_DEVICE void produce_slab(const SeparableBlockArgs& args, const TilePosition& at, int slab, const T* filters,
                                unsigned char* slot) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kLanes = kSlab / V;
  const DepthwiseProblem& p = args.problem;
  const int64_t channels = p.channels, rows = p.batch * p.out_h;
  const int out_w = static_cast<int>(p.out_w), runs_w = args.run_columns.divisor, runs = args.tile_rows * runs_w;
  // channels_last: lanes along the channels; NCHW: along the pixels, where its memory is contiguous.
  for (int i = thread_index(); i < runs * kLanes; i += block_size()) {
    const int run = kChannelsLast ? i / kLanes : i % runs, lane = kChannelsLast ? i % kLanes : i / runs;
    const int64_t c = static_cast<int64_t>(slab) * kSlab + lane * V;
    const int tile_row = quotient(run, args.run_columns), column = (run - tile_row * runs_w) * kRun;
    const int64_t row = at.row0 + tile_row;
    A acc[kRun][V] = {};
    if (row < rows && c < channels && at.x0 + column < out_w) {
      const int64_t n = row / p.out_h;
      const int y = static_cast<int>(row - n * p.out_h);
      const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c;
      const auto load_input = [&](int in_y, int64_t in_x, A(&to)[V]) {
        const bool inside = in_x >= 0 && in_x < p.in_w;
        const T* const from = image + in_y * p.in_stride_h + in_x * p.in_stride_w;
        if (inside) {
          const Vector<T, V> vector = load<V>(from);
#pragma unroll
          for (int v = 0; v < V; ++v) to[v] = to_accumulate(vector.value[v]);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) to[v] = A(0);
        }
      };
      if (args.dw_weight == nullptr) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) load_input(y, at.x0 + column + k, acc[k]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const bool given = args.dw_bias != nullptr && c + v < channels;
          const A bias = given ? load_one(static_cast<const T*>(args.dw_bias) + c + v) : A(0);
#pragma unroll
          for (int k = 0; k < kRun; ++k) acc[k][v] = bias;
        }
        depthwise_run<T, S, V>(p, y, at.x0 + column, filters + lane * V, kSlab, acc, load_input);
      }
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[k][v] = activate(p.activation, acc[k][v]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (column + k >= args.tile_w) continue;
      Vector<T, V> narrow;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        narrow.value[v] = from_accumulate<T>(c + v < channels ? acc[k][v] : A(0));
        if constexpr (kRoundTf32) narrow.value[v] = round_tf32(narrow.value[v]);
      }
      const int byte = lane * V * static_cast<int>(sizeof(T));
      const int pixel = tile_row * args.tile_w + column + k;
      *reinterpret_cast<Vector<T, V>*>(slot + swizzled(pixel, byte / kChunkBytes) + byte % kChunkBytes) = narrow;
    }
  }
}

// A slab of the weights of `rows` output channels into a stage of the ring; zeros past the last output and input channel.
template <class T>
DWCONV_DEVICE void stage_weights(const SeparableBlockArgs& args, int64_t first, int64_t last, int rows, int slab,
                                 unsigned char* stage) {
  constexpr int kValues = kChunkValues<T>, kSlab = kSlabBytes / static_cast<int>(sizeof(T));
  const int64_t channels = args.problem.channels;
  for (int i = thread_index(); i < rows * kChunks; i += block_size()) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t c = static_cast<int64_t>(slab) * kSlab + chunk * kValues;
    const bool valid = first + row < last && c < channels;
    const T* const from = static_cast<const T*>(args.pw_weight) + (valid ? (first + row) * channels + c : 0);
    unsigned char* const to = stage + swizzled(row, chunk);
    if (args.aligned_weight) {
      copy_async(to, from, valid);
    } else {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        reinterpret_cast<T*>(to)[v] = valid && c + v < channels ? load<1>(from + v).value[0] : zero<T>();
      }
    }
  }
}

// Bias, activation and residual of the warp's staged pixels, and the stores.
template <class T, bool kChannelsLast, int kPixels>
DWCONV_DEVICE void finish_pixels(const SeparableBlockArgs& args, const TilePosition& at, int pixel0, int64_t first, int64_t last,
                                 const accumulate_t<T>* staging) {
  using A = accumulate_t<T>;
  constexpr int V = kChannelsLast ? kChunkValues<T> : 1, kVectors = kWarpOutputs / V;
  const DepthwiseProblem& p = args.problem;
  const int64_t rows = p.batch * p.out_h;
  const int lane = thread_index() % kWarp, tile_pixels = args.tile_rows * args.tile_w;
#pragma unroll 1
  for (int i = lane; i < kPixels * kVectors; i += kWarp) {
    const int pixel = kChannelsLast ? i / kVectors : i % kPixels, o = (kChannelsLast ? i % kVectors : i / kPixels) * V;
    const int tile_row = (pixel0 + pixel) / args.tile_w, x = at.x0 + pixel0 + pixel - tile_row * args.tile_w;
    const int64_t row = at.row0 + tile_row;
    if (pixel0 + pixel >= tile_pixels || row >= rows || x >= p.out_w || first + o >= last) continue;
    const int64_t n = row / p.out_h, y = row - n * p.out_h;
    const int64_t offset = kChannelsLast ? (row * p.out_w + x) * args.out_channels + first + o
                                         : ((n * args.out_channels + first + o) * p.out_h + y) * p.out_w + x;
    const bool whole = V > 1 && args.aligned_out && first + o + V <= last;
    A value[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool given = args.pw_bias != nullptr && first + o + v < last;
      const A bias = given ? load_one(static_cast<const T*>(args.pw_bias) + first + o + v) : A(0);
      value[v] = activate(args.activation, staging[pixel * kStagingPitch + o + v] + bias);
    }
    if (args.residual != nullptr) {
      const T* const residual = static_cast<const T*>(args.residual) + offset;
      if (whole) {
        const Vector<T, V> vector = load<V>(residual);
#pragma unroll
        for (int v = 0; v < V; ++v) value[v] += to_accumulate(vector.value[v]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) value[v] += first + o + v < last ? load_one(residual + v) : A(0);
      }
    }
    const int left = static_cast<int>(last - first) - o;
    store_channels<T, V>(static_cast<T*>(args.output) + offset, value, left, whole);
  }
}

template <class T, class Tile, class S, bool kChannelsLast>
DWCONV_DEVICE void separable_block(const SeparableBlockArgs& args) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kStaged = Tile::kStagedPixels;
  constexpr bool kRoundTf32 = Tile::kTensor && std::is_same_v<T, float>;
  const DepthwiseProblem& p = args.problem;
  const int slabs = args.slabs, outputs = args.warps_n * kWarpOutputs;
  int64_t block = block_index();
  const int split = static_cast<int>(block % args.splits);
  block /= args.splits;
  const TilePosition at = {block / args.tiles_w * args.tile_rows, static_cast<int>(block % args.tiles_w) * args.tile_w};
  const int warp = thread_index() / kWarp, m0 = warp % args.warps_m * kWarpPixels, n0 = warp / args.warps_m * kWarpOutputs;

  // Shared memory: A slots, then the ring of weights, in whose place the sums are staged, then the slab's depthwise filters.
  unsigned char* const pixels = shared_memory();
  const int slot_bytes = args.pixels * kSlabBytes, stage_bytes = outputs * kSlabBytes;
  unsigned char* const ring = pixels + args.slots * slot_bytes;
  A* const staging = reinterpret_cast<A*>(ring) + warp * kStaged * kStagingPitch;
  const int staging_bytes = kSeparableThreads / kWarp * kStaged * kStagingPitch * static_cast<int>(sizeof(A));
  T* const filters = reinterpret_cast<T*>(ring + most(args.stages * stage_bytes, staging_bytes));
  const int taps = static_cast<int>(p.kernel_h * p.kernel_w);

  const int64_t ranges = (args.out_channels + outputs - 1) / outputs;
  const int64_t begin = ranges * split / args.splits, end = ranges * (split + 1) / args.splits;
  Tile tile;
  for (int64_t range = begin; range < end; ++range) {
    const int64_t first = range * outputs;
    const bool produce = range == begin;
    tile.clear();
    for (int stage = 0; stage < args.stages - 1; ++stage) {
      if (stage < slabs) stage_weights<T>(args, first, args.out_channels, outputs, stage, ring + stage * stage_bytes);
      copy_commit();
    }
    for (int slab = 0; slab < slabs; ++slab) {
      unsigned char* const slot = pixels + slab % args.slots * slot_bytes;
      if (produce) {
        if (args.dw_weight != nullptr) {
          const int64_t c = static_cast<int64_t>(slab) * kSlab;
          if (slab > 0) synchronize();  // the filters of the slab before have been read
          copy_filters(filters, static_cast<const T*>(args.dw_weight) + c * taps, taps, kSlab,
                       static_cast<int>(p.channels - c < kSlab ? p.channels - c : kSlab), false);
          synchronize();
        }
        if (kChannelsLast && args.aligned_in) {
          produce_slab<T, S, kChunkValues<T>, kChannelsLast, kRoundTf32>(args, at, slab, filters, slot);
        } else {
          produce_slab<T, S, 1, kChannelsLast, kRoundTf32>(args, at, slab, filters, slot);
        }
      }
      if (args.stages == 3) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      synchronize();  // this stage and slot are complete, and the stage read a round ago is free
      const int ahead = slab + args.stages - 1;
      if (ahead < slabs) {
        stage_weights<T>(args, first, args.out_channels, outputs, ahead, ring + ahead % args.stages * stage_bytes);
      }
      copy_commit();
      tile.multiply(slot, m0, ring + slab % args.stages * stage_bytes, n0);
    }
    synchronize();  // the ring becomes the staging area
#pragma unroll
    for (int part = 0; part < kWarpPixels / kStaged; ++part) {
      tile.write(part, staging, kStagingPitch);
      synchronize_warp();
      finish_pixels<T, kChannelsLast, kStaged>(args, at, m0 + part * kStaged, first + n0, args.out_channels, staging);
      synchronize_warp();
    }
    synchronize();
  }
}

// Tensor cores: T float16 or bfloat16, or float for tf32. Multiply-adds: float, double, and the 16-bit types before sm_80.
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, kSeparableBlocks)
separable_tensor(SeparableBlockArgs args) {
#if DWCONV_HAS_AMPERE
  separable_block<T, TensorTile<T>, S, kChannelsLast>(args);
#endif
}
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, kSeparableBlocks)
separable_scalar(SeparableBlockArgs args) {
#if !DWCONV_HAS_AMPERE || !defined(__CUDA_ARCH__)
  separable_block<T, ScalarTile<T>, S, kChannelsLast>(args);
#else
  if constexpr (sizeof(T) > 2) separable_block<T, ScalarTile<T>, S, kChannelsLast>(args);  // older cards' 16-bit path
#endif
}

}  // namespace dwconv::cuda
