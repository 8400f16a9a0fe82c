// NCHW staging: rows of one (n, c) plane copied into scratch in the accumulation type, padded, and with rows and columns
// split by their phase of the stride, so that every kernel behind it reads contiguous vectors and never tests an edge.
//
//   padded row j (j = 0 is input row y0*stride_h - pad_h) goes to phase j % stride_h, row j / stride_h; columns alike:
//   scratch[phase_h][phase_w][row][column], each row `pitch` long, each phase pair `phase_size` elements.
//
// Then output (y, x) reads tap (r, s) at tap_offset(r, s) + y * pitch + x: a stride-1 correlation whatever the stride and
// dilation were. Cost: each input element is written and read once more, in L1 or L2.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

// Columns [begin, end) of a phase lie in the image, the first of them at input column `first`.
struct PhaseColumns {
  int64_t begin, end, first;
};
static inline PhaseColumns phase_columns(const CpuProblem& p, int64_t pitch, int64_t phase) {
  const int64_t origin = phase - p.pad_w;  // the input column of the phase's first
  int64_t begin = origin >= 0 ? 0 : ceil_div(-origin, p.stride_w);
  int64_t end = p.in_w > origin ? ceil_div(p.in_w - origin, p.stride_w) : 0;
  if (end > pitch) end = pitch;
  if (begin > end) begin = end;
  return {begin, end, origin + begin * p.stride_w};
}

struct Staging {
  int64_t pitch;       // elements a row
  int64_t rows;        // rows a phase
  int64_t phase_size;  // elements a phase pair, slack for whole-vector reads included
  int64_t size;        // elements of one staged plane
  PhaseColumns columns[2];
};

// How many padded rows the first `out_rows` output rows of a tile need.
static inline int64_t padded_rows(const CpuProblem& p, int64_t out_rows) {
  return (out_rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
}

// `slack_rows` rows past the last may be read (never used) by kernels that compute several rows at a time.
static inline Staging staging_of(const CpuProblem& p, int64_t out_rows, int64_t slack_rows, int64_t vec) {
  Staging s;
  const int64_t padded_w = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  const int64_t padded_h = padded_rows(p, out_rows);
  s.pitch = padded_w > 0 ? ceil_div(padded_w, p.stride_w) : 1;
  s.rows = padded_h > 0 ? ceil_div(padded_h, p.stride_h) : 1;
  if (s.pitch < p.out_w) s.pitch = p.out_w;
  if (s.rows < out_rows) s.rows = out_rows;
  s.phase_size = (s.rows + slack_rows) * s.pitch + 2 * vec;  // a register tile may read two vectors past the end
  s.size = s.phase_size * p.stride_h * p.stride_w;
  for (int phase = 0; phase < 2 && phase < p.stride_w; ++phase) s.columns[phase] = phase_columns(p, s.pitch, phase);
  return s;
}

static inline int64_t tap_offset(const CpuProblem& p, const Staging& s, int64_t r, int64_t column_tap) {
  const int64_t h = r * p.dilation_h;
  const int64_t w = column_tap * p.dilation_w;
  return ((h % p.stride_h) * p.stride_w + w % p.stride_w) * s.phase_size + (h / p.stride_h) * s.pitch + w / p.stride_w;
}

static inline void fill_tap_offsets(const CpuProblem& p, const Staging& s, int64_t* offsets) {
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t column = 0; column < p.kernel_w; ++column) *offsets++ = tap_offset(p, s, r, column);
  }
}

// One vector is all that padding takes, as a rule, and the compiler makes a call of memset of the loop.
template <class A>
DWCONV_INLINE void zero_row(A* to, int64_t count) {
  if (count > 0) store(to, Vec<A>{});
  for (int64_t i = kLanes<A>; i < count; i += kLanes<A>) store(to + i, Vec<A>{});
}

