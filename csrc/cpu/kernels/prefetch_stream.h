// What the fused block will need next, prefetched while it multiplies.
//
// A tile's depthwise stage waits for its input from memory, and its product then needs nothing from there: 112x112x32 -> 64 took
// the sum of the two times. Prefetches spread over the product bring the next tile's rows to L2 meanwhile; likewise, where the
// weights are too many for L2, the next panel of them.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/stage_lines.h"

namespace dwconv::DWCONV_ISA {

// Lines of memory prefetched one after the other in the course of some work.
class PrefetchStream {
 public:
  PrefetchStream() = default;
  PrefetchStream(const void* begin, const void* end, int64_t work)
      : at_(static_cast<const char*>(begin)),
        end_(static_cast<const char*>(end)),
        lines_a_unit_(((end_ - at_) / kCacheLine + 1) * kOne / work + 1) {}

  // `work` more is about to be done.
  DWCONV_INLINE void advance(int64_t work) {
    if (at_ >= end_) return;
    owed_ += lines_a_unit_ * work;
    for (; owed_ >= kOne && at_ < end_; owed_ -= kOne, at_ += kCacheLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kOne = int64_t{1} << 32;  // a line in fixed point
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  int64_t lines_a_unit_ = 0, owed_ = 0;
};

// What output rows [row, row + rows) of the N * out_h read and the rows before them did not; channels_last.
template <class T>
PrefetchStream next_input(const CpuProblem& p, const T* input, int64_t row, int64_t rows, int64_t work) {
  const auto first_after = [&](int64_t row) {  // the rows of all images lie one after the other
    const int64_t n = row / p.out_h, y = row % p.out_h;
    return n * p.in_h + (y == 0 ? 0 : input_rows(p, y - 1, 1).end);
  };
  return {input + first_after(row) * p.in_stride_h, input + first_after(row + rows) * p.in_stride_h, work};
}

// What a product prefetches as it goes.
struct ProductPrefetch {
  PrefetchStream input, weights;
  bool output = false;  // the lines it is about to write too

  DWCONV_INLINE void advance(int64_t work) {
    input.advance(work);
    weights.advance(work);
  }
};

}  // namespace dwconv::DWCONV_ISA
