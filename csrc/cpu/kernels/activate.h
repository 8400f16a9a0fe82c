// The activations on vectors. NaN stays NaN, as in torch.nn.functional.
#pragma once

#include "cpu/kernels/args.h"
#include "cpu/kernels/simd.h"

namespace dwconv::DWCONV_ISA {

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a minimax polynomial of degree 6 in r (relative error 3e-9), times 2^n. In float32
// within 8e-8; infinity from 88.4 on, where n is 128, and no smaller than the smallest normal number.
DWCONV_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, found in the low bits
  const Vec<float> clamped = at_least(at_most(x, 89.0f), -87.33f);
  const Vec<float> rounded = clamped * 1.44269504f + kRound;
  const Vec<float> n = rounded - kRound;
  Vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = r * 1.38145785e-3f + 8.36874321e-3f;
  poly = poly * r + 4.16683902e-2f;
  poly = poly * r + 1.66665204e-1f;
  poly = poly * r + 4.99999934e-1f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  return poly * (Vec<float>)(((U32)rounded + 127u) << 23);
}

// The normal distribution's cumulative function: 1/2 + x P(x^2) / Q(x^2), a minimax fit of its difference from 1/2 for |x| <= 5.5
// (relative error 2e-8). In float32 within 2e-7; torch's own within 3.5e-7. Below -5.5, where it is less than 2e-8, it is zero.
DWCONV_INLINE Vec<float> normal_cdf(Vec<float> x) {
  constexpr float kFar = 5.5f;
  const Vec<float> near = at_most(at_least(x, -kFar), kFar), u = near * near;
  Vec<float> p = u * 2.29287389e-8f + 6.30198997e-6f;
  Vec<float> q = u * 1.19898696e-6f + 7.2181128e-5f;
  p = p * u + 1.64616077e-4f, q = q * u + 1.86088677e-3f;
  p = p * u + 4.65174351e-3f, q = q * u + 2.84184664e-2f;
  p = p * u + 3.3462909e-2f, q = q * u + 2.50545474e-1f;
  p = p * u + 3.98942274e-1f, q = q * u + 1.0f;
  return x <= -kFar ? Vec<float>{} : near * p / q + 0.5f;
}

#define DWCONV_LANEWISE(name, expression)         \
  DWCONV_INLINE Vec<double> name(Vec<double> x) { \
    Vec<double> result = x;                       \
    for (int i = 0; i < kLanes<double>; ++i) {    \
      const double lane = x[i];                   \
      result[i] = expression;                     \
    }                                             \
    return result;                                \
  }
DWCONV_LANEWISE(exp, __builtin_exp(lane))
DWCONV_LANEWISE(normal_cdf, 0.5 * __builtin_erfc(lane * -0.70710678118654752440))
#undef DWCONV_LANEWISE

template <class A>
DWCONV_INLINE Vec<A> activate(Vec<A> x, const Activation& activation) {
  const Vec<A> zero = {};
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return x;
    case ActivationKind::kRelu:
      return at_least(x, A(0));
    case ActivationKind::kRelu6:
      return at_most(at_least(x, A(0)), A(6));
    case ActivationKind::kSilu:
      return x / (A(1) + exp(-x));
    case ActivationKind::kHardswish:
      return x * at_most(at_least(x + A(3), A(0)), A(6)) * A(1.0 / 6);
    case ActivationKind::kGelu:
      return x * normal_cdf(x);
    case ActivationKind::kGeluTanh: {
      // 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const Vec<A> u = A(0.79788456080286535588) * (x + A(0.044715) * x * x * x);
      return x / (A(1) + exp(A(-2) * u));
    }
    case ActivationKind::kLeakyRelu:
      return x < zero ? x * A(activation.slope) : x;
  }
  return x;
}

// Beyond it e^-x is next to nothing, and a product of the two would be something again.
template <class A>
inline constexpr A kFarGate = sizeof(A) == sizeof(float) ? 80 : 700;
template <class A>
inline constexpr A kFarNormal = sizeof(A) == sizeof(float) ? 20 : 60;  // the same of the normal distribution
template <class A>
DWCONV_INLINE Vec<A> within(Vec<A> x, A limit) {
  return at_least(at_most(x, limit), -limit);
}

// 1 / (1 + e^-x) and one less it, neither by a difference that cancels.
template <class A>
struct Gate {
  Vec<A> open, shut;
};
template <class A>
DWCONV_INLINE Gate<A> sigmoid(Vec<A> x) {
  const Vec<A> e = exp(at_most(-x, kFarGate<A>));
  const Vec<A> open = A(1) / (A(1) + e);
  return {open, e * open};
}

