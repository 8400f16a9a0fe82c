// Channels last, rows that come from memory or L3: gone through in the order of their addresses before the register
// tiles get to them.
//
// A tile takes a vector of channels of a few columns of several rows, then the next vector: short pieces in many places, which
// the hardware's prefetchers do not follow, so that every line is waited for. One read a line, in order, is followed, and the
// tiles then find the rows in L2. Software prefetches in the tiles, the next tile's or the next rows', gained a third as much
// (docs/design/cpu-channels-last.md).
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/stage_lines.h"

namespace dwconv::DWCONV_ISA {

template <class T>
class SequentialRows {
 public:
  // An image of `width` pixels a row; where it is in L2, nothing is done.
  SequentialRows(bool beyond_l2, const T* image, int64_t row_stride, int64_t pixel_stride, int64_t width)
      : image_(image), row_stride_(row_stride), row_size_(width * pixel_stride), beyond_l2_(beyond_l2) {}

  // Those of the rows that were not read before; callers go down the image.
  DWCONV_INLINE void read(Range rows) {
    if (!beyond_l2_) return;
    const int64_t begin = rows.begin > done_ ? rows.begin : done_;
    if (begin >= rows.end) return;
    const volatile char* at = reinterpret_cast<const volatile char*>(image_ + begin * row_stride_);
    const volatile char* const end = reinterpret_cast<const volatile char*>(image_ + (rows.end - 1) * row_stride_ + row_size_);
    constexpr int kUnrolled = 8;  // four instructions a line are a fifth of what a 3x3 filter does with it
    for (; end - at > kUnrolled * kCacheLine; at += kUnrolled * kCacheLine) {
      DWCONV_UNROLL
      for (int i = 0; i < kUnrolled; ++i) (void)at[i * kCacheLine];
    }
    for (; at < end; at += kCacheLine) (void)*at;
    done_ = rows.end;
  }

 private:
  const T* image_;
  int64_t row_stride_, row_size_, done_ = 0;
  bool beyond_l2_;
};

// Prefetches `count` elements that will be read, or written, as far as there are any before `limit`.
template <class T>
DWCONV_INLINE void prefetch(const T* begin, int64_t count, const T* limit) {
  const T* const end = limit - begin < count ? limit : begin + count;
  for (const T* at = begin; at < end; at += kCacheLine / sizeof(T)) __builtin_prefetch(at);
}
template <class T>
DWCONV_INLINE void prefetch_for_write(T* begin, int64_t count, T* limit) {
  prefetch_for_write(begin, limit - begin < count ? limit : begin + count);
}

// Rows that will be written.
template <class T>
DWCONV_INLINE void prefetch_rows_for_write(bool beyond_l2, T* image, int64_t row_stride, Range rows) {
  if (beyond_l2) prefetch_for_write(image + rows.begin * row_stride, image + rows.end * row_stride);
}

}  // namespace dwconv::DWCONV_ISA
