// BatchNorm and activation in NCHW (batch_norm.h): a tile is a channel, whose second sweep finds in the caches what the first has
// read.
#pragma once

#include "cpu/kernels/batch_norm/batch_norm.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

// Elements of a piece in each pass. What forward's additions round is corrected, backward's additions are kept few.
inline constexpr int64_t kForwardPiece = 2048, kBackwardPiece = 512;

// A channel in pieces of about kPiece elements, several small planes or a part of a large one: body(first plane, planes, first
// pixel, pixels).
template <int64_t kPiece, class Body>
DWCONV_INLINE void for_each_piece(int64_t batch, int64_t pixels, const Body& body) {
  const int64_t planes = pixels < kPiece ? kPiece / pixels : 1;
  for (int64_t n = 0; n < batch; n += planes) {
    const int64_t together = batch - n < planes ? batch - n : planes;
    for (int64_t at = 0; at < pixels; at += kPiece) body(n, together, at, pixels - at < kPiece ? pixels - at : kPiece);
  }
}

template <class A, int kSlots>
DWCONV_INLINE A sum_slots(const Vec<A> (&sums)[kSlots]) {
  Vec<A> total = sums[0];
  for (int i = 1; i < kSlots; ++i) total += sums[i];
  return sum_lanes(total);
}

// A channel's planes are `pitch` elements apart.
template <class T>
DWCONV_INLINE Moments channel_moments(const T* channel, int64_t pitch, int64_t batch, int64_t pixels) {
  using A = typename AccumulateType<T>::type;
  Moments all;
  for_each_piece<kForwardPiece>(batch, pixels, [&](int64_t first, int64_t planes, int64_t at, int64_t count) {
    const T* const x = channel + first * pitch + at;
    Vec<A> sums[4] = {}, squares[4] = {}, missed[4] = {};
    for (int64_t n = 0; n < planes; ++n) {
      for_each_vector<A, 4>(
          count, [&]<bool kWhole>(int64_t i, int lanes, int slot) { sums[slot] += load_some<kWhole>(x + n * pitch + i, lanes); });
    }
    const A mean = sum_slots<A>(sums) / static_cast<A>(planes * count);
    for (int64_t n = 0; n < planes; ++n) {
      for_each_vector<A, 4>(count, [&]<bool kWhole>(int64_t i, int lanes, int slot) {
        Vec<A> centred = load_some<kWhole>(x + n * pitch + i, lanes) - mean;
        if constexpr (!kWhole) centred = only_lanes<A>(centred, lanes);
        squares[slot] += centred * centred;
        missed[slot] += centred;
      });
    }
    all.join(planes * count, mean, sum_slots<A>(squares), sum_slots<A>(missed));
  });
  return all;
}

template <bool kClamp, class T>
void forward_channel(const BatchNormArgs& args, int64_t c) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t pixels = p.in_h * p.in_w, pitch = p.channels * pixels;
  const T* const x = static_cast<const T*>(args.input) + c * pixels;
  T* const y = static_cast<T*>(args.output) + c * pixels;
  const ChannelConstants<A> k = forward_constants<A>(args, c, channel_moments(x, pitch, p.batch, pixels));
  const auto norm = normalisation<A, OneValue>({broadcast(k.mean)}, {broadcast(k.scale)}, {broadcast(k.bias)}, p.activation);
  for (int64_t n = 0; n < p.batch; ++n) forward_run<kClamp>(x + n * pitch, y + n * pitch, pixels, norm);
}

template <bool kClamp, class T>
void backward_channel(const BatchNormArgs& args, int64_t c) {
  using A = typename AccumulateType<T>::type;
  const CpuProblem& p = args.problem;
  const int64_t pixels = p.in_h * p.in_w, pitch = p.channels * pixels;
  const T* const x = static_cast<const T*>(args.input) + c * pixels;
  const T* const dy = static_cast<const T*>(args.grad_output) + c * pixels;
  T* const dx = static_cast<T*>(args.output) + c * pixels;
  ChannelConstants<A> k = saved_constants<A>(args, c);
  const auto norm = normalisation<A, OneValue>({broadcast(k.mean)}, {broadcast(k.scale)}, {broadcast(k.bias)}, p.activation);
  GradSums sums;
  for_each_piece<kBackwardPiece>(p.batch, pixels, [&](int64_t first, int64_t planes, int64_t at, int64_t count) {
    Vec<A> grads[kUnrolled<kClamp>] = {}, products[kUnrolled<kClamp>] = {};
    for (int64_t n = first; n < first + planes; ++n) {
      const int64_t run = n * pitch + at;
      grad_sums_run<kClamp>(x + run, dy + run, dx + run, count, norm, [&]<bool>(int64_t, int slot, Vec<A> g, Vec<A> product) {
        grads[slot] += g;
        products[slot] += product;
      });
    }
    sums.grad += sum_slots<A>(grads);
    sums.product += sum_slots<A>(products);
  });
  backward_constants<A>(args, c, sums, &k);
  const OneValue<A> slope = {broadcast(k.slope)}, offset = {broadcast(k.offset)};
  for (int64_t n = 0; n < p.batch; ++n) {
    backward_run<kClamp>(x + n * pitch, dy + n * pitch, dx + n * pitch, pixels, norm, slope, offset);
  }
}

template <class T>
void batch_norm_forward_nchw(const BatchNormArgs& args, void*, Tiles tiles) {
  const auto run = is_clamp(args.problem.activation) ? &forward_channel<true, T> : &forward_channel<false, T>;
  for (int64_t c; next_tile(tiles, &c);) run(args, c);
}

template <class T>
void batch_norm_backward_nchw(const BatchNormArgs& args, void*, Tiles tiles) {
  const auto run = is_clamp(args.problem.activation) ? &backward_channel<true, T> : &backward_channel<false, T>;
  for (int64_t c; next_tile(tiles, &c);) run(args, c);
}

template <class T, int = 0>
int64_t batch_norm_forward_nchw_scratch(const CpuProblem&, int64_t) {
  return 0;
}
template <class T, int = 0>
int64_t batch_norm_backward_nchw_scratch(const CpuProblem&, int64_t) {
  return 0;
}

}  // namespace dwconv::DWCONV_ISA
