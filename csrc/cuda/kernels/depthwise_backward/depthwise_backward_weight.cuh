// Depthwise weight and bias gradient, first stage, for square filters of 3, 5 and 7, both layouts:
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad[n, c, y, x] * in[n, c, y*S + r - P_h, x*S + s - P_w]      grad_bias[c] = sum grad
//
// A block owns `slab` channels and a part of the tiles (n, tile of rows and columns) of grad_output. For each it stages the tile
// of grad_output and the input under it as the forward kernels do; a thread holds the K * K sums of its channels in registers,
// walks its patches, and at the end the threads of a channel are added pairwise through shared memory, always in the same order:
// no atomics, the same bits each time. Several parts are added by sum_parts. Sums are short: a thread's patches, then a tree over
// the threads, then over the parts.
//
// The plan guarantees: tile sides multiples of the patch's; NCHW: slab * patches <= block_size(); shared memory for both tiles
// and for kKernel values a thread and channel. Traffic: input (1 + halo) and grad_output once.
#pragma once

#include "cuda/kernels/depthwise_forward/depthwise_nchw.cuh"
#include "cuda/kernels/depthwise_forward/depthwise_nhwc.cuh"

namespace dwconv::cuda {

constexpr int kWeightChannels = 2;  // channels_last, a thread

// acc[r][s][v] += grad[i][x][v] * row j of the input, for the outputs that exist.
template <class Taps, int kRows, int kColumns, int V, class A>
DWCONV_DEVICE void correlate_row(int j, const A (&row)[Taps::span(kColumns)][V], const A (&grad)[kRows][kColumns][V], int rows,
                                 int columns, A (&acc)[Taps::kKernel][Taps::kKernel][V]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = Taps::tap(i, j);
    if (r < 0 || i >= rows) continue;
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      if (x >= columns) continue;  // 0 * NaN is no 0: outputs that do not exist are left out
#pragma unroll
      for (int s = 0; s < Taps::kKernel; ++s) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][s][v] += grad[i][x][v] * row[x * Taps::kStride + s][v];
      }
    }
  }
}

// A tile of grad_output: its image, and its first row and column.
struct GradTile {
  int64_t n;
  int y0, x0;
};
DWCONV_DEVICE GradTile grad_tile(int64_t tile, const Tiling& t) {
  const int64_t line = divided(tile, t.tiles_w), n = divided(line, t.tiles_h);
  return {n, static_cast<int>(line - n * t.tiles_h) * t.tile_h, static_cast<int>(tile - line * t.tiles_w) * t.tile_w};
}

// Adds value[k] of the `slots` threads that share a `who` pairwise; slot 0 holds the sum. Every thread of the block calls it.
// scratch: kCount * slots * width values.
template <int kCount, class A>
DWCONV_DEVICE void add_slots(A (&value)[kCount], A* scratch, int slot, int slots, int who, int width, bool active) {
  synchronize();
  A* const mine = scratch + (slot * width + who) * kCount;
  if (active) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) mine[k] = value[k];
  }
  for (int left = slots; left > 1;) {
    const int half = (left + 1) / 2;
    synchronize();
    if (active && slot + half < left) {
      const A* const other = mine + half * width * kCount;
#pragma unroll
      for (int k = 0; k < kCount; ++k) mine[k] += other[k];
    }
    left = half;
  }
  if (active && slot == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value[k] = mine[k];
  }
}

// A part's sum, or, of a single part, the gradient.
template <class T>
DWCONV_DEVICE void store_sum(const BackwardWeightTileArgs& args, void* to, int64_t at, accumulate_t<T> sum) {
  if (args.parts == 1) {
    store(static_cast<T*>(to) + at, Vector<T, 1>{{from_accumulate<T>(sum)}});
  } else {
    store(static_cast<accumulate_t<T>*>(to) + at, Vector<accumulate_t<T>, 1>{{sum}});
  }
}

