// What the depthwise convolution's passes share on the CPU: plans of forward problems, and channels with several filters.
#pragma once

#include "cpu/ops/launch.h"
#include "cpu/plan/long_row.h"
#include "cpu/runtime/pack_weights.h"

namespace dwconv {
namespace {

// With a channel multiplier M, output channel c * M + m is the depthwise convolution number m of input channel c. In NCHW
// each m is a problem of its own over a view of the output's planes. In channels_last, whose kernels want unit channel
// stride, the input's channels are repeated M times instead, and there is no multiplier any more; but for the input
// gradient, whose sum over m is taken in the accumulation type: there the m are copied apart.

// The same convolution over repeated channels.
inline ConvolutionShape without_multiplier(ConvolutionShape s) {
  s.channels *= s.multiplier;
  s.multiplier = 1;
  return s;
}

inline DepthwisePacking packing_for(const ConvolutionShape& s, const Plan& plan, FilterSlice rows, FilterSlice columns) {
  return {s.channels, s.multiplier, s.kernel_h, s.kernel_w, rows, columns, plan.row->weight_order, plan.weight_pitch};
}

// repeats: how often each channel is repeated; row: as plan_for's.
inline const Plan& forward_plan(const CpuProblem& p, int64_t repeats = 1, const ForcedRow& row = {}) {
  const auto make = [&](const IsaKernels& isa, const Machine& here) {
    return repeats > 1 ? plan_forward_repeated(p, repeats, isa, here) : plan_forward(p, isa, here);
  };
  return plan_for<Plan>(Op::kDepthwise, Pass::kForward, p, repeats, make, row);
}

template <class Bits>
void repeat_values(const void* from, int64_t count, int64_t multiplier, void* to) {
  const Bits* const source = static_cast<const Bits*>(from);
  Bits* target = static_cast<Bits*>(to);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t m = 0; m < multiplier; ++m) *target++ = source[i];
  }
}

// Rows [begin, end) of one channels_last image, strides in elements, with every channel `multiplier` times, to a dense piece.
struct RepeatedRows {
  const char* image;
  int64_t stride_h, stride_w, width, channels, multiplier, unit;
  void write(int64_t begin, int64_t end, char* to) const {
    const auto repeat = unit == 2 ? &repeat_values<uint16_t> : unit == 4 ? &repeat_values<uint32_t> : &repeat_values<uint64_t>;
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t x = 0; x < width; ++x, to += channels * multiplier * unit) {
        repeat(image + (y * stride_h + x * stride_w) * unit, channels, multiplier, to);
      }
    }
  }
};

inline RepeatedRows repeated_rows(const Tensor& x, int64_t n, int64_t multiplier) {
  const int64_t unit = x.element_size();
  const char* const image = static_cast<const char*>(x.const_data_ptr()) + n * x.stride(0) * unit;
  return {image, x.stride(2), x.stride(3), x.size(3), x.size(1), multiplier, unit};
}

}  // namespace
}  // namespace dwconv
