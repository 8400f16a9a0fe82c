// The activations on vectors. NaN stays NaN, as in torch.nn.functional.
#pragma once

#include "../../problem.h"
#include "simd.h"

namespace dwconv::DWCONV_ISA {

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r (Cephes expf's coefficients), times 2^n in two
// halves so that neither leaves the exponent's range. Relative error below 2 ulp; 0 below -87.33, infinity above 88.72.
DWCONV_INLINE Vec<float> exp(Vec<float> x) {
  Vec<float> clamped = x > 88.72f ? broadcast(88.72f) : x;
  clamped = clamped < -87.33f ? broadcast(-87.33f) : clamped;
  const Vec<float> n = clamped * 1.44269504f + 12582912.0f - 12582912.0f;  // round to nearest
  Vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  typedef typename VecOf<float>::mask Int;
  const Int whole = __builtin_convertvector(n, Int);
  const Int half = whole >> 1;
  Vec<float> result = poly * (Vec<float>)((half + 127) << 23) * (Vec<float>)((whole - half + 127) << 23);
  result = x > 88.72f ? broadcast(__builtin_inff()) : result;
  result = x < -87.33f ? broadcast(0.0f) : result;
  return x != x ? x : result;
}

// erfc by the Chebyshev fit of Numerical Recipes (erfcc), relative error below 1.2e-7 for every x.
DWCONV_INLINE Vec<float> erfc(Vec<float> x) {
  const Vec<float> z = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + 0.5f * z);
  Vec<float> poly = t * 0.17087277f - 0.82215223f;
  poly = poly * t + 1.48851587f;
  poly = poly * t - 1.13520398f;
  poly = poly * t + 0.27886807f;
  poly = poly * t - 0.18628806f;
  poly = poly * t + 0.09678418f;
  poly = poly * t + 0.37409196f;
  poly = poly * t + 1.00002368f;
  poly = poly * t - 1.26551223f;
  const Vec<float> result = t * exp(poly - z * z);
  return x < 0.0f ? 2.0f - result : result;
}

#define DWCONV_LANEWISE(name, expression)                                  \
  DWCONV_INLINE Vec<double> name(Vec<double> x) {                          \
    Vec<double> result = x;                                                \
    for (int i = 0; i < kLanes<double>; ++i) result[i] = expression(x[i]); \
    return result;                                                         \
  }
DWCONV_LANEWISE(exp, __builtin_exp)
DWCONV_LANEWISE(erfc, __builtin_erfc)
#undef DWCONV_LANEWISE

template <class A>
DWCONV_INLINE Vec<A> activate(Vec<A> x, const Activation& activation) {
  const Vec<A> zero = {};
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return x;
    case ActivationKind::kRelu:
      return x < zero ? zero : x;
    case ActivationKind::kRelu6:
      x = x < zero ? zero : x;
      return x > A(6) ? broadcast(A(6)) : x;
    case ActivationKind::kSilu:
      return x / (A(1) + exp(-x));
    case ActivationKind::kHardswish: {
      Vec<A> gate = x + A(3);
      gate = gate < zero ? zero : gate;
      gate = gate > A(6) ? broadcast(A(6)) : gate;
      return x * gate / A(6);
    }
    case ActivationKind::kGelu:
      return x * A(0.5) * erfc(x * A(-0.70710678118654752440));
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

// Out of line: an exponential in each of a register tile's places would be most of the kernel.
template <class A>
__attribute__((noinline)) void activate_array(Vec<A>* values, int count, const Activation& activation) {
  for (int i = 0; i < count; ++i) values[i] = activate<A>(values[i], activation);
}

// A register tile at once, so that the choice of the activation is made once a tile.
template <class A, int kRows, int kColumns>
DWCONV_INLINE void activate_all(Vec<A> (&values)[kRows][kColumns], const Activation& activation) {
  if (activation.kind == ActivationKind::kIdentity) return;
  if (activation.kind == ActivationKind::kRelu) {
    const Vec<A> zero = {};
    DWCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DWCONV_UNROLL
      for (int j = 0; j < kColumns; ++j) values[i][j] = values[i][j] < zero ? zero : values[i][j];
    }
    return;
  }
  Vec<A> array[kRows * kColumns];
  DWCONV_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) array[i] = values[i / kColumns][i % kColumns];
  activate_array<A>(array, kRows * kColumns, activation);
  DWCONV_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) values[i / kColumns][i % kColumns] = array[i];
}

}  // namespace dwconv::DWCONV_ISA
