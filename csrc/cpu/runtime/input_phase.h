// The input gradient of a strided pass, one axis of one of its phases.
#pragma once

#include <numeric>

#include "cpu/runtime/pack_weights.h"

namespace dwconv {

// One phase of the input gradient along one axis: the samples a, a + stride, ... of grad_input as a stride-1 correlation of
// grad_output. With i = a + q * stride, output o reaches sample i through tap k where o * stride + k * dilation - pad = i;
// the taps that fit are first, first + step, ...; reversed, they form a filter of dilation `dilation`.
struct Phase {
  FilterSlice taps;
  int64_t dilation, pad, size;
};

inline Phase input_phase(int64_t a, int64_t in_size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  const int64_t step = stride / common;
  int64_t first = 0;
  while (first < step && first < kernel && (a + pad - first * dilation) % stride != 0) ++first;
  const int64_t count = first < step && first < kernel ? ceil_div(kernel - first, step) : 0;
  Phase phase;
  phase.taps = {first + (count - 1) * step, -step, count};
  phase.dilation = dilation / common;
  phase.pad = count > 0 ? (count - 1) * phase.dilation - (a + pad - first * dilation) / stride : 0;
  phase.size = ceil_div(in_size - a, stride);
  return phase;
}

}  // namespace dwconv
