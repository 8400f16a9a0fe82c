// The derivatives of the activations (activate.cuh), at a kink what torch.nn.functional's backward takes.
#pragma once

#include "cuda/kernels/activate.cuh"

namespace dwconv::cuda {

// Beyond these a sigmoid and a normal distribution are zero or one, and their products with x next to nothing.
template <class A>
constexpr A kFarGate = sizeof(A) == sizeof(float) ? 80 : 700;
template <class A>
constexpr A kFarNormal = sizeof(A) == sizeof(float) ? 20 : 60;

template <class A>
DWCONV_DEVICE A within(A x, A limit) {
  return lesser(greater(x, -limit), limit);
}

template <class A>
DWCONV_DEVICE A long_slope(ActivationKind kind, A x) {
  const bool silu = kind == ActivationKind::kSilu;
  x = within(x, silu ? kFarGate<A> : kFarNormal<A>);
  if (kind == ActivationKind::kGelu) {  // the normal distribution and x times its density
    return A(0.5) * erfc(x * A(-0.70710678118654752)) + x * A(0.39894228040143267794) * exp(x * x * A(-0.5));
  }
  // x times a sigmoid of z: of x itself, or of twice the argument of gelu_tanh's tanh.
  const A z = silu ? x : A(1.5957691216057308) * (x + A(0.044715) * x * x * x);
  const A dz = silu ? A(1) : A(1.5957691216057308) * (A(0.134145) * x * x + A(1));
  const A open = A(1) / (A(1) + exp(-z)), shut = A(1) / (A(1) + exp(z));
  return open * (x * dz * shut + A(1));
}

// grad *= the activation's derivative at x.
template <class A, int N>
DWCONV_DEVICE void activate_backward(const Activation& activation, const A (&x)[N], A (&grad)[N]) {
  switch (activation.kind) {
    case ActivationKind::kIdentity:
      return;
    case ActivationKind::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = x[i] <= A(0) ? A(0) : grad[i];
      return;
    case ActivationKind::kRelu6:
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = x[i] <= A(0) || x[i] >= A(6) ? A(0) : grad[i];
      return;
    case ActivationKind::kHardswish:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        grad[i] *= x[i] <= A(-3) ? A(0) : x[i] < A(3) ? x[i] * A(1.0 / 3) + A(0.5) : A(1);
      }
      return;
    case ActivationKind::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = x[i] > A(0) ? grad[i] : grad[i] * static_cast<A>(activation.slope);
      return;
    default:
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] *= long_slope(activation.kind, x[i]);
  }
}

}  // namespace dwconv::cuda
