// One axis of a convolution, brought within numbers that its sizes bound. Plain arithmetic, no torch.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <numeric>

namespace dwconv {

// Output o reads through tap r the sample o * stride + r * dilation - pad, where that lies in the input. Such an (o, r) is called
// a read here; all other pairs fall on padding.
struct Axis {
  int64_t in, kernel, out, stride, pad, dilation;
};

// For b > 0.
constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// The outputs [first, last] that read through tap r; last < first where there is none.
struct Outputs {
  int64_t first, last;
};
constexpr Outputs outputs_of_tap(const Axis& a, int64_t r) {
  const int64_t origin = a.pad - r * a.dilation;
  return {std::max<int64_t>(-floor_div(-origin, a.stride), 0), std::min(floor_div(origin + a.in - 1, a.stride), a.out - 1)};
}

// An axis all of whose reads have the same a * o + b * r, with smaller numbers. Write stride = mu * a + e and
// dilation = mu * b + f: then mu multiplies a * o + b * r, the samples that are read depend on e and f alone, and any mu will do
// that keeps every other (o, r) off the image. e and f are small: two reads' samples differ by a multiple of b * stride - a *
// dilation = b * e - a * f, and both lie in the image.
inline Axis with_smaller_step(const Axis& x, int64_t o, int64_t r, int64_t a, int64_t b) {
  const int64_t mu = a > 0 ? x.stride / a : x.dilation;
  const int64_t e = x.stride - mu * a, f = x.dilation - mu * b;
  const __int128 enough = static_cast<__int128>(x.out) * e + static_cast<__int128>(x.kernel) * (f < 0 ? -f : f) + x.in;
  if (enough >= mu) return x;
  const int64_t least = static_cast<int64_t>(enough);
  Axis y = x;
  y.stride = least * a + e;
  y.dilation = least * b + f;
  y.pad = x.pad - (mu - least) * (a * o + b * r);
  return y;
}

// Strides and dilations up to this are never changed.
constexpr int64_t kMostUnchanged = 64;

// An axis with the same reads whose stride, padding and dilation the sizes bound, whatever they were: no kernel, plan or scratch
// computes with numbers larger than its tensors. Usual problems are returned unchanged. `out` is kept: it need not be what the
// new numbers give. The given ones must be such that in + 2 * pad fits 64 bits, and the filter the padded input.
inline Axis within_sizes(Axis x) {
  if (x.stride <= kMostUnchanged && x.dilation <= kMostUnchanged) return x;
  if (x.out == 1 && x.stride > kMostUnchanged) x.stride = 1;  // one phase in the input gradient
  if (x.kernel == 1) x.dilation = 1;
  // The last output's last tap at the sample before the image: padding for all.
  const auto clear_of_image = [](Axis& y) { y.pad = std::min(y.pad, (y.out - 1) * y.stride + (y.kernel - 1) * y.dilation + 1); };
  if (x.dilation <= x.in && x.stride <= x.in + (x.kernel - 1) * x.dilation) {
    clear_of_image(x);
    return x;
  }
  // The first read, and the direction in which the others lie.
  int64_t o = 0, r = -1, step_o = 0, step_r = 0;
  for (int64_t tap = 0; tap < x.kernel; ++tap) {
    const Outputs met = outputs_of_tap(x, tap);
    for (int64_t output : {met.first, met.last}) {
      if (met.last < met.first) continue;
      if (r < 0) o = output, r = tap;
      const int64_t to_o = output - o, to_r = tap - r;
      if (step_o == 0 && step_r == 0) {
        step_o = to_o, step_r = to_r;
      } else if (static_cast<__int128>(to_o) * step_r != static_cast<__int128>(to_r) * step_o) {
        return x;  // three that are not on a line: they make stride and dilation at most in * (out + kernel)
      }
    }
  }
  if (r < 0) {
    x.stride = x.dilation = 1;
    x.pad = x.out + x.kernel;
    return x;
  }
  if (step_o != 0 || step_r != 0) {
    const int64_t common = std::gcd(step_o, step_r);
    return with_smaller_step(x, o, r, std::abs(step_r) / common, std::abs(step_o) / common);
  }
  // One read: a stride and a dilation that give every other pair of output and tap a sample of its own outside the image.
  const __int128 dilation = x.kernel > 1 ? x.in + 1 : 1;
  const __int128 stride = x.out > 1 ? x.in + (x.kernel - 1) * dilation + 1 : 1;
  const auto span = [&](__int128 s, __int128 d) { return (x.out - 1) * s + (x.kernel - 1) * d; };
  if (span(stride, dilation) >= span(x.stride, x.dilation)) return x;
  const int64_t sample = o * x.stride + r * x.dilation - x.pad;
  x.stride = static_cast<int64_t>(stride), x.dilation = static_cast<int64_t>(dilation);
  x.pad = o * x.stride + r * x.dilation - sample;
  return x;
}

}  // namespace dwconv
