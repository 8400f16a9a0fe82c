// What the fused block's kernels share: the product of a type, the middle's layout, a tile's rows across images, and pixels on
// their way to a product.
#pragma once

#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_transposed.h"
#include "cpu/kernels/pointwise/pointwise_product.h"
#include "cpu/kernels/stage_lines.h"
#if defined(DWCONV_AMX)
#include "cpu/kernels/pointwise/pointwise_amx.h"
#include "cpu/kernels/simd_lanes.h"
#endif

namespace dwconv::DWCONV_ISA {

template <class T>
struct ProductOf {
  using type = RegisterProduct<typename AccumulateType<T>::type>;
};
#if defined(DWCONV_AMX)
template <>
struct ProductOf<BFloat16> {
  using type = TileProduct;
};
#elif defined(DWCONV_BFLOAT16_PAIRS)
template <>
struct ProductOf<BFloat16> {
  using type = RegisterProduct<BFloat16Pair>;
};
#endif

template <class P>
DWCONV_INLINE int64_t padded_channels(int64_t channels) {
  return round_up(channels, P::kDepthMultiple);
}

// Elements from pixel to pixel of the middle: whole vectors, and a cache line more, which keeps pixels out of one another's
// cache sets where the channels are a power of two.
template <class P>
DWCONV_INLINE int64_t middle_pitch(int64_t channels) {
  constexpr int64_t kVec = kLanes<typename P::A>, kLine = kCacheLine / sizeof(typename P::Middle);
  const int64_t padded = padded_channels<P>(channels);
  return round_up(padded, kVec) + kLine;
}

// Output rows [row, row + rows) of the N * out_h: calls body(n, y, count, first pixel of the tile) for each image's share.
template <class Body>
DWCONV_INLINE void for_each_image(const CpuProblem& p, int64_t row, int64_t rows, Body body) {
  for (int64_t done = 0; done < rows;) {
    const int64_t n = (row + done) / p.out_h, y = (row + done) % p.out_h;
    const int64_t count = rows - done < p.out_h - y ? rows - done : p.out_h - y;
    body(n, y, count, done * p.out_w);
    done += count;
  }
}

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// ---- a pointwise convolution's pixels -----------------------------------------------------------------------------------

// Image n's gate; null where there is none.
template <class A>
DWCONV_INLINE const A* gate_of(const SeparableArgs& args, int64_t n) {
  return args.gate == nullptr ? nullptr : static_cast<const A*>(args.gate) + n * args.gate_pitch;
}

// channels_last: `count` pixels, `stride` apart, to `to`, `pitch` apart.
template <class A, class T, class M>
DWCONV_INLINE void copy_pixels(const T* from, int64_t stride, int64_t count, int64_t channels, const A* gate, int64_t pitch,
                               M* to) {
  constexpr int64_t kVec = kLanes<A>;
  for (int64_t i = 0; i < count; ++i, from += stride, to += pitch) {
    for (int64_t c = 0; c < channels; c += kVec) {
      const int lanes = lanes_left(channels - c, kVec);
      Vec<A> v = load_lanes(from + c, lanes);
      if (gate != nullptr) v *= load(gate + c);
      store_lanes(to + c, v, lanes);
    }
  }
}

// The tile's rows into middle[pixel * pitch + channel]; in NCHW by way of staged[pixel][lane], a vector of planes at a time.
template <class T, class A, class M, bool kNhwc>
void copy_stage(const SeparableArgs& args, int64_t row, int64_t rows, int64_t pitch, A* staged, M* middle) {
  const CpuProblem& p = args.depthwise.problem;
  for_each_image(p, row, rows, [&](int64_t n, int64_t y, int64_t count, int64_t pixel) {
    const T* const first = static_cast<const T*>(args.depthwise.input) + n * p.in_stride_n + y * p.stride_h * p.in_stride_h;
    const A* const gate = gate_of<A>(args, n);
    if constexpr (kNhwc) {
      for (int64_t i = 0; i < count; ++i) {
        copy_pixels(first + i * p.stride_h * p.in_stride_h, p.stride_w * p.in_stride_w, p.out_w, p.channels, gate, pitch,
                    middle + (pixel + i * p.out_w) * pitch);
      }
    } else {
      constexpr int kVec = kLanes<A>;
      for (int64_t c = 0; c < p.channels; c += kVec) {
        const int lanes = lanes_left(p.channels - c, kVec);
        const T* from[kVec];
        for (int l = 0; l < lanes; ++l) from[l] = first + (c + l) * p.in_stride_c;
        if (p.stride_h * p.stride_w == 1) {
          planes_to_lanes<T, A>(from, 0, lanes, count, p.in_w, p.in_stride_h, staged);
        } else {
          for (int64_t i = 0; i < count * p.out_w; ++i) {
            const int64_t at = i / p.out_w * p.stride_h * p.in_stride_h + i % p.out_w * p.stride_w;
            for (int l = 0; l < lanes; ++l) staged[i * kVec + l] = to_accumulate(from[l][at]);
          }
        }
        copy_pixels(staged, kVec, count * p.out_w, lanes, gate == nullptr ? gate : gate + c, pitch, middle + pixel * pitch + c);
      }
    }
  });
}

// Whether the product can read channels_last pixels where they lie: in its own type, all of them one after the other, and not
// so that the rows of a register tile push one another out of L1.
template <class T, class P>
DWCONV_INLINE bool reads_in_place(const SeparableArgs& args) {
  const CpuProblem& p = args.depthwise.problem;
  const bool dense = p.in_stride_w == p.channels && p.in_stride_h == p.in_w * p.channels && p.in_h == p.out_h &&
                     p.in_w == p.out_w && (p.batch == 1 || p.in_stride_n == p.in_h * p.in_stride_h);
  return P::kReadsInPlace && kSame<T, typename P::Middle> && p.channels % P::kDepthMultiple == 0 &&
         args.depthwise_kernel == nullptr && args.patches == nullptr && args.gate == nullptr && dense &&
         !lines_collide<T>(p.channels, 2 * kGemmRows, p.l1_ways);
}

}  // namespace dwconv::DWCONV_ISA
