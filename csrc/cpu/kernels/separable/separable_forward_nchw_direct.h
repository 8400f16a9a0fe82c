// Fused block for inference, NCHW, with pixels as lanes throughout: planes are read and written where they lie. For sets of 32
// registers.
//
// A tile is a range of output rows of one image times a range of output channels. An NCHW kernel's depthwise result goes to
// scratch as [channel][pixel], in the type that the product multiplies, and stays in L2. The product is that of
// pointwise_product.h with the roles changed: a register tile of kPlaneRows output channels by kPlaneVectors vectors of pixels.
// It reads the same panels of weights, each weight broadcast to a vector of pixels:
//
//   out[j, i] = sum_k panel[k, j] * middle[k, i]     11 loads for 24 multiply-adds
//
// Against transposing each plane into [pixel][channel] and the product back (separable_forward.h): no transposition, and the
// depthwise stage by the kernels that read rows in place. Pixels that do not fill a last vector are what it costs.
// Traffic: input (plus halo rows) and output once; the pointwise weights once a tile of pixels, from L2 or L3.
#pragma once

#include "cpu/kernels/separable/separable_forward.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

inline constexpr int kPlaneRows = 8, kPlaneVectors = 3;  // 24 sums + 3 of pixels + 1 broadcast of 32 registers

// The middle: elements E of the product, one channel or two, [element][pixel].
template <class E>
struct PlaneMiddle {
  using A = typename Element<E>::Accumulate;
  static constexpr int kVec = kLanes<A>, kChannels = Element<E>::kChannels;

  static int64_t elements(int64_t channels) { return ceil_div(channels, kChannels); }
  static int64_t vectors(int64_t pixels) { return ceil_div(pixels, kVec); }
  // From element to element: whole vectors, and one more, which keeps them out of one another's cache sets.
  static int64_t pitch(int64_t pixels) { return (vectors(pixels) + 1) * kVec; }
};

// The same of a pointwise convolution: the input's own pixels, times the gate.
template <class T>
void copy_planes(const SeparableArgs& args, int64_t n, int64_t y, int64_t rows, int64_t first, int64_t count, int64_t pitch,
                 T* to) {
  using A = typename AccumulateType<T>::type;
  constexpr int64_t kVec = kLanes<A>;
  const CpuProblem& p = args.depthwise.problem;
  const A* const gate = gate_of<A>(args, n);
  for (int64_t c = first; c < first + count; ++c, to += pitch) {
    const T* from = static_cast<const T*>(args.depthwise.input) + n * p.in_stride_n + c * p.in_stride_c;
    from += y * p.stride_h * p.in_stride_h;
    T* row = to;
    const Vec<A> factor = broadcast(gate == nullptr ? A(1) : gate[c]);
    for (int64_t i = 0; i < rows; ++i, from += p.stride_h * p.in_stride_h, row += p.out_w) {
      if (p.stride_w > 1) {
        for (int64_t x = 0; x < p.out_w; ++x) from_accumulate(to_accumulate(from[x * p.stride_w]) * factor[0], row + x);
        continue;
      }
      for (int64_t x = 0; x < p.out_w; x += kVec) {
        const int lanes = lanes_left(p.out_w - x, kVec);
        store_lanes(row + x, load_lanes(from + x, lanes) * factor, lanes);
      }
    }
  }
}

// Planes [first, first + count) of output rows [y, y + rows) of image n, each `pitch` after the one before.
template <class T>
void some_planes(const SeparableArgs& args, int64_t n, int64_t y, int64_t rows, int64_t first, int64_t count, int64_t pitch,
                 void* scratch, T* to) {
  if (args.depthwise_kernel == nullptr) return copy_planes(args, n, y, rows, first, count, pitch, to);
  DepthwiseArgs stage = args.depthwise;
  CpuProblem& p = stage.problem;
  stage.input = static_cast<const T*>(args.depthwise.input) + n * p.in_stride_n;
  stage.output = to - first * pitch;
  stage.rows_per_tile = rows;
  p.pad_h -= y * p.stride_h;
  p.batch = 1, p.out_h = rows;
  p.prefetch_input = p.prefetch_output = false;
  p.out_stride_w = 1, p.out_stride_h = p.out_w, p.out_stride_c = pitch, p.out_stride_n = 0;
  Tiles tiles;  // a plane each
  tiles.at = first, tiles.stop = first + count;
  args.depthwise_kernel(stage, scratch, tiles);
}

// The depthwise stage of output rows [y, y + rows) of image n.
template <class T>
void plane_stage(const SeparableArgs& args, int64_t n, int64_t y, int64_t rows, int64_t pitch, T* /*planes*/, void* scratch,
                 T* middle) {
  some_planes(args, n, y, rows, 0, args.depthwise.problem.channels, pitch, scratch, middle);
}

inline constexpr int64_t kPairGroup = 16;  // channels whose planes are made pairs of while they are in L1

