// Depthwise input gradient where the forward pass strides, both layouts; and the transposed convolution, which is the same with
// bias and activation.
//
// Sample (i, j) of grad_input is reached by the taps with i + pad - r * dilation divisible by the stride; samples of one
// residue of (i, j) modulo the strides, a phase, are a stride-1 correlation of grad_output with those taps, flipped
// (csrc/cpu/ops/depthwise.cpp, input_phase). Nothing is scattered and no product with zero is taken.
//
//   grad_input  | A b A b A b |      stride 2: phases A and b of a row, from the same grad_output columns
//               | c D c D c D |
//
// All phases of a square filter of 2 to 5 at stride 2 are computed together (depthwise_backward_input_phases.h), others one by
// one. A tile is `rows_per_tile` rows of every phase, rows_per_tile * stride_h rows of grad_input, so that grad_output comes from
// L1 for all phases but the first, and grad_input's lines are complete when they leave the cache.
//   NHWC  tiles of one image; each phase is written in place with the strides' steps.
//   NCHW  tiles of a vector of planes: grad_output is transposed into scratch once, the phases are interleaved there, and
//         the result is transposed back as whole rows (transpose.h).
// Traffic: grad_output (plus halo rows) and grad_input once.
#pragma once

#include "cpu/kernels/depthwise_backward/depthwise_backward_input_phases.h"
#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_transposed.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

// One phase's rows [row, row + rows) as a forward problem on `problem`'s strides; rows past its end are dropped.
DWCONV_INLINE DepthwiseArgs phase_rows(const BackwardInputArgs& args, const CpuProblem& problem, const InputPhase& phase,
                                       int64_t row) {
  DepthwiseArgs piece;
  CpuProblem& p = piece.problem;
  p = problem;
  const int64_t left = phase.out_h - row;
  p.batch = 1;
  p.kernel_h = phase.kernel_h, p.kernel_w = phase.kernel_w;
  p.dilation_h = phase.dilation_h, p.dilation_w = phase.dilation_w;
  p.stride_h = p.stride_w = 1;
  p.pad_h = phase.pad_h - row, p.pad_w = phase.pad_w;
  p.out_h = left < args.rows_per_tile ? left : args.rows_per_tile;
  p.out_w = phase.out_w;
  p.out_stride_h = problem.out_stride_h * problem.stride_h;
  p.out_stride_w = problem.out_stride_w * problem.stride_w;
  piece.weight = phase.weight;
  piece.weight_pitch = args.weight_pitch;
  piece.rows_per_tile = args.rows_per_tile;
  return piece;
}

template <class T>
DWCONV_INLINE void run_phase(const DepthwiseArgs& piece) {
  const CpuProblem& p = piece.problem;
  if (p.out_h <= 0 || p.out_w <= 0) return;
  if constexpr (kUnrollsFilters<typename AccumulateType<T>::type>) {
    const bool square = p.kernel_h == p.kernel_w && p.dilation_h == 1 && p.dilation_w == 1;
    if (square && p.kernel_h == 3) return forward_core<T, 3, 1>(piece, nullptr, one_tile());
    if (square && p.kernel_h == 5) return forward_core<T, 5, 1>(piece, nullptr, one_tile());
  }
  forward_core<T, 0, 0>(piece, nullptr, one_tile());
}

// Rows [row, row + rows_per_tile) of every phase, one by one. `p` has the strides of input, which begins at row in_begin of
// grad_output, and of output, of p.out_dtype, which begins with the phases' rows; the weights are taken from channel `first` on.
template <class T>
void run_phases(const BackwardInputArgs& args, const CpuProblem& p, const T* input, int64_t in_begin, void* output, int64_t row,
                int64_t first) {
  using A = typename AccumulateType<T>::type;
  for (int64_t i = 0; i < args.phase_count; ++i) {
    const InputPhase& phase = args.phases[i];
    DepthwiseArgs piece = phase_rows(args, p, phase, row);
    piece.problem.pad_h += in_begin;
    piece.weight = static_cast<const A*>(phase.weight) + first;
    piece.bias = args.bias ? static_cast<const A*>(args.bias) + first : nullptr;
    piece.input = input;
    piece.output = static_cast<char*>(output) +
                   (phase.first_h * p.out_stride_h + phase.first_w * p.out_stride_w) * element_size(p.out_dtype);
    run_phase<T>(piece);
  }
}

DWCONV_INLINE int64_t phase_row_tiles(const BackwardInputArgs& args) {
  const CpuProblem& p = args.problem;
  const int64_t tile = args.rows_per_tile * p.stride_h;
  return ceil_div(p.out_h, tile);
}

