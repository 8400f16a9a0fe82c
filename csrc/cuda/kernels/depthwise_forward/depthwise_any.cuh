// Depthwise forward and input gradient for any filter, stride, dilation and channel multiplier M, both layouts:
//
//   forward          out[n, o, y, x] = bias[o] + sum_{r, s} w[o, r, s] * in[n, o / M, y*S_h + r*D_h - P_h, ...]
//   backward_input   out[n, c, y, x] = sum_{m, r, s with j*S_h + r*D_h - P_h = y, ...} w[c*M + m, r, s] * in[n, c*M + m, j, ...]
//   transposed       out[n, o, y, x] = bias[o] + sum_{r, s with j*S_h + r*D_h - P_h = y, ...} w[o, r, s] * in[n, o / M, j, ...]
//
// A thread owns 16 bytes of channels of an output pixel (channels_last, M = 1, aligned) or one output element, and reads
// global memory through L1; neighbouring threads have neighbouring outputs, so that their reads coalesce. The kernel for what no
// tiled kernel takes; it is right for every problem. Traffic: input and output once where L1 and L2 hold the filter's rows.
#pragma once

#include "cuda/kernels/depthwise_forward/depthwise_nhwc.cuh"

namespace dwconv::cuda {

// The sample that tap r joins to output i along one axis, or -1.
struct ForwardAxis {
  static DWCONV_DEVICE int sample(int i, int r, int stride, int dilation, int pad, int size) {
    const int64_t at = static_cast<int64_t>(i) * stride + static_cast<int64_t>(r) * dilation - pad;
    return at >= 0 && at < size ? static_cast<int>(at) : -1;
  }
};
struct TransposedAxis {
  static DWCONV_DEVICE int sample(int i, int r, int stride, int dilation, int pad, int size) {
    const int64_t at = static_cast<int64_t>(i) + pad - static_cast<int64_t>(r) * dilation;
    if (at < 0 || at >= static_cast<int64_t>(size) * stride) return -1;
    const unsigned q = static_cast<unsigned>(static_cast<uint64_t>(at) / static_cast<unsigned>(stride));
    return static_cast<int64_t>(q) * stride == at ? static_cast<int>(q) : -1;
  }
};

// Whether output channel o reads input channel o / M, not M of them.
template <class Axis>
DWCONV_DEVICE bool spreads(const DepthwiseTileArgs& args) {
  return std::is_same_v<Axis, ForwardAxis> || args.spreads != 0;
}

// V channels from `c` of the output sample (n, y, x); with V > 1 there is no multiplier.
template <class T, class Axis, int V>
DWCONV_DEVICE void correlate(const DepthwiseTileArgs& args, int64_t n, int64_t c, int y, int x, accumulate_t<T> (&acc)[V]) {
  using A = accumulate_t<T>;
  const DepthwiseProblem& p = args.problem;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int64_t taps = p.kernel_h * p.kernel_w, multiplier = args.multiplier;
  const bool one = spreads<Axis>(args);
  const int planes = one ? 1 : static_cast<int>(multiplier);
  for (int m = 0; m < planes; ++m) {
    const int64_t plane = one ? (V > 1 ? c : c / multiplier) : c * multiplier + m;
    const int64_t filter = one ? c : plane;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + plane * p.in_stride_c;
    const T* const weight = static_cast<const T*>(args.weight) + filter * taps;
    for (int r = 0; r < kernel_h; ++r) {
      const int row = Axis::sample(y, r, static_cast<int>(p.stride_h), static_cast<int>(p.dilation_h), static_cast<int>(p.pad_h),
                                   static_cast<int>(p.in_h));
      if (row < 0) continue;
      for (int s = 0; s < kernel_w; ++s) {
        const int column = Axis::sample(x, s, static_cast<int>(p.stride_w), static_cast<int>(p.dilation_w),
                                        static_cast<int>(p.pad_w), static_cast<int>(p.in_w));
        if (column < 0) continue;
        const Vector<T, V> value = load<V>(image + row * p.in_stride_h + column * p.in_stride_w);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int64_t tap = r * kernel_w + s;
          const A w = load_one(weight + v * taps + (args.flipped ? taps - 1 - tap : tap));
          acc[v] += w * to_accumulate(value.value[v]);
        }
      }
    }
  }
}

template <class T, class Axis, int V>
DWCONV_DEVICE void any_nhwc(const DepthwiseTileArgs& args) {
  const DepthwiseProblem& p = args.problem;
  const int64_t channels = p.channels * (spreads<Axis>(args) ? args.multiplier : 1);
  const int64_t vectors = channels / V, pixels = p.batch * p.out_h * p.out_w, total = pixels * vectors;
  // Runs of 128 bytes of channels where they are whole: a block then has more neighbouring pixels, which read the same samples.
  constexpr int64_t kRun = 128 / (V * static_cast<int64_t>(sizeof(T)));
  const int64_t run = vectors % kRun == 0 ? kRun : vectors;
  for (int64_t i = static_cast<int64_t>(block_index()) * block_size() + thread_index(); i < total;
       i += grid_size() * block_size()) {
    const int64_t each = divided(i, run), slab = divided(each, pixels), pixel = each - slab * pixels;
    const int64_t c = (slab * run + i - each * run) * V;
    const int64_t line = divided(pixel, p.out_w), n = divided(line, p.out_h);
    const int x = static_cast<int>(pixel - line * p.out_w), y = static_cast<int>(line - n * p.out_h);
    accumulate_t<T> acc[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      acc[v] = args.bias != nullptr ? load_bias<T>(args.bias, c + v, args.wide_bias) : accumulate_t<T>(0);
    }
    correlate<T, Axis, V>(args, n, c, y, x, acc);
    T* const to = static_cast<T*>(args.output) + n * p.out_stride_n + y * p.out_stride_h + x * p.out_stride_w + c;
    activate_short(p.activation, acc);
    store_channels<T, V>(to, acc, V, true);
  }
}

template <class T, class Axis>
DWCONV_KERNEL(kMostThreads, 1)
depthwise_any_nhwc(DepthwiseTileArgs args) {
  if (args.tiling.aligned && args.multiplier == 1) {
    any_nhwc<T, Axis, kChunkValues<T>>(args);
  } else {
    any_nhwc<T, Axis, 1>(args);
  }
}

template <class T, class Axis>
DWCONV_KERNEL(kMostThreads, 1)
depthwise_any_nchw(DepthwiseTileArgs args) {
  const DepthwiseProblem& p = args.problem;
  const int64_t channels = p.channels * (spreads<Axis>(args) ? args.multiplier : 1);
  const int64_t total = p.batch * channels * p.out_h * p.out_w;
  for (int64_t i = static_cast<int64_t>(block_index()) * block_size() + thread_index(); i < total;
       i += grid_size() * block_size()) {
    const int64_t line = divided(i, p.out_w), plane = divided(line, p.out_h), n = divided(plane, channels),
                  c = plane - n * channels;
    const int x = static_cast<int>(i - line * p.out_w), y = static_cast<int>(line - plane * p.out_h);
    accumulate_t<T> acc[1] = {args.bias != nullptr ? load_bias<T>(args.bias, c, args.wide_bias) : accumulate_t<T>(0)};
    correlate<T, Axis, 1>(args, n, c, y, x, acc);
    T* const to = static_cast<T*>(args.output) + n * p.out_stride_n + c * p.out_stride_c + y * p.out_stride_h;
    activate_short(p.activation, acc);
    store_channels<T, 1>(to + x * p.out_stride_w, acc, 1, true);
  }
}

}  // namespace dwconv::cuda