#if defined(DWCONV_BFLOAT16_PAIRS)
// A missing second channel is zero.
inline void plane_stage(const SeparableArgs& args, int64_t n, int64_t y, int64_t rows, int64_t pitch, BFloat16* planes,
                        void* scratch, BFloat16Pair* middle) {
  const int64_t channels = args.depthwise.problem.channels;
  for (int64_t first = 0; first < channels; first += kPairGroup) {
    const int64_t count = lanes_left(channels - first, kPairGroup);
    some_planes(args, n, y, rows, first, count, pitch, scratch, planes);
    for (int64_t c = 0; c < count; c += 2, middle += pitch) {
      const BFloat16* const even = planes + c * pitch;
      for (int64_t i = 0; i < rows * args.depthwise.problem.out_w; i += kLanes<float>) {
        U16 halves[2] = {};
        __builtin_memcpy(&halves[0], even + i, sizeof halves[0]);
        if (c + 1 < count) __builtin_memcpy(&halves[1], even + pitch + i, sizeof halves[1]);
        const U32 pairs = __builtin_convertvector(halves[0], U32) | __builtin_convertvector(halves[1], U32) << 16;
        __builtin_memcpy(middle + i, &pairs, sizeof pairs);
      }
    }
  }
}
#endif

// Where a register tile's result goes: planes `pitch` apart, `rows` of them, the last vector's first `lanes` pixels.
template <class T>
struct PlaneTarget {
  T* out;
  const T* residual;  // like out, or null
  int64_t pitch;
  int rows, lanes;
};

template <class T, class A, int kVectors>
DWCONV_INLINE void finish_planes(const Activation& activation, Vec<A> (&acc)[kPlaneRows][kVectors], const A* bias,
                                 const PlaneTarget<T>& to) {
  constexpr int kVec = kLanes<A>;
  DWCONV_UNROLL
  for (int i = 0; i < kPlaneRows; ++i) {
    const Vec<A> b = broadcast(bias[i]);
    DWCONV_UNROLL
    for (int j = 0; j < kVectors; ++j) acc[i][j] += b;
  }
  activate_all<A>(acc, activation);
  const PlaneTarget<T> target = to;                                // of its own: see finish_tile
  const int last = target.lanes < kVec ? kVectors - 1 : kVectors;  // the first vector that is not whole
  if (target.residual != nullptr) {
    DWCONV_UNROLL
    for (int i = 0; i < kPlaneRows; ++i) {
      if (i >= target.rows) break;
      DWCONV_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const T* const at = target.residual + i * target.pitch + j * kVec;
        acc[i][j] += j < last ? load(at) : load_lanes(at, target.lanes);
      }
    }
  }
  DWCONV_UNROLL
  for (int i = 0; i < kPlaneRows; ++i) {
    if (i >= target.rows) break;
    T* const at = target.out + i * target.pitch;
    DWCONV_UNROLL
    for (int j = 0; j + 1 < kVectors; ++j) store(at + j * kVec, acc[i][j]);
    constexpr int kLast = kVectors - 1;
    if (last == kVectors) {
      store(at + kLast * kVec, acc[i][kLast]);
    } else {
      store_lanes(at + kLast * kVec, acc[i][kLast], target.lanes);
    }
  }
}

// The sums over `elements` in blocks of kDepthBlock, as in pointwise_product.h.
template <class T, class E, int kVectors>
void plane_rows(const Activation& activation, int64_t elements, const E* weight, const E* middle, int64_t pitch,
                const typename Element<E>::Accumulate* bias, const PlaneTarget<T>& to, ProductPrefetch& upcoming) {
  using A = typename Element<E>::Accumulate;
  constexpr int kVec = kLanes<A>;
  constexpr int64_t kPrefetchEvery = 64;
  A sums[kPlaneRows * kVectors * kVec];
  for (int64_t begin = 0; begin < elements; begin += kDepthBlock) {
    const int64_t depth = elements - begin < kDepthBlock ? elements - begin : kDepthBlock;
    Vec<A> acc[kPlaneRows][kVectors];
    DWCONV_UNROLL
    for (int i = 0; i < kPlaneRows; ++i) {
      DWCONV_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Vec<A>{};
    }
    for (int64_t left = depth; left > 0; left -= kPrefetchEvery) {
      const int64_t count = left < kPrefetchEvery ? left : kPrefetchEvery;
      upcoming.advance(count * kVectors);
      for (int64_t k = 0; k < count; ++k, weight += kPanel<A>, middle += pitch) {
        decltype(splat(weight)) x[kVectors];
        DWCONV_UNROLL
        for (int j = 0; j < kVectors; ++j) __builtin_memcpy(&x[j], middle + j * kVec, sizeof x[j]);
        DWCONV_UNROLL
        for (int i = 0; i < kPlaneRows; ++i) {
          const auto factor = splat(weight + i);
          DWCONV_UNROLL
          for (int j = 0; j < kVectors; ++j) multiply_add(acc[i][j], factor, x[j]);
        }
      }
    }
    if (begin > 0) add_sums<A>(sums, kVectors * kVec, acc);
    if (begin + depth == elements) return finish_planes<T, A, kVectors>(activation, acc, bias, to);
    keep_sums<A>(acc, sums, kVectors * kVec);
  }
}

