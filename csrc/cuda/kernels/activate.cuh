// The activations of the fused block, as torch.nn.functional has them (gelu: Hendrycks and Gimpel 2016; hardswish: Howard et al.
// 2019).
#pragma once

#include <math.h>

#include "device.cuh"

namespace dwconv::cuda {

template <class A>
DWCONV_DEVICE A activate(const Activation& activation, A x) {
  switch (activation.kind) {
    case ActivationKind::kRelu:
      return x < A(0) ? A(0) : x;  // NaN stays
    case ActivationKind::kRelu6:
      return x < A(0) ? A(0) : x > A(6) ? A(6) : x;
    case ActivationKind::kSilu:
      return x / (A(1) + exp(-x));
    case ActivationKind::kHardswish: {
      const A gate = x + A(3);
      return x * (gate < A(0) ? A(0) : gate > A(6) ? A(6) : gate) * A(1.0 / 6.0);
    }
    case ActivationKind::kGelu:
      return A(0.5) * x * erfc(x * A(-0.70710678118654752));  // 1 + erf would cancel below -3
    case ActivationKind::kGeluTanh:
      return x / (A(1) + exp(A(-1.5957691216057308) * (x + A(0.044715) * x * x * x)));  // 1 + tanh(z) = 2 / (1 + e^-2z)
    case ActivationKind::kLeakyRelu:
      return x < A(0) ? x * static_cast<A>(activation.slope) : x;
    default:
      return x;
  }
}

// The same of several values, with one look at what it is.
template <class A, int N>
DWCONV_DEVICE void activate_all(const Activation& activation, A (&x)[N]) {
  if (activation.kind == ActivationKind::kIdentity) return;
  if (activation.kind == ActivationKind::kRelu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] < A(0) ? A(0) : x[i];
    return;
  }
  if (activation.kind == ActivationKind::kRelu6) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] < A(0) ? A(0) : x[i] > A(6) ? A(6) : x[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {  // one after the other: all at once they would take the registers of the sums beside them
    in_order(x[i]);
    x[i] = activate(activation, x[i]);
    in_order(x[i]);
  }
}

}  // namespace dwconv::cuda
