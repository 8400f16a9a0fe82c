// The fused inference block, and with PassThrough the pointwise convolution alone:
//
//   out[n, o, y, x] = act2(bias2[o] + sum_c w2[o, c] * act1(bias1[c] + depthwise(in)[n, c, y, x])) + residual[n, o, y, x]
//
// A block of 4 or 8 warps owns a tile of pixels, which are rows of the batch's images one below the other, so that small images
// fill a block together; and a share of the output channels, which it walks a range at a time:
//
//     input --depthwise, act1, round--> slots in shared memory      w2 --cp.async--> ring of 2 or 3 stages in shared memory
//                                              \                       /
//         each warp: 32 rows x 64 columns in registers; on sm_90a each warpgroup: 64 x 128
//                                              |
//                        shared memory, a few rows at a time --> bias2, act2, residual --> out
//
// In channels_last pixels are the rows of that product and output channels its columns, in NCHW the other way round: what is
// consecutive in the output is a row of sums.
//
// With a convolution the depthwise stage comes first, for all slabs of 128 bytes of input channels, one slot each: before the
// sums occupy the registers. Without, the slabs of pixels come with those of the weights, and as many slots as stages take turns.
//
// The plan guarantees: warps_m * warps_n == block_size() / 32; the pixels that the warps cover hold tile_rows * tile_w; a slot a
// slab, or PassThrough, a slot a stage and a single range of outputs a block; shared memory for all parts. Traffic: input (1 +
// halo) once a split, output and residual once; w2 once a block, from L2.
#pragma once

#include "cuda/kernels/channels_last_values.cuh"
#include "cuda/kernels/separable/separable_depthwise.cuh"