// Calls body<number of vectors>(first vector): at most kPlaneVectors, and one alone only where there are no more.
template <class Body>
DWCONV_INLINE void for_plane_vectors(int64_t vectors, Body body) {
  int64_t i = 0;
  for (; vectors - i > 4 || vectors - i == 3; i += 3) body.template operator()<3>(i);
  for (; vectors - i >= 2; i += 2) body.template operator()<2>(i);
  if (i < vectors) body.template operator()<1>(i);
}

// Of the product's type for T: ProductOf.
template <class P>
struct ElementOf;
template <class E>
struct ElementOf<RegisterProduct<E>> {
  using type = E;
};
template <class T>
using PlaneElement = typename ElementOf<typename ProductOf<T>::type>::type;

// Bytes of scratch a worker needs; what the depthwise stage needs itself comes after it.
template <class T, int = 0>
int64_t separable_forward_nchw_direct_scratch(const CpuProblem& p, int64_t rows_per_tile) {
  using E = PlaneElement<T>;
  using M = PlaneMiddle<E>;
  const int64_t planes = M::kChannels > 1 ? kPairGroup * static_cast<int64_t>(sizeof(T)) : 0;
  return M::pitch(rows_per_tile * p.out_w) * (M::elements(p.channels) * static_cast<int64_t>(sizeof(E)) + planes);
}

template <class T>
void separable_forward_nchw_direct(const SeparableArgs& args, void* scratch, Tiles tiles) {
  using E = PlaneElement<T>;
  using M = PlaneMiddle<E>;
  using A = typename M::A;
  const CpuProblem& p = args.depthwise.problem;
  const int64_t row_tiles = ceil_div(p.out_h, args.rows_per_tile);
  const int64_t plane = p.out_h * p.out_w;
  const int64_t elements = M::elements(p.channels), pitch = M::pitch(args.rows_per_tile * p.out_w);
  const int64_t panels = ceil_div(args.out_channels, kPanel<A>);
  E* const middle = static_cast<E*>(scratch);
  T* const planes = reinterpret_cast<T*>(middle + elements * pitch);
  char* const stage_scratch = static_cast<char*>(scratch) + separable_forward_nchw_direct_scratch<T>(p, args.rows_per_tile);
  int64_t staged = -1;
  for (int64_t tile; next_tile(tiles, &tile);) {
    const int64_t split = tile % args.splits, piece = tile / args.splits;
    const int64_t n = piece / row_tiles, y = piece % row_tiles * args.rows_per_tile;
    const int64_t rows = y + args.rows_per_tile < p.out_h ? args.rows_per_tile : p.out_h - y;
    const int64_t pixels = rows * p.out_w, vectors = M::vectors(pixels);
    if (piece != staged) plane_stage(args, n, y, rows, pitch, planes, stage_scratch, middle);
    staged = piece;
    ProductPrefetch upcoming;
    for (int64_t panel = panels * split / args.splits; panel < panels * (split + 1) / args.splits; ++panel) {
      const E* const weight = static_cast<const E*>(args.pw_weight) + panel * elements * kPanel<A>;
      if (panel + 1 < panels) {
        const int64_t work = kPanel<A> / kPlaneRows * vectors * elements;
        upcoming.weights = {weight + elements * kPanel<A>, weight + 2 * elements * kPanel<A>, work};
      }
      for (int row = 0; row < kPanel<A>; row += kPlaneRows) {
        const int64_t j = panel * kPanel<A> + row;
        if (j >= args.out_channels) break;
        const int64_t first = (n * args.out_channels + j) * plane + y * p.out_w;
        T* const out = static_cast<T*>(args.output) + first;
        const T* const residual = args.residual ? static_cast<const T*>(args.residual) + first : nullptr;
        const A* const bias = static_cast<const A*>(args.pw_bias) + j;
        for_plane_vectors(vectors, [&]<int kVectors>(int64_t i) {
          const int64_t at = i * M::kVec;
          const int64_t left = pixels - at - (kVectors - 1) * M::kVec;
          const PlaneTarget<T> to = {out + at, residual ? residual + at : nullptr, plane,
                                     lanes_left(args.out_channels - j, kPlaneRows), lanes_left(left, M::kVec)};
          plane_rows<T, E, kVectors>(args.activation, elements, weight + row, middle + at, pitch, bias, to, upcoming);
        });
      }
    }
  }
}

}  // namespace dwconv::DWCONV_ISA
