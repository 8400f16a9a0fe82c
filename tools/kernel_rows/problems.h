// Small problems, and the call of a kernel as the ops make it, on one thread and scratch that begins as NaN.
#pragma once

#include "cpu/kernels/tiles.h"
#include "cpu/runtime/cpu_features.h"
#include "cpu/runtime/pack_weights.h"
#include "values.h"

namespace dwconv {
namespace {

struct Shape {
  int64_t batch, channels, h, w, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
};

// Strides of dense tensors.
void set_strides(CpuProblem* p) {
  const bool last = p->layout == Layout::kNHWC;
  p->in_stride_w = last ? p->channels : 1, p->in_stride_h = p->in_w * p->in_stride_w;
  p->in_stride_c = last ? 1 : p->in_h * p->in_w, p->in_stride_n = p->channels * p->in_h * p->in_w;
  p->out_stride_w = last ? p->channels : 1, p->out_stride_h = p->out_w * p->out_stride_w;
  p->out_stride_c = last ? 1 : p->out_h * p->out_w, p->out_stride_n = p->channels * p->out_h * p->out_w;
}

CpuProblem problem_of(const Shape& s, DType dtype, Layout layout) {
  CpuProblem p;
  p.dtype = p.out_dtype = dtype;
  p.layout = layout;
  p.batch = s.batch, p.channels = s.channels, p.in_h = s.h, p.in_w = s.w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w, p.pad_h = s.pad_h, p.pad_w = s.pad_w;
  p.out_h = (s.h + 2 * s.pad_h - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
  p.out_w = (s.w + 2 * s.pad_w - (s.kernel_w - 1) * s.dilation_w - 1) / s.stride_w + 1;
  p.l1_ways = machine(1).l1_ways();
  set_strides(&p);
  return p;
}

// A row's filter and stride, or others where it takes any; channels, columns and paddings that leave parts of vectors.
std::vector<Shape> shapes_for(const KernelRow& row) {
  const int64_t k = row.filter ? row.filter : 3, s = row.stride ? row.stride : 1, half = k / 2;
  std::vector<Shape> shapes = {
      {2, 35, 9, 19, k, k, s, s, 1, 1, half, half}, {1, 8, 12, 37, k, k, s, s, 1, 1, half, half},
      {1, 3, k, k, k, k, s, s, 1, 1, 0, 0},         {2, 16, 7, 8, k, k, s, s, 1, 1, k - 1, k - 1},
      {1, 1, 8, 65, k, k, s, s, 1, 1, half, 0},     {1, 64, 10, 9, k, k, s, s, 1, 1, half, half},
  };
  if (row.stride == 0)
    shapes.push_back({2, 6, 11, 23, k, k, 2, 3, 1, 1, 1, 2}), shapes.push_back({1, 40, 9, 14, k, k, 2, 2, 1, 1, half, half});
  if (row.filter == 0) {
    shapes.push_back({2, 13, 13, 21, 2, 5, s, s, 1, 1, 0, 3});
    shapes.push_back({1, 20, 17, 17, 3, 4, s, s, 2, 3, 2, 4});
    shapes.push_back({1, 5, 9, 30, 1, 11, s, s, 1, 1, 0, 5});
  }
  if (row.filter == 0 && row.stride == 0) shapes.push_back({1, 12, 15, 22, 5, 5, 2, 2, 1, 1, 2, 2});
  return shapes;
}

template <class Body>  // body(scratch, tiles)
void run(const Plan& plan, Body body) {
  const Memory scratch(round_up(plan.scratch_bytes, 128));
  TileShare share = {0, plan.tiles};
  Tiles tiles;
  tiles.shares = &share;
  tiles.count = 1;
  body(scratch.data(), tiles);
}

void set_prefetch(const Plan& plan, CpuProblem* p) {
  p->prefetch_input = plan.prefetch_input, p->prefetch_output = plan.prefetch_output;
  p->prefetch_next_output = plan.prefetch_next_output;
}

// body(input offset, tap) for each tap that output (n, c, y, x) meets.
template <class Body>
void for_taps(const CpuProblem& p, int64_t n, int64_t c, int64_t y, int64_t x, Body body) {
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t in_y = y * p.stride_h + r * p.dilation_h - p.pad_h, in_x = x * p.stride_w + s * p.dilation_w - p.pad_w;
      if (in_y < 0 || in_y >= p.in_h || in_x < 0 || in_x >= p.in_w) continue;
      body(n * p.in_stride_n + c * p.in_stride_c + in_y * p.in_stride_h + in_x * p.in_stride_w, r * p.kernel_w + s);
    }
  }
}

// body(output offset, n, c, y, x)
template <class Body>
void for_outputs(const CpuProblem& p, Body body) {
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t y = 0; y < p.out_h; ++y) {
        for (int64_t x = 0; x < p.out_w; ++x) {
          body(n * p.out_stride_n + c * p.out_stride_c + y * p.out_stride_h + x * p.out_stride_w, n, c, y, x);
        }
      }
    }
  }
}

int64_t outputs_of(const CpuProblem& p) { return p.batch * p.channels * p.out_h * p.out_w; }
int64_t inputs_of(const CpuProblem& p) { return p.batch * p.channels * p.in_h * p.in_w; }

// The depthwise convolution before its activation; bias: of the problem's dtype.
std::vector<Sum> correlation(const CpuProblem& p, const Input& x, const Input& weight, const Input& bias) {
  std::vector<Sum> sums(outputs_of(p));
  for_outputs(p, [&](int64_t at, int64_t n, int64_t c, int64_t y, int64_t column) {
    sums[at].add(bias[c], 1);
    for_taps(p, n, c, y, column,
             [&](int64_t from, int64_t tap) { sums[at].add(x[from], weight[c * p.kernel_h * p.kernel_w + tap]); });
  });
  return sums;
}

// Values and bounds of activated sums.
std::pair<Values, Values> expected(const std::vector<Sum>& sums, const Activation& activation, DType dtype) {
  std::pair<Values, Values> all;
  const bool plain = activation.kind == ActivationKind::kIdentity;
  for (const Sum& sum : sums) {
    const double bound = sum.bound(dtype);
    all.first.push_back(activated(sum.value, activation));
    all.second.push_back(plain ? bound : activated_bound(sum.value, bound, dtype));
  }
  return all;
}

}  // namespace
}  // namespace dwconv
