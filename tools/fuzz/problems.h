// Problems of any numbers that the ops' checks let through (csrc/common/checks.h), decoded from a fuzzer's bytes.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>
#include <stdio.h>
#include <stdlib.h>

#include <optional>
#include <utility>

#include "common/axis.h"
#include "common/problem.h"

namespace dwconv::fuzz {

// What must hold of every plan; a failure ends the fuzzer with the input that made it.
#define HOLDS(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                       \
    }                                                                                \
  } while (false)

// Of every magnitude alike: most numbers below 2^40 are as long as that, and say little.
inline int64_t number(FuzzedDataProvider& from, int64_t least, int64_t most) {
  int bits = 0;
  while (bits < 62 && (int64_t{1} << bits) <= most - least) ++bits;
  const int kept = from.ConsumeIntegralInRange<int>(0, bits);
  const int64_t value = from.ConsumeIntegralInRange<int64_t>(0, kept == 0 ? 0 : (int64_t{1} << kept) - 1);
  return least + (value > most - least ? most - least : value);
}

constexpr double kMostBytes = 17592186044416.0;  // 2^44: of a tensor, which has to be somewhere

inline bool allocable(const DepthwiseProblem& p, std::initializer_list<int64_t> sizes, double most = kMostBytes) {
  double bytes = static_cast<double>(element_size(p.dtype));
  for (int64_t size : sizes) bytes *= static_cast<double>(size > 1 ? size : 1);
  return bytes < most;
}

// One side: as output_size and within_sizes make it. Nothing where the checks refuse it.
inline std::optional<Axis> axis(FuzzedDataProvider& from, bool transposed) {
  constexpr int64_t kMost = int64_t{1} << 46, kAny = int64_t{1} << 62;
  Axis a = {};
  a.in = number(from, 1, kMost), a.kernel = number(from, 1, kMost);
  a.stride = number(from, 1, kAny), a.dilation = number(from, 1, kAny), a.pad = number(from, 0, kAny);
  using Wide = __int128;
  const Wide reach = Wide(a.dilation) * (a.kernel - 1) + 1;
  if (transposed) {  // `in` is the output's side: the forward convolution's input
    const int64_t more = number(from, 0, std::max(a.stride, a.dilation) - 1), samples = a.in;
    const Wide out = Wide(samples - 1) * a.stride - 2 * Wide(a.pad) + reach + more;
    if (out <= 0 || out >= (Wide(1) << 48) || a.pad > (INT64_MAX - static_cast<int64_t>(out)) / 2) return {};
    a.in = static_cast<int64_t>(out), a.out = samples;
    return within_sizes(a);
  }
  const int64_t after = from.ConsumeBool() ? a.pad : number(from, 0, kAny), most = (INT64_MAX - a.in) / 2;
  if (a.pad > most || after > most) return {};
  const Wide padded = Wide(a.in) + a.pad + after;
  if (reach > padded) return {};
  a.out = static_cast<int64_t>((padded - reach) / a.stride + 1);
  return within_sizes(a);
}

// The strides of dense tensors, as the ops allocate outputs.
inline void set_dense(DepthwiseProblem* p, int64_t in_channels, int64_t out_channels) {
  const bool last = p->layout == Layout::kNHWC;
  p->in_stride_w = last ? in_channels : 1, p->in_stride_h = p->in_w * p->in_stride_w;
  p->in_stride_c = last ? 1 : p->in_h * p->in_w, p->in_stride_n = in_channels * p->in_h * p->in_w;
  p->out_stride_w = last ? out_channels : 1, p->out_stride_h = p->out_w * p->out_stride_w;
  p->out_stride_c = last ? 1 : p->out_h * p->out_w, p->out_stride_n = out_channels * p->out_h * p->out_w;
}

// A problem whose input, filters and output can be allocated; of a transposed convolution as backward passes have it, by the
// forward convolution's sides.
template <class Problem>
std::optional<Problem> problem(FuzzedDataProvider& from, int64_t multiplier, bool transposed) {
  Problem p;
  p.dtype = p.out_dtype = static_cast<DType>(from.ConsumeIntegralInRange<int>(0, 3));
  p.layout = from.ConsumeBool() ? Layout::kNHWC : Layout::kNCHW;
  p.batch = number(from, 1, int64_t{1} << 46), p.channels = number(from, 1, int64_t{1} << 46);
  const std::optional<Axis> h = axis(from, transposed), w = axis(from, transposed);
  if (!h || !w) return {};
  p.in_h = h->in, p.kernel_h = h->kernel, p.out_h = h->out, p.stride_h = h->stride, p.pad_h = h->pad, p.dilation_h = h->dilation;
  p.in_w = w->in, p.kernel_w = w->kernel, p.out_w = w->out, p.stride_w = w->stride, p.pad_w = w->pad, p.dilation_w = w->dilation;
  if (!allocable(p, {p.batch, p.channels, multiplier, p.in_h, p.in_w}) ||
      !allocable(p, {p.batch, p.channels, multiplier, p.out_h, p.out_w}) ||
      !allocable(p, {p.channels, multiplier, p.kernel_h, p.kernel_w}))
    return {};
  p.activation.kind = static_cast<ActivationKind>(from.ConsumeIntegralInRange<int>(0, 7));
  set_dense(&p, p.channels, p.channels * multiplier);
  return p;
}

// Of an input that failed: FUZZ_PRINT=1 program file.
inline void print(const DepthwiseProblem& p) {
  fprintf(
      stderr,
      "%s %s, %lldx%lld of %lldx%lld to %lldx%lld, filter %lldx%lld, stride %lldx%lld, dilation %lldx%lld, padding %lld, %lld\n",
      dtype_name(p.dtype), p.layout == Layout::kNHWC ? "channels_last" : "NCHW", (long long)p.batch, (long long)p.channels,
      (long long)p.in_h, (long long)p.in_w, (long long)p.out_h, (long long)p.out_w, (long long)p.kernel_h, (long long)p.kernel_w,
      (long long)p.stride_h, (long long)p.stride_w, (long long)p.dilation_h, (long long)p.dilation_w, (long long)p.pad_h,
      (long long)p.pad_w);
}

}  // namespace dwconv::fuzz