// grad times the activation's derivative at x; at a kink what torch.nn.functional's backward takes.
template <class A>
DWCONV_INLINE Vec<A> activate_backward(Vec<A> grad, Vec<A> x, const Activation& activation) {
  const Vec<A> zero = {};
  const Vec<A> one = broadcast(A(1));
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return grad;
    case ActivationKind::kRelu:
      return x <= zero ? zero : grad;
    case ActivationKind::kRelu6:
      grad = x <= zero ? zero : grad;
      return x >= A(6) ? zero : grad;
    case ActivationKind::kSilu: {
      const Gate<A> gate = sigmoid<A>(x);
      return grad * gate.open * (within<A>(x, kFarGate<A>) * gate.shut + A(1));
    }
    case ActivationKind::kHardswish: {
      const Vec<A> slope = x * A(1.0 / 3) + A(0.5);
      return grad * (x <= A(-3) ? zero : x < A(3) ? slope : one);
    }
    case ActivationKind::kGelu: {  // the normal distribution and x times its density
      const Vec<A> near = within<A>(x, kFarNormal<A>);
      const Vec<A> density = A(0.39894228040143267794) * exp(near * near * A(-0.5));
      return grad * (normal_cdf(x) + near * density);
    }
    case ActivationKind::kGeluTanh: {
      x = within<A>(x, kFarNormal<A>);
      const Vec<A> u = A(0.79788456080286535588) * (x + A(0.044715) * x * x * x);
      const Gate<A> gate = sigmoid<A>(u + u);
      const Vec<A> du = A(0.79788456080286535588) * (A(0.134145) * x * x + A(1));
      return grad * gate.open * (A(2) * x * gate.shut * du + A(1));
    }
    case ActivationKind::kLeakyRelu:
      return x > zero ? grad : grad * A(activation.slope);
  }
  return grad;
}

template <class A, ActivationKind kKind>
DWCONV_INLINE void activate_each(Vec<A>* values, int count, double slope) {
  const Activation known = {kKind, slope};
  for (int i = 0; i < count; ++i) values[i] = activate<A>(values[i], known);
}

// Out of line: an exponential in each of a register tile's places would be most of the kernel. A loop for each activation keeps
// its constants in registers: 15 cycles for 16 elements of SiLU, with all of them in one loop 22 (Zen 4).
template <class A>
__attribute__((noinline)) void activate_array(Vec<A>* values, int count, const Activation& activation) {
  switch (activation.kind) {
    case ActivationKind::kSilu:
      return activate_each<A, ActivationKind::kSilu>(values, count, activation.slope);
    case ActivationKind::kHardswish:
      return activate_each<A, ActivationKind::kHardswish>(values, count, activation.slope);
    case ActivationKind::kGelu:
      return activate_each<A, ActivationKind::kGelu>(values, count, activation.slope);
    case ActivationKind::kGeluTanh:
      return activate_each<A, ActivationKind::kGeluTanh>(values, count, activation.slope);
    case ActivationKind::kLeakyRelu:
      return activate_each<A, ActivationKind::kLeakyRelu>(values, count, activation.slope);
    case ActivationKind::kIdentity:
    case ActivationKind::kRelu:
    case ActivationKind::kRelu6:
      return;  // clamp_all's
  }
}

// Those that only cut values off.
DWCONV_INLINE bool is_clamp(const Activation& act) {
  return act.kind == ActivationKind::kIdentity || act.kind == ActivationKind::kRelu || act.kind == ActivationKind::kRelu6;
}
template <class A, int kRows, int kColumns>
DWCONV_INLINE void clamp_all(Vec<A> (&values)[kRows][kColumns], const Activation& activation) {
  if (activation.kind == ActivationKind::kIdentity) return;
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) values[i][j] = at_least(values[i][j], A(0));
  }
  if (activation.kind == ActivationKind::kRelu) return;
  DWCONV_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DWCONV_UNROLL
    for (int j = 0; j < kColumns; ++j) values[i][j] = at_most(values[i][j], A(6));
  }
}

// A register tile at once, so that the choice of the activation is made once a tile.
template <class A, int kRows, int kColumns>
DWCONV_INLINE void activate_all(Vec<A> (&values)[kRows][kColumns], const Activation& activation) {
  if (is_clamp(activation)) return clamp_all<A>(values, activation);
  Vec<A> array[kRows * kColumns];
  DWCONV_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) array[i] = values[i / kColumns][i % kColumns];
  activate_array<A>(array, kRows * kColumns, activation);
  DWCONV_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) values[i / kColumns][i % kColumns] = array[i];
}

}  // namespace dwconv::DWCONV_ISA