// Adds the block's sums and writes the part's.
template <class T, int K, int V, class A>
DWCONV_DEVICE void finish_part(const BackwardWeightTileArgs& args, A (&acc)[K][K][V], A (&bias)[V], A* scratch, int64_t part,
                               int64_t channel, int slot, int slots, int lane, int lanes, bool active) {
  const int64_t channels = args.problem.channels;
  // The filter's rows take turns in acc[0], so that this code is there once and not K times.
#pragma unroll 1
  for (int r = 0; r < K; ++r) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A row[K];
#pragma unroll
      for (int s = 0; s < K; ++s) row[s] = acc[0][s][v];
      add_slots(row, scratch, slot, slots, lane, lanes, active);
      if (!active || slot != 0 || channel + v >= channels || args.partial == nullptr) continue;
#pragma unroll
      for (int s = 0; s < K; ++s) store_sum<T>(args, args.partial, ((part * channels + channel + v) * K + r) * K + s, row[s]);
    }
#pragma unroll
    for (int i = 0; i < (K - 1) * K * V; ++i) acc[i / (K * V)][i / V % K][i % V] = acc[i / (K * V) + 1][i / V % K][i % V];
  }
  if (args.partial_bias == nullptr) return;
  add_slots(bias, scratch, slot, slots, lane, lanes, active);
  if (!active || slot != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (channel + v < channels) store_sum<T>(args, args.partial_bias, part * channels + channel + v, bias[v]);
  }
}

template <class T, class Taps>
DWCONV_KERNEL(kMostThreads, weight_blocks(Taps::kKernel))
depthwise_backward_weight_nhwc(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, V = kWeightChannels, kRows = 2, kColumns = 4, kSpan = Taps::span(kColumns);
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t c0 = block_index() % slabs_of(t) * t.slab, part = block_index() / slabs_of(t);
  const int slab = t.slab, channels = static_cast<int>(p.channels - c0 < slab ? p.channels - c0 : slab);
  const int lanes = slab / V, lane = thread_index() % lanes, slot = thread_index() / lanes, slots = block_size() / lanes;
  const int columns = args.in_columns.divisor, out_columns = args.out_columns.divisor;
  const int patches_w = t.tile_w / kColumns, patches = patches_w * (t.tile_h / kRows);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);

  T* const in = reinterpret_cast<T*>(shared_memory());
  T* const grad = in + Taps::span(t.tile_h) * columns * slab;
  A acc[K][K][V] = {}, bias[V] = {};
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < end; ++tile) {
    const auto [n, y0, x0] = grad_tile(tile, t);
    synchronize();
    stage_pixels(in, static_cast<const T*>(args.input) + n * p.in_stride_n + c0, Taps::span(t.tile_h),
                 y0 * Taps::kStride - static_cast<int>(p.pad_h), x0 * Taps::kStride - static_cast<int>(p.pad_w), args.in_columns,
                 args.in_chunks, in_h, in_w, p.in_stride_h, static_cast<int>(p.in_stride_w), slab, channels, t.aligned);
    stage_pixels(grad, static_cast<const T*>(args.grad_output) + n * p.out_stride_n + c0, t.tile_h, y0, x0, args.out_columns,
                 args.in_chunks, out_h, out_w, p.out_stride_h, static_cast<int>(p.out_stride_w), slab, channels, t.aligned);
    copy_commit();
    copy_wait<0>();
    synchronize();
    for (int patch = slot; patch < patches; patch += slots) {
      const int patch_row = patch / patches_w;
      const int y = patch_row * kRows, x = (patch - patch_row * patches_w) * kColumns;
      const int rows_left = out_h - y0 - y, columns_left = out_w - x0 - x;
      if (rows_left <= 0 || columns_left <= 0) continue;
      A g[kRows][kColumns][V];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          widen<T, V>(grad + ((y + i) * out_columns + x + k) * slab + lane * V, g[i][k]);
#pragma unroll
          for (int v = 0; v < V; ++v) bias[v] += g[i][k][v];
        }
      }
      const T* const from = in + (y * Taps::kStride * columns + x * Taps::kStride) * slab + lane * V;
#pragma unroll
      for (int j = 0; j < Taps::span(kRows); ++j) {
        A row[kSpan][V];
#pragma unroll
        for (int q = 0; q < kSpan; ++q) widen<T, V>(from + (j * columns + q) * slab, row[q]);
        correlate_row<Taps, kRows, kColumns, V>(j, row, g, rows_left, columns_left, acc);
      }
    }
  }
  finish_part<T, K, V>(args, acc, bias, reinterpret_cast<A*>(shared_memory()), part, c0 + lane * V, slot, slots, lane, lanes,
                       true);
}

