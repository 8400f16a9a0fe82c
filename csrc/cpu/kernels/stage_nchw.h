// NCHW staging: rows of one (n, c) plane copied into scratch in the accumulation type, padded, and with rows and columns
// split by their phase of the stride, so that every kernel behind it reads contiguous vectors and never tests an edge.
//
//   padded row j (j = 0 is input row y0*stride_h - pad_h) goes to phase j % stride_h, row j / stride_h; columns alike:
//   scratch[phase_h][phase_w][row][column], each row `pitch` long, each phase pair `phase_size` elements.
//
// Then output (y, x) reads tap (r, s) at tap_offset(r, s) + y * pitch + x: a stride-1 correlation whatever the stride and
// dilation were. Cost: each input element is written and read once more, in L1 or L2.
#pragma once

#include "../../problem.h"
#include "../tiles.h"
#include "simd.h"

namespace dwconv::DWCONV_ISA {

struct Staging {
  int64_t pitch;       // elements a row
  int64_t rows;        // rows a phase
  int64_t phase_size;  // elements a phase pair, slack for whole-vector reads included
  int64_t size;        // elements of one staged plane
};

// `slack_rows` rows past the last may be read (never used) by kernels that compute several rows at a time.
static inline Staging staging_of(const DepthwiseProblem& p, int64_t out_rows, int64_t slack_rows, int64_t vec) {
  Staging s;
  const int64_t padded_w = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t padded_h = (out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  s.pitch = padded_w > 0 ? (padded_w + p.stride_w - 1) / p.stride_w : 1;
  s.rows = padded_h > 0 ? (padded_h + p.stride_h - 1) / p.stride_h : 1;
  if (s.pitch < p.out_w) s.pitch = p.out_w;
  if (s.rows < out_rows) s.rows = out_rows;
  s.phase_size = (s.rows + slack_rows) * s.pitch + 2 * vec;  // a register tile may read two vectors past the end
  s.size = s.phase_size * p.stride_h * p.stride_w;
  return s;
}

static inline int64_t tap_offset(const DepthwiseProblem& p, const Staging& s, int64_t r, int64_t column_tap) {
  const int64_t h = r * p.dilation_h;
  const int64_t w = column_tap * p.dilation_w;
  return ((h % p.stride_h) * p.stride_w + w % p.stride_w) * s.phase_size + (h / p.stride_h) * s.pitch + w / p.stride_w;
}

static inline void fill_tap_offsets(const DepthwiseProblem& p, const Staging& s, int64_t* offsets) {
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t column = 0; column < p.kernel_w; ++column) *offsets++ = tap_offset(p, s, r, column);
  }
}

template <class T, class A>
DWCONV_INLINE void copy_row(A* to, const T* from, int64_t count) {
  constexpr int kVec = kLanes<A>;
  int64_t i = 0;
  for (; i + kVec <= count; i += kVec) store(to + i, load(from + i));
  if (i < count) store_lanes(to + i, load_lanes(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// Stages the rows that output rows [y0, y0 + out_rows) need.
template <class T, class A>
inline void stage_rows(const DepthwiseProblem& p, const Staging& s, const T* plane, int64_t y0, int64_t out_rows, A* to) {
  const int64_t padded_h = (out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t first = y0 * p.stride_h - p.pad_h;
  for (int64_t j = 0; j < padded_h; ++j) {
    A* const row = to + (j % p.stride_h) * p.stride_w * s.phase_size + (j / p.stride_h) * s.pitch;
    const int64_t y = first + j;
    const bool inside = y >= 0 && y < p.in_h;
    const T* const from = plane + (inside ? y : 0) * p.in_stride_h;
    for (int64_t phase = 0; phase < p.stride_w; ++phase) {
      A* const out = row + phase * s.phase_size;
      // Column i of this phase is input column i * stride_w + phase - pad_w.
      const int64_t origin = phase - p.pad_w;
      int64_t begin = origin >= 0 ? 0 : (-origin + p.stride_w - 1) / p.stride_w;
      int64_t end = p.in_w > origin ? (p.in_w - origin + p.stride_w - 1) / p.stride_w : 0;
      if (end > s.pitch) end = s.pitch;
      if (!inside || begin > end) begin = end = s.pitch;
      for (int64_t i = 0; i < begin; ++i) out[i] = A(0);
      if (p.stride_w == 1) {
        copy_row(out + begin, from + begin + origin, end - begin);
      } else {
        const T* const source = from + origin;
        for (int64_t i = begin; i < end; ++i) out[i] = to_accumulate(source[i * p.stride_w]);
      }
      for (int64_t i = end; i < s.pitch; ++i) out[i] = A(0);
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