// Rows of grad_output that any phase reads for its rows [row, row + rows_per_tile).
DWCONV_INLINE Range phases_input_rows(const BackwardInputArgs& args, int64_t row) {
  const CpuProblem& p = args.problem;
  Range all = {p.in_h, 0};
  for (int64_t i = 0; i < args.phase_count; ++i) {
    const InputPhase& phase = args.phases[i];
    if (phase.kernel_h == 0) continue;
    const int64_t begin = row - phase.pad_h;
    const int64_t end = begin + args.rows_per_tile - 1 + (phase.kernel_h - 1) * phase.dilation_h + 1;
    if (begin < all.begin) all.begin = begin;
    if (end > all.end) all.end = end;
  }
  if (all.begin < 0) all.begin = 0;
  if (all.end > p.in_h) all.end = p.in_h;
  if (all.begin > all.end) all.begin = all.end = 0;
  return all;
}

// A bound on their number: the phases' filters span the forward filter's reach, in steps of the stride.
static inline int64_t most_phase_input_rows(const CpuProblem& p, int64_t rows_per_tile) {
  const int64_t rows = rows_per_tile + ((p.kernel_h - 1) * p.dilation_h) / p.stride_h + 2;
  return rows < p.in_h ? rows : p.in_h;
}

template <class T>
void depthwise_backward_input_nhwc(const BackwardInputArgs& args, void*, Tiles tiles) {
  const CpuProblem& p = args.problem;
  CpuProblem near = p;
  near.prefetch_input = near.prefetch_output = false;
  const int64_t row_tiles = phase_row_tiles(args);
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t n = tile / row_tiles, row = tile % row_tiles * args.rows_per_tile;
    const T* const grad = static_cast<const T*>(args.input) + n * p.in_stride_n;
    T* const image = static_cast<T*>(args.output) + n * p.out_stride_n + row * p.stride_h * p.out_stride_h;
    SequentialRows<T>(p.prefetch_input, grad, p.in_stride_h, p.in_stride_w, p.in_w).read(phases_input_rows(args, row));
    const int64_t left = p.out_h - row * p.stride_h, rows = args.rows_per_tile * p.stride_h;
    prefetch_rows_for_write(p.prefetch_output, image, p.out_stride_h, {0, rows < left ? rows : left});
    if (!try_all_phases<T>(args, near, grad, 0, image, row, 0)) run_phases<T>(args, near, grad, 0, image, row, 0);
  }
}

template <class T>
void depthwise_backward_input_nchw_transposed(const BackwardInputArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t row_tiles = phase_row_tiles(args);
  const int64_t planes = p.batch * p.channels;
  A* const staged = static_cast<A*>(scratch);
  const int64_t staged_plane = most_phase_input_rows(p, args.rows_per_tile) * p.in_w * kVec;
  A* const result = staged + p.depth * staged_plane;
  CpuProblem q = p;
  q.dtype = q.out_dtype = kDType<A>;
  q.channels = kVec;
  q.in_stride_h = p.in_w * kVec, q.in_stride_w = kVec, q.in_stride_m = staged_plane;
  q.out_stride_h = p.out_w * kVec, q.out_stride_w = kVec;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t first = tile / row_tiles * kVec, row = tile % row_tiles * args.rows_per_tile;
    const int64_t y = row * p.stride_h;
    const int64_t rows = args.rows_per_tile * p.stride_h < p.out_h - y ? args.rows_per_tile * p.stride_h : p.out_h - y;
    const int lanes = lanes_left(planes - first, kVec);
    const Range in_rows = phases_input_rows(args, row);
    const T* from[kVec];
    T* to[kVec];
    find_planes(args, first, lanes, in_rows.begin, y, from, to);
    for (int64_t m = 0; m < p.depth; ++m) {
      planes_to_lanes<T, A>(from, m * p.in_stride_m, lanes, in_rows.end - in_rows.begin, p.in_w, p.in_stride_h,
                            staged + m * staged_plane);
    }
    q.in_h = in_rows.end - in_rows.begin;
    if (!try_all_phases<A>(args, q, staged, in_rows.begin, result, row, first % p.channels)) {
      run_phases<A>(args, q, staged, in_rows.begin, result, row, first % p.channels);
    }
    lanes_to_planes<T, A>(result, lanes, rows, p.out_w, p.out_stride_h, p.out_stride_w, to);
  }
}

template <class T, int = 0>
int64_t depthwise_backward_input_nhwc_scratch(const CpuProblem&, int64_t) {
  return 0;
}

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t depthwise_backward_input_nchw_transposed_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t rows = rows_per_tile * p.stride_h < p.out_h ? rows_per_tile * p.stride_h : p.out_h;
  const int64_t pixels = p.depth * most_phase_input_rows(p, rows_per_tile) * p.in_w + rows * p.out_w;
  return pixels * kLanes<A> * static_cast<int64_t>(sizeof(A));
}

}  // namespace dwconv::DWCONV_ISA