template <class T, class Taps>
DWCONV_KERNEL(kMostThreads, weight_blocks(Taps::kKernel))
depthwise_backward_weight_nchw(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  constexpr int K = Taps::kKernel, kRows = kPlanePatchRows, kColumns = kPlanePatchColumns, kSpan = Taps::span(kColumns);
  const DepthwiseProblem& p = args.problem;
  const Tiling& t = args.tiling;
  const int64_t c0 = block_index() % slabs_of(t) * t.slab, part = block_index() / slabs_of(t);
  const int planes = static_cast<int>(p.channels - c0 < t.slab ? p.channels - c0 : t.slab);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int patches_w = t.tile_w / kColumns, patches = patches_w * (t.tile_h / kRows);
  const int q = thread_index() / patches, patch = thread_index() - q * patches;
  const int y = patch / patches_w * kRows, x = patch % patches_w * kColumns;

  T* const shared = reinterpret_cast<T*>(shared_memory());
  A acc[K][K][1] = {}, bias[1] = {};
  const int64_t end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = divided(args.tiles * part, args.parts); tile < end; ++tile) {
    const auto [n, y0, x0] = grad_tile(tile, t);
    const int in_y0 = y0 * Taps::kStride - static_cast<int>(p.pad_h), in_x0 = x0 * Taps::kStride - static_cast<int>(p.pad_w);
    const int in_top = most(in_y0, 0), in_left = args.in_whole ? 0 : most(in_x0, 0);
    const int in_bottom = least(in_y0 + Taps::span(t.tile_h), in_h), in_right = least(in_x0 + Taps::span(t.tile_w), in_w);
    const PlaneTile<T> in = {shared,
                             args.in_pitch,
                             args.in_whole != 0,
                             most(in_bottom - in_top, 0),
                             args.in_whole ? in_w : most(in_right - in_left, 0),
                             p.in_stride_h};
    const int in_segments = t.slab * (args.in_whole ? 1 : Taps::span(t.tile_h));
    const PlaneTile<T> grad = {shared + in_segments * args.in_pitch,
                               args.out_pitch,
                               args.out_whole != 0,
                               least(t.tile_h, out_h - y0),
                               args.out_whole ? out_w : least(t.tile_w, out_w - x0),
                               p.out_stride_h};
    const auto in_first = [&](int k) {
      return static_cast<const T*>(args.input) + n * p.in_stride_n + (c0 + k) * p.in_stride_c + in_top * p.in_stride_h + in_left;
    };
    const auto grad_first = [&](int k) {
      return static_cast<const T*>(args.grad_output) + n * p.out_stride_n + (c0 + k) * p.out_stride_c + y0 * p.out_stride_h + x0;
    };
    synchronize();
    if (in.rows > 0 && in.columns > 0) {
      const int64_t before = in_top * p.in_stride_h + in_left;
      stage_planes(in, planes, before, (in_h - 1) * p.in_stride_h + in_w - before, args.in_chunks, in_first);
    }
    const int64_t before = y0 * p.out_stride_h + x0;
    stage_planes(grad, planes, before, (out_h - 1) * p.out_stride_h + out_w - before, args.out_chunks, grad_first);
    copy_commit();
    copy_wait<0>();
    synchronize();
    const int rows_left = out_h - y0 - y, columns_left = out_w - x0 - x;
    if (q >= planes || rows_left <= 0 || columns_left <= 0) continue;
    A g[kRows][kColumns][1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* const row = grad.row(q, y + i, grad_first(q)) + x;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        g[i][k][0] = i < rows_left && k < columns_left ? to_accumulate(row[k]) : A(0);
        bias[0] += g[i][k][0];
      }
    }
    const T* const first = in_first(q);
#pragma unroll
    for (int j = 0; j < Taps::span(kRows); ++j) {
      const int row = in_y0 + y * Taps::kStride + j;
      if (row < in_top || row >= in_bottom) continue;
      A values[kSpan][1];
      load_row<kSpan>(in.row(q, row - in_top, first), in_x0 + x * Taps::kStride - in_left, in.columns, values);
      correlate_row<Taps, kRows, kColumns, 1>(j, values, g, rows_left, columns_left, acc);
    }
  }
  finish_part<T, K, 1>(args, acc, bias, reinterpret_cast<A*>(shared_memory()), part, c0 + q, patch, patches, q, t.slab,
                       q < planes);
}

}  // namespace dwconv::cuda
