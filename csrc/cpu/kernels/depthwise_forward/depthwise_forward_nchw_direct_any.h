// Depthwise correlation, NCHW, any filter at stride and dilation 1, read in place (depthwise_forward_nchw_direct.h).
//
// Two output rows of a strip at a time. Each input row that they reach is loaded once for as many taps as a vector has lanes;
// four taps' samples are its vectors shifted by up to three lanes, then the vectors move on by four.
//
//   1x11, four vectors, two rows: 10 loads, 84 shifts, 88 multiply-adds     11x1: 48 loads, 88 multiply-adds
#pragma once

#include "cpu/kernels/nchw_direct.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kAnyVectors = 4, kAnyRows = 2;

template <class T, class A, int kVectors, StripKind kKind>
class AnyFilter {
 public:
  AnyFilter(const DirectFrame& f, const DirectTile<T, A>& tile, const LaneMask* masks) : f_(f), tile_(tile), masks_(masks) {}

  void run(int64_t x) {
    const LaneMask* const out_masks = masks_ + f_.blocks * (kVectors + 1);
    T* out = tile_.out + x;
    for (int64_t i = 0; i < tile_.rows; i += kAnyRows, out += kAnyRows * f_.out_row) {
      Vec<A> acc[kAnyRows][kVectors];
      DWCONV_UNROLL
      for (int j = 0; j < kAnyRows; ++j) {
        DWCONV_UNROLL
        for (int t = 0; t < kVectors; ++t) acc[j][t] = broadcast(tile_.bias);
      }
      add_rows(tile_.in + i * f_.in_row + x, tile_.y + i - f_.pad_h, acc);
      activate<A, kKind>(acc, f_.activation);
      store_row(tile_, out, acc[0], out_masks);
      if (i + 1 < tile_.rows) store_row(tile_, out + f_.out_row, acc[1], out_masks);
    }
  }

 private:
  static constexpr bool kMasked = kKind == StripKind::kMasked;

  // Some columns of the filter, at most as many as a vector has lanes.
  struct Block {
    int64_t count;
    LaneMask lanes[kVectors + 1];
  };

  // Input row q meets filter row q of the first output row and q - 1 of the second. y: of the input.
  DWCONV_INLINE void add_rows(const T* in, int64_t y, Vec<A> (&acc)[kAnyRows][kVectors]) const {
    const int64_t begin = y < 0 ? -y : 0;
    const int64_t end = f_.in_h - y < f_.kernel_h + 1 ? f_.in_h - y : f_.kernel_h + 1;
    const LaneMask* masks = masks_;
    for (int64_t s = 0; s < f_.kernel_w; s += kLanes<A>, masks += kVectors + 1) {
      Block block = {f_.kernel_w - s < kLanes<A> ? f_.kernel_w - s : kLanes<A>, {}};
      DWCONV_UNROLL
      for (int i = 0; i <= kVectors; ++i) block.lanes[i] = masks[i];
      if (block.count == 1) block.lanes[kVectors] = 0;
      const T* row = in + begin * f_.in_row + s;
      const A* taps = tile_.weight + begin * f_.kernel_w + s;
      for (int64_t q = begin; q < end; ++q, row += f_.in_row, taps += f_.kernel_w) {
        if (q == 0) {
          add_row<true, false>(row, taps, block, acc);
        } else if (q == f_.kernel_h) {
          add_row<false, true>(row, taps, block, acc);
        } else {
          add_row<true, true>(row, taps, block, acc);
        }
      }
    }
  }

  // taps: those of the first output row; a filter row before are those of the second.
  template <bool kFirst, bool kSecond>
  DWCONV_INLINE void add_row(const T* row, const A* taps, const Block& block, Vec<A> (&acc)[kAnyRows][kVectors]) const {
    constexpr int kUnrolled = 4;
    DWCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) __builtin_prefetch(row + f_.prefetch_distance + i * kLanes<A>);
    Vec<A> v[kVectors + 1];
    DWCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = read_lanes<kMasked>(row + i * kLanes<A>, block.lanes[i]);
    v[kVectors] = Vec<A>{};
    if (block.lanes[kVectors] != 0) v[kVectors] = read_lanes<kMasked>(row + kVectors * kLanes<A>, block.lanes[kVectors]);
    int64_t n = block.count;
    for (; n > kUnrolled; n -= kUnrolled, taps += kUnrolled) {
      add_taps<kFirst, kSecond, kUnrolled>(v, taps, acc);
      DWCONV_UNROLL
      for (int i = 0; i < kVectors; ++i) v[i] = shift_in<kUnrolled>(v[i], v[i + 1]);
      v[kVectors] = shift_in<kUnrolled>(v[kVectors], Vec<A>{});
    }
    if (n == 1) add_taps<kFirst, kSecond, 1>(v, taps, acc);
    if (n == 2) add_taps<kFirst, kSecond, 2>(v, taps, acc);
    if (n == 3) add_taps<kFirst, kSecond, 3>(v, taps, acc);
    if (n == 4) add_taps<kFirst, kSecond, 4>(v, taps, acc);
  }

  template <bool kFirst, bool kSecond, int kCount, int kTap = 0>
  DWCONV_INLINE void add_taps(const Vec<A> (&v)[kVectors + 1], const A* taps, Vec<A> (&acc)[kAnyRows][kVectors]) const {
    if constexpr (kTap < kCount) {
      const Vec<A> first = kFirst ? broadcast(taps[kTap]) : Vec<A>{};
      const Vec<A> second = kSecond ? broadcast(taps[kTap - f_.kernel_w]) : Vec<A>{};
      DWCONV_UNROLL
      for (int t = 0; t < kVectors; ++t) {
        const Vec<A> x = shift_in<kTap>(v[t], v[t + 1]);
        if (kFirst) acc[0][t] += x * first;
        if (kSecond) acc[1][t] += x * second;
      }
      add_taps<kFirst, kSecond, kCount, kTap + 1>(v, taps, acc);
    }
  }

  const DirectFrame& f_;
  const DirectTile<T, A>& tile_;
  const LaneMask* const masks_;
};

}  // namespace dwconv::DWCONV_ISA
