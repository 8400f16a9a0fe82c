// What the NCHW kernels share that read planes where they lie (depthwise_forward_nchw_direct.h,
// depthwise_backward_weight_nchw_direct.h): with masks, which the 64-byte sets have.
#pragma once

#include "../../problem.h"
#include "../tiles.h"
#include "activate.h"
#include "depthwise_row_pair.h"
#include "simd.h"

namespace dwconv::DWCONV_ISA {

// How a register tile reads: every input row; the rows that the image has; those, and masked, where whole vectors could reach
// beyond the tensor.
enum class Reads { kAll, kRows, kMasked };

template <Reads kReads, class T>
DWCONV_INLINE auto load_as(const T* p, LaneMask lanes) {
  auto v = kReads == Reads::kMasked ? load_masked(p, lanes) : load(p);
  keep_in_register(v);
  return v;
}

// One past the last element of the planes that a problem goes over.
template <class T>
DWCONV_INLINE const T* end_of_input(const DepthwiseProblem& p, const T* begin) {
  return begin + (p.batch - 1) * p.in_stride_n + (p.channels - 1) * p.in_stride_c + (p.depth - 1) * p.in_stride_m +
         (p.in_h - 1) * p.in_stride_h + p.in_w;
}

// What whole vectors may reach past a plane's last element: those that lie in the padding altogether are read too.
template <class A>
DWCONV_INLINE int64_t direct_reach(const DepthwiseProblem& p) {
  return 2 * kLanes<A> * p.stride_w + p.kernel_w * p.dilation_w + (p.pad_w < 0 ? -p.pad_w : p.pad_w);
}

}  // namespace dwconv::DWCONV_ISA
