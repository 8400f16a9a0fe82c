// Channels last, where pixels are a power of two of bytes apart: they share a few sets of the L1 cache, and a tile's pixels push
// one another out before their second vector is read (1024 channels of float32: one set for all). There the rows that a tile
// reads are first copied, kStagedBytes of channels at a time, to
//
//   staged [row][column][kStaged]
//
// and read from that. Single cache lines would each be waited for, since
// the prefetchers find nothing in them to follow. A tile is done with its channels before the next, so that it writes whole
// lines: the outputs' share the few sets too.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd.h"

namespace dwconv::DWCONV_ISA {

struct Range {
  int64_t begin, end;
};

// Input rows that output rows [y, y + rows) read, clipped to the image.
DWCONV_INLINE Range input_rows(const CpuProblem& p, int64_t y, int64_t rows) {
  int64_t begin = y * p.stride_h - p.pad_h;
  int64_t end = begin + (rows - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  if (begin < 0) begin = 0;
  if (end > p.in_h) end = p.in_h;
  if (begin > end) begin = end = 0;
  return {begin, end};
}

// Makes q's image the input rows that output rows [y, y + rows) of p read; which rows of p's image they are.
DWCONV_INLINE Range crop_input(const CpuProblem& p, int64_t y, int64_t rows, CpuProblem* q) {
  const Range in_rows = input_rows(p, y, rows);
  q->in_h = in_rows.end - in_rows.begin;
  q->out_h = rows;
  q->pad_h = p.pad_h - y * p.stride_h + in_rows.begin;
  return in_rows;
}

// The most input rows `rows` output rows can need.
static inline int64_t most_input_rows(const CpuProblem& p, int64_t rows) {
  const int64_t reach = (rows - 1) * p.stride_h + (p.kernel_h > 0 ? p.kernel_h - 1 : 0) * p.dilation_h + 1;
  return reach < p.in_h ? reach : p.in_h;
}

inline constexpr int64_t kStagedBytes = 256;
template <class T>
inline constexpr int64_t kStaged = kStagedBytes / static_cast<int64_t>(sizeof(T));

// Whether `lines` cache lines, one a pixel of `channels` contiguous channels, are more than twice what their sets of `ways` lines
// hold. Up to that, L2 serves what L1 has lost in time; staging made 56x56x64 half as fast again. Pixels no longer than the
// staged ones would lie as they did.
template <class T>
DWCONV_INLINE bool lines_collide(int64_t channels, int64_t lines, int64_t ways) {
  constexpr int64_t kSets = 64;
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  if (bytes % 64 != 0 || bytes <= kStagedBytes) return false;
  int64_t together = bytes / 64;  // every so many sets is used: the largest power of two in it, at most kSets
  together &= -together;
  return lines > 2 * ways * (together < kSets ? kSets / together : 1);
}

// `count` channels of rows x columns pixels to [row][column][kStaged].
template <class T>
DWCONV_INLINE void stage_lines(const T* from, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                               int64_t count, T* to) {
  for (int64_t y = 0; y < rows; ++y, from += row_stride) {
    const T* pixel = from;
    for (int64_t x = 0; x < columns; ++x, pixel += column_stride, to += kStaged<T>) {
      if (count == kStaged<T>) {
        __builtin_memcpy(to, pixel, kStagedBytes);
      } else {
        __builtin_memcpy(to, pixel, count * sizeof(T));
      }
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