// Whole vectors, the last of which begins where it ends with the row; one that is wider than the row has zeros behind it.
template <class T, class A>
DWCONV_INLINE void copy_row(A* to, const T* from, int64_t count) {
  constexpr int kVec = kLanes<A>;
  if (count < kVec) {
    if (count > 0) store(to, load_lanes(from, static_cast<int>(count)));
    return;
  }
  int64_t i = 0;
  for (; i + kVec <= count; i += kVec) store(to + i, load(from + i));
  if (i < count) store(to + count - kVec, load(from + count - kVec));
}

// Of a vector's elements the even ones, and of those from its last on the odd ones: none is read past the last.
template <int kVec>
struct EverySecond {
  static constexpr int lane(int l) { return 2 * l < kVec ? 2 * l : 2 * l + 1; }
};

// to[i] = from[2 * i], i < count.
template <class T, class A>
DWCONV_INLINE void copy_every_second(A* to, const T* from, int64_t count) {
  constexpr int kVec = kLanes<A>;
  const auto vector = [&](int64_t i) {
    store(to + i, shuffle<EverySecond<kVec>>(load(from + 2 * i), load(from + 2 * i + kVec - 1)));
  };
  int64_t i = 0;
  for (; i + kVec <= count; i += kVec) vector(i);
  if (i == count) return;
  if (count > kVec) return vector(count - kVec);
  for (; i < count; ++i) to[i] = to_accumulate(from[2 * i]);
}

// kStride: both strides where they are 1 or 2, and neither a division nor single elements are needed; else 0.
template <int kStride, class T, class A>
void stage_some_rows(const CpuProblem& p, const Staging& s, const T* plane, int64_t y0, int64_t begin, int64_t end, A* to) {
  const int64_t stride_h = kStride ? kStride : p.stride_h, stride_w = kStride ? kStride : p.stride_w;
  const int64_t in_h = p.in_h, in_row = p.in_stride_h, pitch = s.pitch, phase_size = s.phase_size;
  int64_t phase_h = begin % stride_h, index = begin / stride_h, y = y0 * stride_h - p.pad_h + begin;
  for (int64_t j = begin; j < end; ++j, ++y) {
    A* row = to + phase_h * stride_w * phase_size + index * pitch;
    if (++phase_h == stride_h) phase_h = 0, ++index;
    for (int64_t phase = 0; phase < stride_w; ++phase, row += phase_size) {
      if (y < 0 || y >= in_h) {
        zero_row(row, pitch);
        continue;
      }
      const PhaseColumns columns = kStride ? s.columns[phase] : phase_columns(p, pitch, phase);
      const T* const from = plane + y * in_row + columns.first;
      const int64_t count = columns.end - columns.begin;
      zero_row(row, columns.begin);
      if constexpr (kStride == 1) {
        copy_row(row + columns.begin, from, count);
      } else if constexpr (kStride == 2) {
        copy_every_second(row + columns.begin, from, count);
      } else {
        for (int64_t i = 0; i < count; ++i) row[columns.begin + i] = to_accumulate(from[i * stride_w]);
      }
      zero_row(row + columns.end, pitch - columns.end);
    }
  }
}

// Stages padded rows [begin, end) of the tile that begins at output row y0; those before `begin` are there. Vectors may reach
// past a row's end, into the next one, which is written after it, or into the slack.
template <class T, class A>
DWCONV_INLINE void stage_rows(const CpuProblem& p, const Staging& s, const T* plane, int64_t y0, int64_t begin, int64_t end,
                              A* to) {
  if (p.stride_h == 1 && p.stride_w == 1) {
    stage_some_rows<1>(p, s, plane, y0, begin, end, to);
  } else if (p.stride_h == 2 && p.stride_w == 2) {
    stage_some_rows<2>(p, s, plane, y0, begin, end, to);
  } else {
    stage_some_rows<0>(p, s, plane, y0, begin, end, to);
  }
}

}  // namespace dwconv::DWCONV_ISA
