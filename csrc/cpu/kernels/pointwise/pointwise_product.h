// The fused block's pointwise product, and what becomes of its sums:
//
//   product[i, j] = sum_k middle[i, k] * panel[k, j]     i pixels, k channels, j output channels
//
// Register tile: kGemmRows pixels by kGemmColumns vectors of output channels; the weights are packed in panels of as many
// output channels (PointwiseFormat). Where the last panel has no more than a vector of them, that vector alone is multiplied.
// kDepthBlock channels of a panel are walked for all pixels of the tile in turn; between
// the blocks the sums rest in scratch, [pixel][kPanel]. Sums over k run in order, in one accumulator within a block and in
// one over the blocks: the result does not depend on the tile. Bias, activation and residual are applied to the registers.
//
// Where the instruction set multiplies pairs of bfloat16 (DWCONV_BFLOAT16_PAIRS), a bfloat16 block's middle is bfloat16 and
// the product's elements are pairs of channels, two multiply-adds each; the sums are float32 as ever.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/prefetch_stream.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

#if DWCONV_VECTOR_BYTES == 64
inline constexpr int kGemmRows = 14;  // 28 sums + 2 of the panel + 1 broadcast of 32 registers
#elif DWCONV_VECTOR_BYTES == 32
inline constexpr int kGemmRows = 6;  // 12 + 2 + 1 of 16
#elif defined(DWCONV_NEON)
inline constexpr int kGemmRows = 8;  // 16 + 2 of each of four channels' panels + 8 of the rows' next four channels, of 32
#else
inline constexpr int kGemmRows = 4;
#endif
inline constexpr int kGemmColumns = 2;
template <class A>
inline constexpr int kPanel = kGemmColumns * kLanes<A>;

// One float32 accumulator over 1024 channels is 4.5 times less accurate than nn.Conv2d; with one a block of 256 it is twice. The
// price is a load, an addition and a store for every 256 FMAs, 2 % of the time (4 % with blocks of 128).
inline constexpr int64_t kDepthBlock = 256;

// ---- an element of the product: one channel, or two of bfloat16 ------------------------------------------------------

template <class E>
struct Element {
  using Accumulate = E;
  using Middle = E;
  static constexpr int kChannels = 1;
};
DWCONV_INLINE Vec<float> splat(const float* at) { return broadcast(*at); }
DWCONV_INLINE Vec<double> splat(const double* at) { return broadcast(*at); }
template <class V>
DWCONV_INLINE void multiply_add(V& sum, V a, V b) {
  sum += a * b;
}

// NEON multiplies by one lane of a vector: a row's next kLaneElements come with one load, and no broadcast.
#if defined(DWCONV_NEON)
template <class E>
inline constexpr int kLaneElements = sizeof(E) == 4 ? 4 : 0;
template <int kLane>
DWCONV_INLINE void multiply_add_lane(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  sum = (Vec<float>)vfmaq_laneq_f32((float32x4_t)sum, (float32x4_t)b, (float32x4_t)a, kLane);
}
#if defined(DWCONV_BFLOAT16_PAIRS)
template <int kLane>
DWCONV_INLINE void multiply_add_lane(Vec<float>& sum, U32 a, U32 b) {
  sum = (Vec<float>)vbfdotq_laneq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a, kLane);
}
#endif
#endif

#if defined(DWCONV_BFLOAT16_PAIRS)
template <>
struct Element<BFloat16Pair> {
  using Accumulate = float;
  using Middle = BFloat16;
  static constexpr int kChannels = 2;
};
DWCONV_INLINE U32 splat(const BFloat16Pair* at) {
  uint32_t bits;
  __builtin_memcpy(&bits, at, sizeof bits);
  return bits + U32{};
}
DWCONV_INLINE void multiply_add(Vec<float>& sum, U32 a, U32 b) { sum = add_products(sum, a, b); }
#endif

template <class A, int kRows, int kColumns>
DWCONV_INLINE void zero_tile(Vec<A> (&acc)[kRows][kColumns]) {
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) acc[i][j] = Vec<A>{};
  }
}

#if defined(DWCONV_NEON)
// kLaneElements of add_to_tile's sum.
template <class E, class V, int kRows, int kColumns>
DWCONV_INLINE void add_lanes(const E* a, int64_t pitch, const E* panel, V (&acc)[kRows][kColumns]) {
  constexpr int kVec = sizeof(V) / sizeof(float);
  decltype(splat(panel)) factors[kRows];
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) __builtin_memcpy(&factors[i], a + i * pitch, sizeof factors[i]);
  const auto add = [&]<int kLane>() __attribute__((always_inline)) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      decltype(splat(panel)) b;
      __builtin_memcpy(&b, panel + (kLane * kGemmColumns + j) * kVec, sizeof b);
      DWCONV_UNROLL
      for (int i = 0; i < kRows; ++i) multiply_add_lane<kLane>(acc[i][j], factors[i], b);
    }
  };
  add.template operator()<0>();
  add.template operator()<1>();
  add.template operator()<2>();
  add.template operator()<3>();
}
#endif

