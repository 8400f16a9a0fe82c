// BatchNorm by the batch's own statistics and the activation after it, forward and backward.
//
//   mean = sum x / n, variance = sum (x - mean)^2 / n, scale = weight / sqrt(variance + eps), z = (x - mean) scale + bias
//   forward   y = act(z)
//   backward  g = dy act'(z), dbias = sum g, dweight = sum g (x - mean) / sqrt(variance + eps)
//             dx = scale g + slope (x - mean) + offset, slope = -scale dweight / (sqrt(variance + eps) n),
//             offset = -scale dbias / n
//
// Backward computes z again, so that neither z nor y is kept for it. Both passes take sums of a channel, then go over it again
// (batch_norm_nchw.h, batch_norm_nhwc.h); here is what either does with a run of elements.
// Sums run over pieces of at most some thousand elements in the accumulation type: the piece's mean, then the squares about it
// and what it missed of the mean. Pieces are joined in double, in order: no cancellation, and the same bits for any number of
// threads.
//
// Traffic: forward x once or twice and y, backward x and dy once or twice and dx; torch's two modules take 8 and 8 sweeps.
// Source: Ioffe and Szegedy, arXiv:1502.03167; pieces joined as in Chan, Golub and LeVeque 1983, "Algorithms for computing the
// sample variance", with its corrected two-pass sums.
#pragma once

#include "cpu/kernels/activate.h"
#include "cpu/kernels/batch_norm/batch_norm_channel.h"
#include "cpu/kernels/simd_lanes.h"
#include "cpu/kernels/tiles.h"

namespace dwconv::DWCONV_ISA {

// ---- one run of elements -------------------------------------------------------------------------------------------------

// A channel's constants along a run: one value in NCHW, whose runs are pixels; in channels_last, whose runs are channels, one
// an element, with a vector's worth readable past the last.
template <class A>
struct OneValue {
  Vec<A> value;
  DWCONV_INLINE Vec<A> at(int64_t) const { return value; }
};
template <class A>
struct EachValue {
  const A* values;
  DWCONV_INLINE Vec<A> at(int64_t i) const { return load(values + i); }
};

// body<kWhole>(i, lanes, slot) for each vector of a run; slots tell independent sums apart.
template <class A, int kSlots, class Body>
DWCONV_INLINE void for_each_vector(int64_t count, const Body& body) {
  constexpr int64_t n = kLanes<A>;
  int64_t i = 0;
  for (; i + kSlots * n <= count; i += kSlots * n) {
    DWCONV_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) body.template operator()<true>(i + slot * n, kLanes<A>, slot);
  }
  if constexpr (kSlots > 1) {
    for (; i + n <= count; i += n) body.template operator()<true>(i, kLanes<A>, 0);
  }
  if (i < count) body.template operator()<false>(i, static_cast<int>(count - i), 0);
}

template <class A>
DWCONV_INLINE Vec<A> only_lanes(Vec<A> v, int lanes) {
  typename VecOf<A>::mask lane;
  DWCONV_UNROLL
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < lanes ? v : Vec<A>{};
}

// Identity, ReLU and ReLU6 are clamps, and their derivative is one within the limits and zero without.
template <class A, template <class> class Values>
struct Normalisation {
  Values<A> mean, scale, bias;
  Activation activation;
  A least, most;

  DWCONV_INLINE Vec<A> normalise(Vec<A> centred, int64_t i) const { return centred * scale.at(i) + bias.at(i); }
  template <bool kClamp>
  DWCONV_INLINE Vec<A> forward(Vec<A> x, int64_t i) const {
    const Vec<A> z = normalise(x - mean.at(i), i);
    if constexpr (kClamp) return at_most(at_least(z, least), most);
    return activate<A>(z, activation);
  }
  template <bool kClamp>
  DWCONV_INLINE Vec<A> backward(Vec<A> grad, Vec<A> centred, int64_t i) const {
    const Vec<A> z = normalise(centred, i);
    if constexpr (kClamp) {
      const Vec<A> zero = {};
      grad = z <= least ? zero : grad;
      return z >= most ? zero : grad;
    }
    return activate_backward<A>(grad, z, activation);
  }
};

template <class A, template <class> class Values>
DWCONV_INLINE Normalisation<A, Values> normalisation(Values<A> mean, Values<A> scale, Values<A> bias, const Activation& act) {
  const A infinity = static_cast<A>(__builtin_inf());
  const A least = act.kind == ActivationKind::kIdentity ? -infinity : A(0);
  const A most = act.kind == ActivationKind::kRelu6 ? A(6) : infinity;
  return {mean, scale, bias, act, least, most};
}

template <bool kClamp>
inline constexpr int kUnrolled = kClamp ? 4 : 1;  // an exponential is long enough as it is

template <bool kClamp, class T, class Norm>
DWCONV_INLINE void forward_run(const T* x, T* y, int64_t count, const Norm& norm) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int) {
    store_some<kWhole>(y + i, norm.template forward<kClamp>(load_some<kWhole>(x + i, lanes), i), lanes);
  });
}

// Where g costs an exponential and dx can hold it as it is, the first sweep leaves it there for the second.
template <bool kClamp, class T>
inline constexpr bool kKeepsGrad = !kClamp && sizeof(T) == sizeof(typename AccumulateType<T>::type);

// add(i, slot, g, g (x - mean)); absent lanes are zero.
template <bool kClamp, class T, class Norm, class Add>
DWCONV_INLINE void grad_sums_run(const T* x, const T* dy, T* dx, int64_t count, const Norm& norm, const Add& add) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int slot) {
    const Vec<A> centred = load_some<kWhole>(x + i, lanes) - norm.mean.at(i);
    Vec<A> g = norm.template backward<kClamp>(load_some<kWhole>(dy + i, lanes), centred, i);
    if constexpr (kKeepsGrad<kClamp, T>) store_some<kWhole>(dx + i, g, lanes);
    Vec<A> product = g * centred;
    if constexpr (!kWhole) {  // whatever the constants make of them
      g = only_lanes<A>(g, lanes);
      product = only_lanes<A>(product, lanes);
    }
    add.template operator()<kWhole>(i, slot, g, product);
  });
}

template <bool kClamp, class T, class Norm, class Values>
DWCONV_INLINE void backward_run(const T* x, const T* dy, T* dx, int64_t count, const Norm& norm, Values slope, Values offset) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int) {
    const Vec<A> centred = load_some<kWhole>(x + i, lanes) - norm.mean.at(i);
    Vec<A> g;
    if constexpr (kKeepsGrad<kClamp, T>) {
      g = load_some<kWhole>(dx + i, lanes);
    } else {
      g = norm.template backward<kClamp>(load_some<kWhole>(dy + i, lanes), centred, i);
    }
    store_some<kWhole>(dx + i, norm.scale.at(i) * g + (slope.at(i) * centred + offset.at(i)), lanes);
  });
}

}  // namespace dwconv::DWCONV_ISA