namespace dwconv::cuda {

constexpr int kStagingPitch = kWarpColumns + 8;  // of the staged sums, against bank conflicts
constexpr int kSeparableThreads = 256;

// A slab of the weights of `rows` output channels into a stage of the ring; zeros past the last output and input channel.
template <class T>
DWCONV_DEVICE void stage_weights(const SeparableBlockArgs& args, int64_t first, int rows, int slab, unsigned char* stage) {
  constexpr int kValues = kChunkValues<T>, kSlab = kSlabBytes / static_cast<int>(sizeof(T));
  const int64_t channels = args.problem.channels, left = args.out_channels - first;
  int thread = thread_index();
  in_order(thread);  // as in finish_pixels
  const int chunk = thread % kChunks, row0 = thread / kChunks;
  const int step = block_size() / kChunks;  // a multiple of the 8 rows of a swizzle
  const int existing = left < rows ? static_cast<int>(left) : rows;
  const int64_t c = static_cast<int64_t>(slab) * kSlab + chunk * kValues;
  const T* from = static_cast<const T*>(args.pw_weight) + (first + row0) * channels + c;
  unsigned char* to = stage + swizzled(row0, chunk);
  for (int row = row0; row < rows; row += step, from += step * channels, to += step * kSlabBytes) {
    const bool valid = row < existing && c < channels;
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

// `count` neighbouring results to out + offset, with the residual there.
template <class T, int V>
DWCONV_DEVICE void finish_values(const SeparableBlockArgs& args, int64_t offset, int count, bool whole,
                                 accumulate_t<T> (&value)[V]) {
  using A = accumulate_t<T>;
  if (args.residual != nullptr) {
    const T* const residual = static_cast<const T*>(args.residual) + offset;
    if (whole) {
      const Vector<T, V> run = load<V>(residual);
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] += to_accumulate(run.value[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] += v < count ? load_one(residual + v) : A(0);
    }
  }
  store_channels<T, V>(static_cast<T*>(args.output) + offset, value, count, whole);
}

// channels_last: kRows staged pixels from `pixel0` on, output channels from `first` on.
template <class T, int kRows>
DWCONV_DEVICE void finish_pixels(const SeparableBlockArgs& args, const TileMap& map, int pixel0, int64_t first,
                                 const accumulate_t<T>* staging) {
  using A = accumulate_t<T>;
  constexpr int V = kChunkValues<T>, kVectors = kWarpColumns / V;
  int lane = thread_index() % kWarp;
  in_order(lane);  // what depends on it is not kept in registers beside the sums from before the product
  const int o = lane % kVectors * V;
  const int64_t left = args.out_channels - first - o;
  if (left <= 0) return;
  const int count = left < V ? static_cast<int>(left) : V;
  const bool whole = args.aligned_out && count == V;
  A bias[V] = {};
  const T* const bias_run = static_cast<const T*>(args.pw_bias) + first + o;
  const bool narrow = std::is_same_v<T, A> || !args.wide_bias;
  if (args.pw_bias != nullptr && narrow && count == V && reinterpret_cast<uintptr_t>(bias_run) % kChunkBytes == 0) {
    widen(load_packed<V>(bias_run, true), bias);
  } else if (args.pw_bias != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] = v < count ? load_bias<T>(args.pw_bias, first + o + v, args.wide_bias) : A(0);
  }
#pragma unroll 1
  for (int row = lane / kVectors; row < kRows; row += kWarp / kVectors) {
    const int64_t offset = map.pixel[pixel0 + row];
    if (offset < 0) continue;
    A value[V];
    read_shared(staging + row * kStagingPitch + o, value);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] += bias[v];
    activate_all(args.activation, value);
    finish_values<T, V>(args, offset + first + o, count, whole, value);
  }
}

// NCHW: kRows staged output channels from `first` on, pixels from `pixel0` on.
template <class T, int kRows>
DWCONV_DEVICE void finish_planes(const SeparableBlockArgs& args, const TileMap& map, int pixel0, int64_t first,
                                 const accumulate_t<T>* staging) {
  using A = accumulate_t<T>;
  constexpr int V = sizeof(T) <= 4 ? 4 : 2, kVectors = kWarpColumns / V;
  const int64_t plane = args.problem.out_h * args.problem.out_w;
  int lane = thread_index() % kWarp;
  in_order(lane);
  const int pixel = pixel0 + lane % kVectors * V;
  const int64_t start = map.pixel[pixel];
  const bool together = start >= 0 && map.pixel[pixel + V - 1] == start + V - 1;
#pragma unroll 1
  for (int row = lane / kVectors; row < kRows; row += kWarp / kVectors) {
    const int64_t o = first + row;
    if (o >= args.out_channels) break;
    const A bias = args.pw_bias != nullptr ? load_bias<T>(args.pw_bias, o, args.wide_bias) : A(0);
    A value[V];
    read_shared(staging + row * kStagingPitch + lane % kVectors * V, value);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] += bias;
    activate_all(args.activation, value);
    const int64_t offset = start + o * plane;
    const T* const out = static_cast<const T*>(args.output) + offset;
    const T* const residual = args.residual != nullptr ? static_cast<const T*>(args.residual) + offset : out;
    if (together && reinterpret_cast<uintptr_t>(out) % (V * sizeof(T)) == 0 &&
        reinterpret_cast<uintptr_t>(residual) % (V * sizeof(T)) == 0) {
      finish_values<T, V>(args, offset, V, true, value);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A one[1] = {value[v]};
        const int64_t at = map.pixel[pixel + v];
        if (at >= 0) finish_values<T, 1>(args, at + o * plane, 1, true, one);
      }
    }
  }
}

// The first row and column of the part of the product that the thread's warp or warpgroup has. It is made again wherever it is
// used, as is all that depends on the thread's index: there are no registers for it beside the sums.
template <class Tile>
DWCONV_DEVICE Place share(const SeparableBlockArgs& args) {
  int thread = thread_index();
  in_order(thread);
  const int part = thread / (kWarp * Tile::kWarps), parts_m = args.warps_m * kWarpRows / Tile::kRows;
  return Place{part % parts_m * Tile::kRows, part / parts_m * Tile::kColumns};
}