// acc[i] += sum_k a[i * pitch + k] * panel[k]. What comes next is prefetched a few lines at a time: more at once than there are
// buffers for misses would hold up the product.
template <class E, class A, int kRows, int kColumns>
DWCONV_INLINE void add_to_tile(int64_t depth, const E* a, int64_t pitch, const E* panel, int rows, ProductPrefetch& upcoming,
                               Vec<A> (&acc)[kRows][kColumns]) {
  constexpr int64_t kPrefetchEvery = 32;
  constexpr int kVec = kLanes<A>;
  const RowSteps steps(pitch * static_cast<int64_t>(sizeof(E)));
  const E* low = a;
  const E* high = a + 7 * pitch;
  for (int64_t left = depth; left > 0; left -= kPrefetchEvery) {
    const int64_t count = left < kPrefetchEvery ? left : kPrefetchEvery;
    upcoming.advance(count * rows * Element<E>::kChannels);
    int64_t k = 0;
#if defined(DWCONV_NEON)
    if constexpr (kLaneElements<E> > 0) {
      for (; k + kLaneElements<E> <= count; k += kLaneElements<E>, panel += kLaneElements<E> * kPanel<A>) {
        add_lanes(low, pitch, panel, acc);
        low += kLaneElements<E>, high += kLaneElements<E>;
      }
    }
#endif
    // Unrolled: the loop's own five instructions against 20 of AVX2.
    DWCONV_UNROLL_4
    for (; k < count; ++k, ++low, ++high, panel += kPanel<A>) {
      decltype(splat(panel)) b[kColumns];
      DWCONV_UNROLL
      for (int j = 0; j < kColumns; ++j) __builtin_memcpy(&b[j], panel + j * kVec, sizeof b[j]);
      DWCONV_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const auto factor = splat(i < 7 ? steps.row(low, i) : steps.row(high, i - 7));
        DWCONV_UNROLL
        for (int j = 0; j < kColumns; ++j) multiply_add(acc[i][j], factor, b[j]);
      }
    }
  }
}

// Where a register tile's result goes: rows `pitch` apart, `rows` of them, no more than the tile has, `columns` output channels
// of the panel.
template <class O>
struct GemmTarget {
  O* out;
  const O* residual;  // like out, or null
  int64_t pitch;
  int rows, columns;
};

template <class O>
DWCONV_INLINE GemmTarget<O> from_row(const GemmTarget<O>& to, int64_t row, int rows) {
  return {to.out + row * to.pitch, to.residual ? to.residual + row * to.pitch : nullptr, to.pitch, rows, to.columns};
}

// Prefetches the lines that will be written.
template <class O>
DWCONV_INLINE void prefetch_for_write(const GemmTarget<O>& to) {
  for (int i = 0; i < to.rows; ++i) prefetch_for_write(to.out + i * to.pitch, to.out + i * to.pitch + to.columns);
}

// The last panel's rows, which are not whole vectors.
template <class O, class A, int kRows, int kColumns>
DWCONV_INLINE void store_part(const Vec<A> (&acc)[kRows][kColumns], const GemmTarget<O>& to) {
  constexpr int kVec = kLanes<A>;
  A sums[kRows][kColumns * kVec];
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) store(sums[i] + j * kVec, acc[i][j]);
  }
  for (int i = 0; i < to.rows; ++i) {
    for (int j = 0; j < to.columns; j += kVec) {
      const int lanes = lanes_left(to.columns - j, kVec);
      const int64_t at = i * to.pitch + j;
      Vec<A> v = load(sums[i] + j);
      if (to.residual != nullptr) v += load_lanes(to.residual + at, lanes);
      store_lanes(to.out + at, v, lanes);
    }
  }
}

// Complete sums to the target.
template <class O, class A, int kRows, int kColumns>
DWCONV_INLINE void finish_tile(const Activation& activation, Vec<A> (&acc)[kRows][kColumns], const A* bias,
                               const GemmTarget<O>& to) {
  constexpr int kVec = kLanes<A>;
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) acc[i][j] += load(bias + j * kVec);
  }
  activate_all<A>(acc, activation);
  // Of its own, since stores could be to `to` for all the compiler knows: it would read it anew after each.
  const GemmTarget<O> target = to;
  if (target.columns < kColumns * kVec) return store_part<O, A>(acc, target);
  if (target.residual != nullptr) {
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= target.rows) break;
      DWCONV_UNROLL
      for (int j = 0; j < kColumns; ++j) acc[i][j] += load(target.residual + i * target.pitch + j * kVec);
    }
  }
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i >= target.rows) break;
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) store(target.out + i * target.pitch + j * kVec, acc[i][j]);
  }
}

