// BatchNorm by the batch's own statistics and the activation after it, forward and backward; what the kernels of both share.
//
//   mean = sum x / n, variance = sum (x - mean)^2 / n, scale = weight / sqrt(variance + eps), z = (x - mean) scale + bias
//   forward   y = act(z)
//   backward  g = dy act'(z), dbias = sum g, dweight = sum g (x - mean) / sqrt(variance + eps)
//             dx = scale (g - dbias / n - (x - mean) slope), slope = dweight / (n sqrt(variance + eps))
//
// Each pass takes sums of all channels, a part of them a block (batch_norm_sums.cuh), joins the parts in their order, and goes
// over the tensors again (batch_norm_values.cuh). Backward computes z again, so that neither z nor y is kept for it. A bit an
// element for what ReLU lets through would be read beside x, which the gradient of x wants anyway.
//
// Traffic: forward x twice and y, backward x and dy twice and dx.
// Source: Ioffe and Szegedy, arXiv:1502.03167.
#pragma once

#include "cuda/kernels/batch_norm/activate_backward.cuh"
#include "cuda/kernels/batch_norm/args.h"

namespace dwconv::cuda {

// The place of a thread in its block.
struct NormThread {
  int row, lane;
  bool works;

  DWCONV_DEVICE explicit NormThread(const BatchNormArgs& args)
      : row(thread_index() / args.lanes), lane(thread_index() - row * args.lanes), works(row < args.rows) {}
};

// The constants of V channels from `first` on, or with kSame of one channel.
template <class A, int V, bool kSame>
struct ChannelConstants {
  static constexpr int kCount = kSame ? 1 : V;
  A mean[kCount], scale[kCount], bias[kCount], inv_std[kCount];

  DWCONV_DEVICE ChannelConstants(const BatchNormArgs& args, int64_t first) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int64_t c = first + v;
      mean[v] = value(args.mean, c, A(0));
      inv_std[v] = A(1) / sqrt(value(args.variance, c, A(1)) + static_cast<A>(args.eps));
      scale[v] = inv_std[v] * value(args.weight, c, A(1));
      bias[v] = value(args.bias, c, A(0));
    }
  }
  static DWCONV_DEVICE A value(const void* values, int64_t c, A otherwise) {
    return values == nullptr ? otherwise : load_one(static_cast<const A*>(values) + c);
  }
  DWCONV_DEVICE int at(int v) const { return kSame ? 0 : v; }

  DWCONV_DEVICE void normalise(const A (&centred)[V], A (&z)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = centred[v] * scale[at(v)] + bias[at(v)];
  }
  // x becomes x - mean, and dy the gradient of z.
  DWCONV_DEVICE void centre_and_differentiate(const Activation& activation, A (&x)[V], A (&dy)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] -= mean[at(v)];
    A z[V];
    normalise(x, z);
    activate_backward(activation, z, dy);
  }
};

// Runs of elements, `step` apart, from the element `first` on.
struct Runs {
  int64_t first, step;
  int count;
};

// The thread's runs: all pixels of its part of the batch that it has, or its share of a plane. V is their length.
DWCONV_DEVICE Runs runs_of_pixels(const BatchNormArgs& args, const NormThread& thread, int64_t channel, int64_t part) {
  const int64_t pixels = args.batch * args.pixels;
  const int64_t begin = divided(pixels * part, args.parts) + thread.row, end = divided(pixels * (part + 1), args.parts);
  const bool some = thread.works && channel < args.channels && begin < end;
  return {begin * args.channels + channel, static_cast<int64_t>(args.rows) * args.channels,
          some ? static_cast<int>(divided(end - begin + args.rows - 1, args.rows)) : 0};
}
template <int V>
DWCONV_DEVICE Runs runs_of_plane(const BatchNormArgs& args, const NormThread& thread, int64_t plane, int64_t piece) {
  const int64_t begin = piece * args.piece + thread.lane * V;
  const int64_t end = args.pixels < (piece + 1) * args.piece ? args.pixels : (piece + 1) * args.piece;
  const int step = args.lanes * V;
  return {plane * args.pixels + begin, step, thread.works && begin < end ? static_cast<int>((end - begin + step - 1) / step) : 0};
}

// body(x, dy, element) for each of them, of V values in the type of the sums; the loads of two are on their way together.
template <class T, int V, class Body>
DWCONV_DEVICE void for_each_gradient(const BatchNormArgs& args, const Runs& runs, const Body& body) {
  constexpr int kRuns = 2;
  for (int i = 0; i < runs.count; i += kRuns) {
    const int64_t at = runs.first + i * runs.step;
    Packed<T, V> in[kRuns], grad[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const bool wanted = i + r < runs.count;
      const int64_t element = at + (wanted ? r * runs.step : 0);
      in[r] = load_packed<V>(static_cast<const T*>(args.input) + element, wanted);
      grad[r] = load_packed<V>(static_cast<const T*>(args.grad_output) + element, wanted);
    }
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (i + r >= runs.count) break;
      accumulate_t<T> x[V], dy[V];
      widen(in[r], x);
      widen(grad[r], dy);
      body(x, dy, at + r * runs.step);
    }
  }
}

}  // namespace dwconv::cuda