// A warp's sums through its share of `staged` to the output, of the channels from `first` on.
template <class T, bool kChannelsLast, class Tile>
DWCONV_DEVICE void finish_sums(const SeparableBlockArgs& args, const TileMap& map, const Tile& tile, int64_t first,
                               accumulate_t<T>* staged) {
  constexpr int kStaged = Tile::kStagedRows;
#pragma unroll 1
  for (int part = 0; part < kWarpRows / kStaged; ++part) {
    int thread = thread_index();
    in_order(thread);
    accumulate_t<T>* const staging = staged + thread / kWarp * kStaged * kStagingPitch;
    tile.write(part, staging, kStagingPitch);
    synchronize_warp();
    const Place all = share<Tile>(args), place = Tile::place(part);
    const int row = all.row + place.row, column = all.column + place.column;
    if constexpr (kChannelsLast) {
      finish_pixels<T, kStaged>(args, map, row, first + column, staging);
    } else {
      finish_planes<T, kStaged>(args, map, column, first + row, staging);
    }
    synchronize_warp();
  }
}

template <class T, class Tile, class S, bool kChannelsLast>
DWCONV_DEVICE void separable_block(const SeparableBlockArgs& args) {
  using A = accumulate_t<T>;
  constexpr int kSlab = kSlabBytes / static_cast<int>(sizeof(T)), kStaged = Tile::kStagedRows;
  constexpr bool kRoundTf32 = Tile::kTensor && std::is_same_v<T, float>, kByDepth = !kChannelsLast && S::kConvolves;
  constexpr int kVectors = sizeof(T) < 8 ? 4 : 2;  // channels a thread of the depthwise stage: its inputs must fit the registers
  const DepthwiseProblem& p = args.problem;
  const int slabs = args.slabs, outputs = args.outputs;
  int block = block_index();
  const int split = static_cast<int>(block % args.splits);
  block /= args.splits;
  const int64_t row0 = static_cast<int64_t>(block / args.tiles_w) * args.tile_rows;

  // Shared memory: the tile's map, slots, then the ring of weights, in whose place the sums are staged, then two slabs' filters.
  TileMap map;
  map.pixel = reinterpret_cast<int64_t*>(shared_memory());
  map.source = map.pixel + args.pixels;
  map.gate = map.source + (S::kConvolves ? 0 : args.pixels);
  map.row = reinterpret_cast<TileMap::Row*>(map.gate + (S::kConvolves ? 0 : args.pixels));
  map.x0 = static_cast<int>(block % args.tiles_w) * args.tile_w;
  unsigned char* const slots = shared_memory() + args.map_bytes;
  const int pitch = args.pixels + kColumnPadding;  // NCHW
  const bool dense = !kByDepth || Tile::kLines;
  const int slot_bytes = dense ? args.pixels * kSlabBytes : kSlab * pitch * static_cast<int>(sizeof(T));
  const int stage_bytes = outputs * kSlabBytes;
  unsigned char* const ring = slots + args.slots * slot_bytes;
  const int staging_bytes = block_size() / kWarp * kStaged * kStagingPitch * static_cast<int>(sizeof(A));
  A* const filters = reinterpret_cast<A*>(ring + most(args.stages * stage_bytes, staging_bytes));
  const int filter_values = static_cast<int>(p.kernel_h * p.kernel_w) * kSlab;

  const auto produce = [&](int slab, unsigned char* slot) {
    const A* const own = filters + slab % 2 * filter_values;
    if constexpr (!S::kConvolves) {
      pass_pixels<T>(args, map, slab, slot);
    } else if constexpr (!kChannelsLast) {
      produce_planes<T, S, kRoundTf32, Tile::kLines>(args, map, slab, own, reinterpret_cast<T*>(slot), pitch);
    } else if (args.aligned_in) {
      produce_pixels<T, S, kVectors, kRoundTf32>(args, map, slab, own, slot);
    } else {
      produce_pixels<T, S, 1, kRoundTf32>(args, map, slab, own, slot);
    }
  };
  const int64_t ranges = divided(args.out_channels + outputs - 1, outputs);
  const int begin = static_cast<int>(divided(ranges * split, args.splits));
  const int end = static_cast<int>(divided(ranges * (split + 1), args.splits));
  fill_map<kChannelsLast, S::kConvolves>(args, row0, map);
  Tile tile;
  for (int range = begin; range < end; ++range) {
    const int64_t first = static_cast<int64_t>(range) * outputs;
    const bool fresh = range == begin;
    if (!S::kConvolves && fresh) synchronize();  // the map is there
    for (int stage = 0; stage < args.stages - 1; ++stage) {
      if (stage < slabs) {
        stage_weights<T>(args, first, outputs, stage, ring + stage * stage_bytes);
        if (!S::kConvolves && fresh) produce(stage, slots + stage * slot_bytes);
      }
      copy_commit();
    }
    if (S::kConvolves && fresh) {
      stage_slab_filters<T, S>(args, 0, filters);
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab) {
        synchronize();  // the map and this slab's filters are there, those of the slab before have been read
        if (slab + 1 < slabs) stage_slab_filters<T, S>(args, slab + 1, filters + (slab + 1) % 2 * filter_values);
        produce(slab, slots + slab * slot_bytes);
      }
    }
    tile.clear();
    const Place mine = share<Tile>(args);
    int now = 0;  // the stage of the slab that is multiplied
    const auto slot_of = [&](int slab, int stage) { return slots + (args.slots == slabs ? slab : stage) * slot_bytes; };
    const auto stage_ahead = [&](int slab) {
      const int stage = now > 0 ? now - 1 : args.stages - 1;  // of the slab stages - 1 ahead
      if (slab < slabs) {
        stage_weights<T>(args, first, outputs, slab, ring + stage * stage_bytes);
        if (!S::kConvolves && fresh) produce(slab, slot_of(slab, stage));
      }
      copy_commit();
    };
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      if (args.stages == 3) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      if constexpr (Tile::kLines) write_operands();
      tile.complete();
      synchronize();  // this stage and slot are complete, and those read a round ago are free
      const unsigned char* const slot = slot_of(slab, now);
      const unsigned char* const stage = ring + now * stage_bytes;
      if (!Tile::kLines) stage_ahead(slab + args.stages - 1);
      tile.multiply(kChannelsLast ? slot : stage, mine.row, Columns<T, kByDepth>{kChannelsLast ? stage : slot, pitch},
                    mine.column);
      if (Tile::kLines) stage_ahead(slab + args.stages - 1);  // while the matrix units are at work
      now = now + 1 < args.stages ? now + 1 : 0;
    }
    tile.complete();
    synchronize();  // the ring becomes the staging area
    finish_sums<T, kChannelsLast>(args, map, tile, first, reinterpret_cast<A*>(ring));
    synchronize();
  }
}

// Tensor cores: T float16 or bfloat16, or float for tf32; a warpgroup's wgmma: the 16-bit types on sm_90a. Multiply-adds: float,
// double, and the 16-bit types before sm_80.
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, kSeparableBlocks)
separable_tensor(SeparableBlockArgs args) {
#if DWCONV_HAS_AMPERE
  separable_block<T, TensorTile<T>, S, kChannelsLast>(args);
#endif
}
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, kSeparableBlocks)
separable_group(SeparableBlockArgs args) {
#if DWCONV_HAS_HOPPER
  wait_for_previous();
  separable_block<T, GroupTile<T>, S, kChannelsLast>(args);
#endif
}
template <class T, class S, bool kChannelsLast>
DWCONV_KERNEL(kSeparableThreads, 1)
separable_scalar(SeparableBlockArgs args) {
#if !DWCONV_HAS_AMPERE || !defined(__CUDA_ARCH__)
  separable_block<T, ScalarTile<T>, S, kChannelsLast>(args);
#else
  if constexpr (sizeof(T) > 2) separable_block<T, ScalarTile<T>, S, kChannelsLast>(args);  // older GPUs' 16-bit path
#endif
}

}  // namespace dwconv::cuda