// Sums that rest between two blocks of channels, rows `pitch` apart.
template <class A, int kRows, int kColumns>
DWCONV_INLINE void add_sums(const A* sums, int64_t pitch, Vec<A> (&acc)[kRows][kColumns]) {
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) acc[i][j] += load(sums + i * pitch + j * kLanes<A>);
  }
}

template <class A, int kRows, int kColumns>
DWCONV_INLINE void keep_sums(const Vec<A> (&acc)[kRows][kColumns], A* sums, int64_t pitch) {
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) store(sums + i * pitch + j * kLanes<A>, acc[i][j]);
  }
}

// `depth` elements of the product, from element `begin` of the middle and the panel on.
struct DepthBlock {
  int64_t begin, depth;
  bool first, last;
};

// One register tile: a block of channels added to the sums so far, [kRows][kPanel]; after the last one, to the target.
template <class O, class E, class A, int kRows, int kColumns>
void gemm_rows(const Activation& activation, const DepthBlock& block, const E* a, int64_t pitch, const E* panel, A* sums,
               const A* bias, const GemmTarget<O>& to, ProductPrefetch& upcoming) {
  Vec<A> acc[kRows][kColumns];
  zero_tile<A>(acc);
  add_to_tile<E, A>(block.depth, a + block.begin, pitch, panel + block.begin * kPanel<A>, to.rows, upcoming, acc);
  if (!block.first) add_sums<A>(sums, kPanel<A>, acc);
  if (block.last) return finish_tile<O, A>(activation, acc, bias, to);
  keep_sums<A>(acc, sums, kPanel<A>);
}

// ---- what separable_forward.h asks of a product ----------------------------------------------------------------------

template <class E>
struct RegisterProduct {
  using A = typename Element<E>::Accumulate;
  using Middle = typename Element<E>::Middle;
  static constexpr int kDepthMultiple = Element<E>::kChannels, kRows = kGemmRows;
  static constexpr bool kReadsInPlace = true;  // rows that are any distance apart

  static int64_t padded_pixels(int64_t pixels) { return round_up(pixels, kGemmRows); }

  explicit RegisterProduct(int64_t /*pixels*/) {}

  // All pixels of a tile by one panel; prefetches what comes next as it goes. sums: [padded pixels][kPanel], which the target
  // may be. bias: kPanel values.
  template <class O>
  void multiply(const Activation& activation, const Middle* middle, int64_t pitch, int64_t pixels, int64_t channels,
                const Middle* panel, A* sums, const A* bias, const GemmTarget<O>& to, ProductPrefetch& upcoming) const {
    if (to.columns > kLanes<A>) {
      multiply_columns<kGemmColumns>(activation, middle, pitch, pixels, channels, panel, sums, bias, to, upcoming);
    } else {
      multiply_columns<1>(activation, middle, pitch, pixels, channels, panel, sums, bias, to, upcoming);
    }
  }

 private:
  template <int kColumns, class O>
  void multiply_columns(const Activation& activation, const Middle* middle, int64_t pitch, int64_t pixels, int64_t channels,
                        const Middle* panel, A* sums, const A* bias, const GemmTarget<O>& to, ProductPrefetch& upcoming) const {
    constexpr int kHalf = kGemmRows / 2, kChannels = Element<E>::kChannels;
    const E* const a = reinterpret_cast<const E*>(middle);
    const E* const b = reinterpret_cast<const E*>(panel);
    pitch /= kChannels;
    const int64_t elements = ceil_div(channels, kChannels);
    for (int64_t k = 0; k < elements; k += kDepthBlock) {
      const int64_t depth = elements - k < kDepthBlock ? elements - k : kDepthBlock;
      const DepthBlock block = {k, depth, k == 0, k + depth == elements};
      for (int64_t i = 0; i < pixels;) {
        const int64_t left = pixels - i;
        const GemmTarget<O> here = from_row(to, i, lanes_left(left, kGemmRows));
        if (upcoming.output && block.last) prefetch_for_write(here);
        const auto multiply_rows = [&]<int kRows>() {
          gemm_rows<O, E, A, kRows, kColumns>(activation, block, a + i * pitch, pitch, b, sums + i * kPanel<A>, bias, here,
                                              upcoming);
          i += kRows;
        };
        if (left > kHalf) {
          multiply_rows.template operator()<kGemmRows>();
        } else if (left > 1) {
          multiply_rows.template operator()<kHalf>();
        } else {  // a classifier's one row: as fast as the weights come
          multiply_rows.template operator()<1>();
        }
      }
    }
  }
};

}  // namespace dwconv::DWCONV_ISA
