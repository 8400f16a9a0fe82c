// Depthwise weight and bias gradient, NCHW, with channels as lanes: a vector of planes of input and grad_output at a time is
// transposed into scratch (transpose.h) and run through the channels-last accumulation.
//
// Tiles: one (part, vector of channels): a range of the N images. Partial sums: partial[part][tap][channel].
// Traffic: grad_output and input once, plus halo rows per `rows_per_tile` output rows; the scratch stays in L1/L2.
#pragma once

#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nhwc.h"
#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_transposed.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nchw_transposed(const BackwardWeightArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  constexpr int kVec = kLanes<A>;
  const CpuProblem& p = args.problem;
  const int64_t groups = ceil_div(p.channels, kVec);
  const int64_t taps = p.kernel_h * p.kernel_w;
  A* const staged = static_cast<A*>(scratch);
  A* const staged_grad = staged + most_input_rows(p, args.rows_per_tile) * p.in_w * kVec;
  A* const sums = staged_grad + args.rows_per_tile * p.out_w * kVec;  // [taps][kVec], of whole vectors where planes are left over
  A* const bias_sums = sums + taps * kVec;
  CpuProblem q = p;
  q.channels = kVec;
  q.in_stride_h = p.in_w * kVec, q.in_stride_w = kVec;
  q.out_stride_h = p.out_w * kVec, q.out_stride_w = kVec;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t part = tile / groups;
    const int64_t c = tile % groups * kVec;
    const int lanes = lanes_left(p.channels - c, kVec);
    clear(sums, (taps + 1) * kVec);
    for (int64_t n = p.batch * part / args.parts; n < p.batch * (part + 1) / args.parts; ++n) {
      for (int64_t y = 0; y < p.out_h; y += args.rows_per_tile) {
        const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
        const Range in_rows = crop_input(p, y, rows, &q);
        const T *input[kVec], *grad[kVec];
        for (int l = 0; l < lanes; ++l) {
          input[l] =
              static_cast<const T*>(args.input) + n * p.in_stride_n + (c + l) * p.in_stride_c + in_rows.begin * p.in_stride_h;
          grad[l] = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + (c + l) * p.out_stride_c + y * p.out_stride_h;
        }
        if (args.partial != nullptr) planes_to_lanes<T, A>(input, 0, lanes, q.in_h, p.in_w, p.in_stride_h, staged);
        planes_to_lanes<T, A>(grad, 0, lanes, rows, p.out_w, p.out_stride_h, staged_grad);
        cores::accumulate_rows<A, kKernel, kStride>(q, staged, staged_grad, 0, rows, kVec, args.partial ? sums : nullptr,
                                                    args.partial_bias ? bias_sums : nullptr);
      }
    }
    const auto keep = [&](void* partial, int64_t row, const A* values) {  // row: of [parts][taps] or [parts]
      if (partial != nullptr) __builtin_memcpy(static_cast<A*>(partial) + row * p.channels + c, values, lanes * sizeof(A));
    };
    for (int64_t tap = 0; tap < taps; ++tap) keep(args.partial, part * taps + tap, sums + tap * kVec);
    keep(args.partial_bias, part, bias_sums);
  }
}

// Bytes of scratch a worker needs.
template <class T, int = 0>
int64_t depthwise_backward_weight_nchw_transposed_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using A = typename AccumulateType<T>::type;
  const int64_t vectors = most_input_rows(p, rows_per_tile) * p.in_w + rows_per_tile * p.out_w + p.kernel_h * p.kernel_w + 1;
  return vectors * kLanes<A> * static_cast<int64_t>(sizeof(A));
}

}  // namespace dwconv::DWCONV_ISA
