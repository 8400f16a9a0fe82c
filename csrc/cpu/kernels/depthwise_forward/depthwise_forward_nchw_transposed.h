// Depthwise correlation, NCHW, with channels as lanes: 4 to 16 (n, c) planes at a time are transposed into scratch as a
// channels-last image of one vector of channels, run through the channels-last kernel, and transposed back.
//
//   planes  [plane][y][x]  ->  scratch [y][x][lane]  ->  depthwise_forward_nhwc  ->  scratch  ->  [plane][y][x]
//
// A transposition of kVec x kVec costs kVec * log2(kVec) shuffles, half a cycle an element for both of them, whatever the
// width, stride and filter; with columns as lanes (depthwise_forward_nchw_rows.h) wide rows at stride 1 take less.
// Consecutive planes are lanes, across images too (the weights are packed with their channels repeated periodically past
// the end, so lane l of any group finds channel (first + l) % C).
// Tiles: `rows_per_tile` output rows of one group of planes. Traffic: input and output once, plus halo rows per tile; the
// scratch stays in L1/L2.
#pragma once

#include "cpu/kernels/cores.h"
#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/transpose.h"

namespace dwconv::DWCONV_ISA {

// Where the planes `first` to `first + lanes` of all (n, c) are: their input from row `in_row` on and their output from
// `out_row`.
template <class Args, class T>
void find_planes(const Args& args, int64_t first, int lanes, int64_t in_row, int64_t out_row, const T** from, T** to) {
  const CpuProblem& p = args.problem;
  for (int l = 0; l < lanes; ++l) {
    const int64_t n = (first + l) / p.channels, c = (first + l) % p.channels;
    from[l] = static_cast<const T*>(args.input) + n * p.in_stride_n + c * p.in_stride_c + in_row * p.in_stride_h;
    to[l] = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + out_row * p.out_stride_h;
  }
}

template <class T, int kKernel, int kStride>
void depthwise_forward_nchw_transposed(const DepthwiseArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  const int64_t planes = p.batch * p.channels;
  A* const staged = static_cast<A*>(scratch);
  const int64_t staged_plane = most_input_rows(p, args.rows_per_tile) * p.in_w * kVec;
  A* const result = staged + p.depth * staged_plane;

  DepthwiseArgs inner = args;
  CpuProblem& q = inner.problem;
  q.dtype = q.out_dtype = kDType<A>;
  q.batch = 1, q.channels = kVec;
  q.in_stride_h = p.in_w * kVec, q.in_stride_w = kVec, q.in_stride_m = staged_plane;
  q.out_stride_h = p.out_w * kVec, q.out_stride_w = kVec;
  inner.input = staged;
  inner.output = result;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t first = tile / row_tiles * kVec;
    const int64_t y = tile % row_tiles * args.rows_per_tile;
    const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
    const int lanes = lanes_left(planes - first, kVec);
    const Range in_rows = crop_input(p, y, rows, &q);
    const T* from[kVec];
    T* to[kVec];
    find_planes(args, first, lanes, in_rows.begin, y, from, to);
    for (int64_t m = 0; m < p.depth; ++m) {
      planes_to_lanes<T, A>(from, m * p.in_stride_m, lanes, q.in_h, p.in_w, p.in_stride_h, staged + m * staged_plane);
    }
    inner.rows_per_tile = rows;
    inner.weight = static_cast<const A*>(args.weight) + first % p.channels;
    inner.bias = args.bias ? static_cast<const A*>(args.bias) + first % p.channels : nullptr;
    forward_core<A, kKernel, kStride>(inner, nullptr, one_tile());
    lanes_to_planes<T, A>(result, lanes, rows, p.out_w, p.out_stride_h, p.out_stride_w, to);
  }
}

inline constexpr Layout depthwise_forward_nchw_transposed_weight_order = Layout::kNHWC;

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t depthwise_forward_nchw_transposed_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t pixels = p.depth * most_input_rows(p, rows_per_tile) * p.in_w + rows_per_tile * p.out_w;
  return pixels * kLanes<A> * static_cast<int64_t>(sizeof(A));
}

}  // namespace dwconv::DWCONV_ISA
