// Depthwise weight and bias gradient, first stage, for any filter at stride 1 and dilation 1, up to 31 x 31 and beyond, both
// layouts (the formula: depthwise_backward_weight.cuh).
//
// A block owns `slab` channels, `groups` runs of 8 taps of a filter row, and a part of the tiles. It stages the tile of
// grad_output and the input under it, halo and zero padding included. A thread holds the sums of one run of taps of its channels
// and walks the tile's rows, 8 outputs at a time: 8 values of grad_output and 15 inputs for 64 products. Threads left over share
// the rows, and more of them the columns; at the end they are added as in the other kernels.
//
// Blocks: slabs fastest, then blocks of runs, then parts. The plan guarantees: tile_w a multiple of 8; slab lanes * groups <=
// block_size(); the input's tile is as wide as the last run's taps reach, existing or not.
// Traffic: input (1 + halo) and grad_output once a block of runs.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"

namespace dwconv::cuda {

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kMostThreads, kLargeBlocks)
depthwise_backward_weight_large(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int V = kChannelsLast ? kWeightChannels : 1, kSpan = 2 * kRunTaps - 1;
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int runs_w = (kernel_w + kRunTaps - 1) / kRunTaps, runs = kernel_h * runs_w;
  int block = block_index();
  const int64_t c0 = block % slabs_of(t) * t.slab;
  block /= slabs_of(t);
  const int group_block = static_cast<int>(block % args.group_blocks);
  const int64_t part = block / args.group_blocks;
  const int slab = t.slab, channels = static_cast<int>(p.channels - c0 < slab ? p.channels - c0 : slab);
  const int lanes = slab / V, lane = thread_index() % lanes, rest = thread_index() / lanes;
  const int group = rest % args.groups, slot = rest / args.groups, slots = block_size() / (lanes * args.groups);
  // More than the tile has rows share its columns too.
  const int slots_x = most(slots / t.tile_h, 1), slots_y = slots / slots_x;
  const int slot_x = slot / slots_y, slot_y = slot - slot_x * slots_y;
  const int run = group_block * args.groups + group, r = run / runs_w, s0 = run % runs_w * kRunTaps;
  const bool active = slot < slots && run < runs && lane * V < channels;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int rows = t.tile_h + kernel_h - 1;

  // [row][column][channel] in channels_last, [plane][row][column] in NCHW: how far to the next column and row, and where a lane
  // begins.
  const int next = kChannelsLast ? slab : 1;
  const int in_line = kChannelsLast ? args.in_columns.divisor * slab : args.in_pitch;
  const int out_line = kChannelsLast ? args.out_columns.divisor * slab : args.out_pitch;
  T* const in = reinterpret_cast<T*>(shared_memory());
  T* const grad = in + (kChannelsLast ? 1 : slab) * rows * in_line;
  const T* const my_in = in + (kChannelsLast ? lane * V : lane * rows * in_line) + r * in_line + s0 * next;
  const T* const my_grad = grad + (kChannelsLast ? lane * V : lane * t.tile_h * out_line);
  A acc[kRunTaps][V] = {}, bias[V] = {};
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < end; ++tile) {
    const auto [n, y0, x0] = grad_tile(tile, t);
    const int in_y0 = y0 - static_cast<int>(p.pad_h), in_x0 = x0 - static_cast<int>(p.pad_w);
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + c0 * p.in_stride_c;
    const T* const grads = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + c0 * p.out_stride_c;
    synchronize();
    if constexpr (kChannelsLast) {
      stage_pixels(in, image, rows, in_y0, in_x0, args.in_columns, args.in_chunks, in_h, in_w, p.in_stride_h,
                   static_cast<int>(p.in_stride_w), slab, channels, t.aligned);
      stage_pixels(grad, grads, t.tile_h, y0, x0, args.out_columns, args.in_chunks, out_h, out_w, p.out_stride_h,
                   static_cast<int>(p.out_stride_w), slab, channels, t.aligned);
      copy_commit();
      copy_wait<0>();
    } else {
      stage_padded_planes(in, channels, rows, args.in_columns, in_line, in_y0, in_x0, in_h, in_w, p.in_stride_h,
                          [&](int q) { return image + q * p.in_stride_c; });
      stage_padded_planes(grad, channels, t.tile_h, args.out_columns, out_line, y0, x0, out_h, out_w, p.out_stride_h,
                          [&](int q) { return grads + q * p.out_stride_c; });
    }
    synchronize();
    if (!active || slot_x >= slots_x) continue;
    const int rows_left = least(t.tile_h, out_h - y0), columns_left = least(t.tile_w, out_w - x0);
    for (int y = slot_y; y < rows_left; y += slots_y) {
      for (int x = slot_x * kRunTaps; x < columns_left; x += slots_x * kRunTaps) {
        A window[kSpan][V];
#pragma unroll
        for (int q = 0; q < kSpan; ++q) widen<T, V>(my_in + y * in_line + (x + q) * next, window[q]);
#pragma unroll
        for (int k = 0; k < kRunTaps; ++k) {
          if (x + k >= columns_left) continue;  // 0 * NaN is no 0
          A g[V];
          widen<T, V>(my_grad + y * out_line + (x + k) * next, g);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            bias[v] += g[v];
#pragma unroll
            for (int s = 0; s < kRunTaps; ++s) acc[s][v] += g[v] * window[k + s][v];
          }
        }
      }
    }
  }

  A* const scratch = reinterpret_cast<A*>(shared_memory());
  const int who = group * lanes + lane, width = args.groups * lanes;
  const bool there = slot < slots;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    A sums[kRunTaps];
#pragma unroll
    for (int s = 0; s < kRunTaps; ++s) sums[s] = acc[s][v];
    add_slots(sums, scratch, slot, slots, who, width, there);
    if (!active || slot != 0 || lane * V + v >= channels || args.partial == nullptr) continue;
    const int64_t to = ((part * p.channels + c0 + lane * V + v) * kernel_h + r) * kernel_w + s0;
#pragma unroll
    for (int s = 0; s < kRunTaps; ++s) {
      if (s0 + s < kernel_w) store_sum<T>(args, args.partial, to + s, sums[s]);
    }
  }
  if (args.partial_bias == nullptr || group_block != 0) return;
  add_slots(bias, scratch, slot, slots, who, width, there);
  if (!active || slot != 0 || run != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (lane * V + v < channels) store_sum<T>(args, args.partial_bias, part * p.channels + c0 + lane * V + v, bias[v]);
  }
}

}  // namespace dwconv::cuda
