// What the NCHW kernels share that read planes where they lie (depthwise_forward_nchw_direct.h,
// depthwise_backward_weight_nchw_direct.h): with masks, which the 64-byte sets have.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/args.h"
#include "cpu/kernels/depthwise_row_pair.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

// One past the last element of the planes that a problem goes over.
template <class T>
DWCONV_INLINE const T* end_of_input(const CpuProblem& p, const T* begin) {
  return begin + (p.batch - 1) * p.in_stride_n + (p.channels - 1) * p.in_stride_c + (p.depth - 1) * p.in_stride_m +
         (p.in_h - 1) * p.in_stride_h + p.in_w;
}

// What whole vectors may reach past a plane's last element: those that lie in the padding altogether are read too.
template <class A>
DWCONV_INLINE int64_t direct_reach(const CpuProblem& p) {
  return 2 * kLanes<A> * p.stride_w + p.kernel_w * p.dilation_w + (p.pad_w < 0 ? -p.pad_w : p.pad_w);
}

template <class A>
DWCONV_INLINE int64_t mask_blocks(const CpuProblem& p) {
  return ceil_div(p.kernel_w, kLanes<A>);
}

struct DirectFrame {
  int64_t in_h, in_row;
  int64_t pad_h, out_w, out_row;
  int64_t kernel_h, kernel_w, blocks;  // of any filter: blocks of as many taps as a vector has lanes
  int64_t prefetch_distance;           // prefetch_distance_of
  Activation activation;
};

// A tile: some rows of one output plane; `in` is where output (0, 0) of the tile has its first tap, in the plane or not.
template <class T, class A>
struct DirectTile {
  const T* in;
  const A* weight;
  A bias;
  T* out;
  int64_t y, rows;      // y: of the plane
  const T* last_whole;  // the last place where a whole vector stays within the tile
  bool inside;          // whole vectors stay within the input
};

// A row of a strip. What lies past a narrow row is the next one, which is stored after it.
template <class T, class A, class V, int kVectors>
DWCONV_INLINE void store_row(const DirectTile<T, A>& tile, T* out, const V (&v)[kVectors], const LaneMask* columns) {
  constexpr int kLast = kVectors - 1;
  DWCONV_UNROLL
  for (int t = 0; t < kLast; ++t) store(out + t * kLanes<A>, v[t]);
  if (out + kLast * kLanes<A> <= tile.last_whole) {
    store(out + kLast * kLanes<A>, v[kLast]);
  } else {
    store_masked(out + kLast * kLanes<A>, v[kLast], columns[kLast]);
  }
}

// Calls body<number of vectors>(x) for strips of at most kMost vectors of a row's columns. The last of several lies over the one
// before; only that of a row narrower than itself is in part.
template <int kVec, int kMost, class Body>
DWCONV_INLINE void for_strips(int64_t out_w, Body body) {
  const int64_t vectors = ceil_div(out_w, kVec);
  int64_t first = 0;
  for (; vectors - first >= kMost; first += kMost) {
    const int64_t x = first + kMost == vectors ? out_w - kMost * kVec : first * kVec;
    body.template operator()<kMost>(x > 0 ? x : 0);
  }
  const int64_t x = out_w - (vectors - first) * kVec;
  const auto rest = [&]<int kVectors>() {
    if (vectors - first == kVectors) body.template operator()<kVectors>(x > 0 ? x : 0);
  };
  rest.template operator()<1>();
  if constexpr (kMost > 2) rest.template operator()<2>();
  if constexpr (kMost > 3) rest.template operator()<3>();
}

// All strips' masks: of the input [groups][kVectors + 1], each group `step` columns after the one before, those of a vector
// stride_w apart; then [kVectors] of the output.
template <int kVec, int kMost>
void fill_strip_masks(const CpuProblem& p, int64_t groups, int64_t step, LaneMask* mask) {
  for_strips<kVec, kMost>(p.out_w, [&]<int kVectors>(int64_t x) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int i = 0; i <= kVectors; ++i) {
        const int64_t first = (x + i * kVec) * p.stride_w + group * step - p.pad_w;
        *mask++ = static_cast<LaneMask>(valid_columns(first, p.stride_w, p.in_w, kVec));
      }
    }
    for (int t = 0; t < kVectors; ++t) *mask++ = static_cast<LaneMask>(valid_columns(x + t * kVec, 1, p.out_w, kVec));
  });
}

// The others are zero; where kMasked they are not touched.
template <bool kMasked, class T>
DWCONV_INLINE auto read_lanes(const T* at, LaneMask lanes) {
  return kMasked ? load_masked(at, lanes) : keep_lanes(load(at), lanes);
}

// An input row prefetches the one this many elements on, which the prefetchers do too late: some 4 KB of the rows that are read
// further on, of this plane or the next; of a part of each plane (by_planes) the same row of a later plane.
template <class T>
DWCONV_INLINE int64_t prefetch_distance_of(const CpuProblem& p, bool by_planes) {
  constexpr int64_t kBytes = 4096;
  const int64_t row = p.in_stride_h;
  if (row <= 0) return 0;  // a single row's stride may be anything
  const int64_t rows = kBytes / (row * static_cast<int64_t>(sizeof(T))) + 1;
  const int64_t read = (p.out_h - 1) * p.stride_h + p.kernel_h;
  return by_planes && read < p.in_h - p.in_h / 8 ? ceil_div(rows, read) * p.in_stride_c : rows * row;
}

// What a strip has to handle: kPlain, nothing; kCalls, an activation that is a call, around which sums and taps are not in
// registers; kMasked, that and vectors that reach beyond the tensor.
enum class StripKind { kPlain, kCalls, kMasked };

template <class A, StripKind kKind, int kRows, int kColumns>
DWCONV_INLINE void activate(Vec<A> (&values)[kRows][kColumns], const Activation& activation) {
  if constexpr (kKind == StripKind::kPlain) {
    clamp_all<A>(values, activation);
  } else {
    activate_all<A>(values, activation);
  }
}

}  // namespace dwconv::DWCONV_ISA
