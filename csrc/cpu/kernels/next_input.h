// The fused block's next tile, asked for while this one is multiplied; channels_last.
//
// A tile's depthwise stage waits for its input from memory, and its product then needs nothing from there: 112x112x32 -> 64 took
// the sum of the two times. Prefetches spread over the product bring the next tile's rows to L2 meanwhile.
#pragma once

#include "../../problem.h"
#include "simd.h"
#include "stage_lines.h"

namespace dwconv::DWCONV_ISA {

class NextInput {
 public:
  // Of a problem whose input is near, nothing is asked for.
  explicit NextInput(const DepthwiseProblem& p) : far_(p.far_input) {}

  bool far() const { return far_; }

  // What output rows [row, row + rows) of the N * out_h read and the rows before them did not, to be asked for in the course of
  // `work` multiply-adds.
  template <class T>
  void plan(const DepthwiseProblem& p, const T* input, int64_t row, int64_t rows, int64_t work) {
    if (!far_) return;
    const auto first_after = [&](int64_t row) {  // the rows of all images lie one after the other
      return row % p.out_h == 0 ? row / p.out_h * p.in_h : row / p.out_h * p.in_h + input_rows(p, row % p.out_h - 1, 1).end;
    };
    at_ = reinterpret_cast<const char*>(input + first_after(row) * p.in_stride_h);
    end_ = reinterpret_cast<const char*>(input + first_after(row + rows) * p.in_stride_h);
    lines_a_unit_ = ((end_ - at_) / kLineBytes + 1) * kOne / work + 1;
  }

  // `work` more of the multiply-adds are about to be done.
  DWCONV_INLINE void ask(int64_t work) {
    owed_ += lines_a_unit_ * work;
    for (; owed_ >= kOne && at_ < end_; owed_ -= kOne, at_ += kLineBytes) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLineBytes = 64, kOne = int64_t{1} << 32;  // a line in fixed point
  bool far_;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  int64_t lines_a_unit_ = 0, owed_ = 0;
};

}  // namespace dwconv::DWCONV_ISA
