// The activations of the fused block, as torch.nn.functional has them (gelu: Hendrycks and Gimpel 2016; hardswish: Howard et al.
// 2019).
#pragma once

#include <math.h>

#include "cuda/kernels/device.cuh"

namespace dwconv::cuda {

// Those that is_inlined does not name.
template <class A>
DWCONV_DEVICE A activate(const Activation& activation, A x) {
  switch (activation.kind) {
    case ActivationKind::kSilu:
      return x / (A(1) + exp(-x));
    case ActivationKind::kGelu:
      return A(0.5) * x * erfc(x * A(-0.70710678118654752));  // 1 + erf would cancel below -3
    case ActivationKind::kGeluTanh:
      return x / (A(1) + exp(A(-1.5957691216057308) * (x + A(0.044715) * x * x * x)));  // 1 + tanh(z) = 2 / (1 + e^-2z)
    default:
      return x;
  }
}

// Those that is_inlined names; the others leave the values as they are.
template <class A, int N>
DWCONV_DEVICE void activate_short(const Activation& activation, A (&x)[N]) {
  if (activation.kind == ActivationKind::kIdentity) return;
  if (activation.kind == ActivationKind::kRelu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = greater(x[i], A(0));
  } else if (activation.kind == ActivationKind::kRelu6) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = lesser(greater(x[i], A(0)), A(6));
  } else if (activation.kind == ActivationKind::kLeakyRelu) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] < A(0) ? x[i] * static_cast<A>(activation.slope) : x[i];
  } else if (activation.kind == ActivationKind::kHardswish) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] * lesser(greater(x[i] + A(3), A(0)), A(6)) * A(1.0 / 6.0);
  }
}

// Of several values, with one look at what it is. A long activation's code is there for a quarter of the values, which move up in
// between: for all of them it would be a large part of the fused kernels' code.
template <class A, int N>
DWCONV_DEVICE void activate_all(const Activation& activation, A (&x)[N]) {
  if (is_inlined(activation.kind)) {
    activate_short(activation, x);
    return;
  }
  constexpr int kStep = N > 4 ? N / 4 : 1;
  static_assert(N % kStep == 0);
#pragma unroll 1
  for (int turn = 0; turn < N / kStep; ++turn) {
    A done[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {  // one after the other: all at once they would take the registers of the sums beside them
      in_order(x[i]);
      done[i] = activate(activation, x[i]);
      in_order(done[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i + kStep < N ? x[i + kStep] : done[i + kStep - N];
  }
}

template <class A, int M, int N, class Function>
DWCONV_DEVICE void flattened(A (&x)[M][N], const Function& function) {
  A flat[M * N];
#pragma unroll
  for (int i = 0; i < M * N; ++i) flat[i] = x[i / N][i % N];
  function(flat);
#pragma unroll
  for (int i = 0; i < M * N; ++i) x[i / N][i % N] = flat[i];
}
template <class A, int M, int N>
DWCONV_DEVICE void activate_all(const Activation& activation, A (&x)[M][N]) {
  flattened(x, [&](A(&flat)[M* N]) { activate_all(activation, flat); });
}
template <class A, int M, int N>
DWCONV_DEVICE void activate_short(const Activation& activation, A (&x)[M][N]) {
  flattened(x, [&](A(&flat)[M* N]) { activate_short(activation, flat); });
}
template <class A, int L, int M, int N>
DWCONV_DEVICE void activate_short(const Activation& activation, A (&x)[L][M][N]) {
  A flat[L * M][N];
#pragma unroll
  for (int i = 0; i < L * M * N; ++i) flat[i / N][i % N] = x[i / (M * N)][i / N % M][i % N];
  activate_short(activation, flat);
#pragma unroll
  for (int i = 0; i < L * M * N; ++i) x[i / (M * N)][i / N % M][i % N] = flat[i / N][i % N];
}

template <class T>
DWCONV_KERNEL(kMostThreads, 1)
activate_values(ActivateArgs args) {
  for (int64_t i = static_cast<int64_t>(block_index()) * block_size() + thread_index(); i < args.count;
       i += grid_size() * block_size()) {
    const accumulate_t<T> value = activate(args.activation, load_one(static_cast<const T*>(args.input) + i));
    store(static_cast<T*>(args.output) + i, Vector<T, 1>{{from_accumulate<T>(value)}});
  }
}

}  // namespace dwconv::cuda
