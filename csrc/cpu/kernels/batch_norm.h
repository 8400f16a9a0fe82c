// BatchNorm by the batch's own statistics and the activation after it, forward and backward.
//
//   mean = sum x / n, variance = sum (x - mean)^2 / n, scale = weight / sqrt(variance + eps), z = (x - mean) scale + bias
//   forward   y = act(z)
//   backward  g = dy act'(z), dbias = sum g, dweight = sum g (x - mean) / sqrt(variance + eps)
//             dx = scale g + slope (x - mean) + offset, slope = -scale dweight / (sqrt(variance + eps) n),
//             offset = -scale dbias / n
//
// Backward computes z again, so that neither z nor y is kept for it. Both passes take sums of a channel, then go over it again:
//   NCHW           a tile is one channel, and the second sweep finds in the caches what the first has read;
//   channels_last  the first call leaves the sums of each of `parts` ranges of pixels, a tile each; the second,
//                  with the constants of all channels, writes the same ranges.
// Sums run over pieces of at most some thousand elements in the accumulation type: the piece's mean, then the squares about it
// and what it missed of the mean. Pieces are joined in double, in order: no cancellation, and the same bits for any number of
// threads.
//
// Traffic: forward x once or twice and y, backward x and dy once or twice and dx; torch's two modules take 8 and 8 sweeps.
// Source: Ioffe and Szegedy, arXiv:1502.03167; pieces joined as in Chan, Golub and LeVeque 1983, "Algorithms for computing the
// sample variance", with its corrected two-pass sums.
#pragma once

#include "../batch_norm_channel.h"
#include "../tiles.h"
#include "activate.h"

namespace dwconv::DWCONV_ISA {

// ---- one run of elements -------------------------------------------------------------------------------------------------

// A channel's constants along a run: one value in NCHW, whose runs are pixels; in channels_last, whose runs are channels, one
// an element, with a vector's worth readable past the last.
template <class A>
struct OneValue {
  Vec<A> value;
  DWCONV_INLINE Vec<A> at(int64_t) const { return value; }
};
template <class A>
struct EachValue {
  const A* values;
  DWCONV_INLINE Vec<A> at(int64_t i) const { return load(values + i); }
};

// body<kWhole>(i, lanes, slot) for each vector of a run; slots tell independent sums apart.
template <class A, int kSlots, class Body>
DWCONV_INLINE void for_each_vector(int64_t count, const Body& body) {
  constexpr int64_t n = kLanes<A>;
  int64_t i = 0;
  for (; i + kSlots * n <= count; i += kSlots * n) {
    DWCONV_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) body.template operator()<true>(i + slot * n, kLanes<A>, slot);
  }
  if constexpr (kSlots > 1) {
    for (; i + n <= count; i += n) body.template operator()<true>(i, kLanes<A>, 0);
  }
  if (i < count) body.template operator()<false>(i, static_cast<int>(count - i), 0);
}

template <class A>
DWCONV_INLINE Vec<A> only_lanes(Vec<A> v, int lanes) {
  typename VecOf<A>::mask lane;
  DWCONV_UNROLL
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < lanes ? v : Vec<A>{};
}

// Identity, ReLU and ReLU6 are clamps, and their derivative is one within the limits and zero without.
template <class A, template <class> class Values>
struct Normalisation {
  Values<A> mean, scale, bias;
  Activation activation;
  A least, most;

  DWCONV_INLINE Vec<A> normalise(Vec<A> centred, int64_t i) const { return centred * scale.at(i) + bias.at(i); }
  template <bool kClamp>
  DWCONV_INLINE Vec<A> forward(Vec<A> x, int64_t i) const {
    const Vec<A> z = normalise(x - mean.at(i), i);
    if constexpr (kClamp) return at_most(at_least(z, least), most);
    return activate<A>(z, activation);
  }
  template <bool kClamp>
  DWCONV_INLINE Vec<A> backward(Vec<A> grad, Vec<A> centred, int64_t i) const {
    const Vec<A> z = normalise(centred, i);
    if constexpr (kClamp) {
      const Vec<A> zero = {};
      grad = z <= least ? zero : grad;
      return z >= most ? zero : grad;
    }
    return activate_backward<A>(grad, z, activation);
  }
};

template <class A, template <class> class Values>
DWCONV_INLINE Normalisation<A, Values> normalisation(Values<A> mean, Values<A> scale, Values<A> bias, const Activation& act) {
  const A infinity = static_cast<A>(__builtin_inf());
  const A least = act.kind == ActivationKind::kIdentity ? -infinity : A(0);
  const A most = act.kind == ActivationKind::kRelu6 ? A(6) : infinity;
  return {mean, scale, bias, act, least, most};
}

static inline bool is_clamp(const Activation& act) {
  return act.kind == ActivationKind::kIdentity || act.kind == ActivationKind::kRelu || act.kind == ActivationKind::kRelu6;
}

template <bool kClamp>
inline constexpr int kUnrolled = kClamp ? 4 : 1;  // an exponential is long enough as it is

template <bool kClamp, class T, class Norm>
DWCONV_INLINE void forward_run(const T* x, T* y, int64_t count, const Norm& norm) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int) {
    store_some<kWhole>(y + i, norm.template forward<kClamp>(load_some<kWhole>(x + i, lanes), i), lanes);
  });
}

// Where g costs an exponential and dx can hold it as it is, the first sweep leaves it there for the second.
template <bool kClamp, class T>
inline constexpr bool kKeepsGrad = !kClamp && sizeof(T) == sizeof(typename AccumulateType<T>::type);

// add(i, slot, g, g (x - mean)); absent lanes are zero.
template <bool kClamp, class T, class Norm, class Add>
DWCONV_INLINE void grad_sums_run(const T* x, const T* dy, T* dx, int64_t count, const Norm& norm, const Add& add) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int slot) {
    const Vec<A> centred = load_some<kWhole>(x + i, lanes) - norm.mean.at(i);
    Vec<A> g = norm.template backward<kClamp>(load_some<kWhole>(dy + i, lanes), centred, i);
    if constexpr (kKeepsGrad<kClamp, T>) store_some<kWhole>(dx + i, g, lanes);
    Vec<A> product = g * centred;
    if constexpr (!kWhole) {  // whatever the constants make of them
      g = only_lanes<A>(g, lanes);
      product = only_lanes<A>(product, lanes);
    }
    add.template operator()<kWhole>(i, slot, g, product);
  });
}

template <bool kClamp, class T, class Norm, class Values>
DWCONV_INLINE void backward_run(const T* x, const T* dy, T* dx, int64_t count, const Norm& norm, Values slope, Values offset) {
  using A = typename AccumulateType<T>::type;
  for_each_vector<A, kUnrolled<kClamp>>(count, [&]<bool kWhole>(int64_t i, int lanes, int) {
    const Vec<A> centred = load_some<kWhole>(x + i, lanes) - norm.mean.at(i);
    Vec<A> g;
    if constexpr (kKeepsGrad<kClamp, T>) {
      g = load_some<kWhole>(dx + i, lanes);
    } else {
      g = norm.template backward<kClamp>(load_some<kWhole>(dy + i, lanes), centred, i);
    }
    store_some<kWhole>(dx + i, norm.scale.at(i) * g + (slope.at(i) * centred + offset.at(i)), lanes);
  });
}

// ---- NCHW: a channel at a time -------------------------------------------------------------------------------------------

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
      for_each_vector<A, 4>(count, [&]<bool kWhole>(int64_t i, int lanes, int slot) {
        sums[slot] += load_some<kWhole>(x + n * pitch + i, lanes);
      });
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
  const DepthwiseProblem& p = args.problem;
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
  const DepthwiseProblem& p = args.problem;
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
      grad_sums_run<kClamp>(x + run, dy + run, dx + run, count, norm,
                            [&]<bool>(int64_t, int slot, Vec<A> g, Vec<A> product) {
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

template <class T>
int64_t batch_norm_forward_nchw_scratch(const DepthwiseProblem&, int64_t) {
  return 0;
}
template <class T>
int64_t batch_norm_backward_nchw_scratch(const DepthwiseProblem&, int64_t) {
  return 0;
}

// ---- channels_last: a range of pixels at a time --------------------------------------------------------------------------

// Pixels of a forward piece: enough to make little of joining it, few enough to find it in L2 for its squares. Of a backward
// piece: few additions.
template <class T>
DWCONV_INLINE int64_t piece_pixels(int64_t channels) {
  constexpr int64_t kPieceBytes = 64 << 10, kLeast = 16, kMost = 512;
  const int64_t pixels = kPieceBytes / (channels * static_cast<int64_t>(sizeof(T)));
  return pixels < kLeast ? kLeast : pixels > kMost ? kMost : pixels;
}

inline constexpr int64_t kBackwardPixels = 64;

struct PartOfPixels {
  int64_t begin, end;
};
DWCONV_INLINE PartOfPixels pixels_of_part(const BatchNormArgs& args, int64_t part) {
  const int64_t pixels = args.problem.batch * args.problem.in_h * args.problem.in_w;
  return {pixels * part / args.parts, pixels * (part + 1) / args.parts};
}

// Three sums a channel and vector's worth more, in the accumulation type.
template <class T>
int64_t batch_norm_nhwc_sums_bytes(const DepthwiseProblem& p) {
  using A = typename AccumulateType<T>::type;
  return 3 * (p.channels + kLanes<A>) * static_cast<int64_t>(sizeof(A));
}

template <class T>
void part_moments(const BatchNormArgs& args, int64_t part, void* scratch) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels, most = piece_pixels<T>(channels);
  const PartOfPixels range = pixels_of_part(args, part);
  A* const mean = static_cast<A*>(scratch);
  A* const squares = mean + channels + kLanes<A>;
  A* const missed = squares + channels + kLanes<A>;
  double* const means = args.partial + part * 2 * channels;
  double* const all_squares = means + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) means[c] = 0;
  int64_t joined = 0;
  for (int64_t first = range.begin; first < range.end; first += most) {
    const int64_t count = range.end - first < most ? range.end - first : most;
    const T* const x = static_cast<const T*>(args.input) + first * channels;
    for (int64_t c = 0; c < channels + kLanes<A>; ++c) mean[c] = squares[c] = missed[c] = A(0);
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      for_each_vector<A, 4>(channels, [&]<bool kWhole>(int64_t c, int lanes, int) {
        store(mean + c, load(mean + c) + load_some<kWhole>(x + pixel * channels + c, lanes));
      });
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<A>(count);
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      for_each_vector<A, 4>(channels, [&]<bool kWhole>(int64_t c, int lanes, int) {
        const Vec<A> centred = load_some<kWhole>(x + pixel * channels + c, lanes) - load(mean + c);
        store(squares + c, load(squares + c) + centred * centred);
        store(missed + c, load(missed + c) + centred);
      });
    }
    const JoinWeights weights = join_weights(joined, count);
    for (int64_t c = 0; c < channels; ++c) {
      const Piece piece = corrected(count, mean[c], squares[c], missed[c]);
      join(weights, piece.mean, piece.squares, &means[c], &all_squares[c]);
    }
    joined += count;
  }
}

template <class A>
DWCONV_INLINE auto channel_normalisation(const BatchNormArgs& args) {
  const A* const k = static_cast<const A*>(args.constants);
  const int64_t pitch = args.constants_pitch;
  return normalisation<A, EachValue>({k}, {k + pitch}, {k + 2 * pitch}, args.problem.activation);
}

template <bool kClamp, class T>
void part_forward(const BatchNormArgs& args, int64_t part, void*) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
    forward_run<kClamp>(static_cast<const T*>(args.input) + pixel * channels, static_cast<T*>(args.output) + pixel * channels,
                        channels, norm);
  }
}

template <bool kClamp, class T>
void part_grad_sums(const BatchNormArgs& args, int64_t part, void* scratch) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels, most = kBackwardPixels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  A* const grads = static_cast<A*>(scratch);
  A* const products = grads + channels + kLanes<A>;
  double* const sums = args.partial + part * 2 * channels;
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  for (int64_t first = range.begin; first < range.end; first += most) {
    const int64_t end = range.end - first < most ? range.end : first + most;
    for (int64_t c = 0; c < channels + kLanes<A>; ++c) grads[c] = products[c] = A(0);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t run = pixel * channels;
      grad_sums_run<kClamp>(static_cast<const T*>(args.input) + run, static_cast<const T*>(args.grad_output) + run,
                            static_cast<T*>(args.output) + run, channels, norm,
                            [&]<bool>(int64_t c, int, Vec<A> g, Vec<A> product) {
                              store(grads + c, load(grads + c) + g);
                              store(products + c, load(products + c) + product);
                            });
    }
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += grads[c];
      sums[channels + c] += products[c];
    }
  }
}

template <bool kClamp, class T>
void part_backward(const BatchNormArgs& args, int64_t part, void*) {
  using A = typename AccumulateType<T>::type;
  const int64_t channels = args.problem.channels;
  const PartOfPixels range = pixels_of_part(args, part);
  const auto norm = channel_normalisation<A>(args);
  const A* const k = static_cast<const A*>(args.constants);
  const EachValue<A> slope = {k + 3 * args.constants_pitch}, offset = {k + 4 * args.constants_pitch};
  for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
    const int64_t at = pixel * channels;
    backward_run<kClamp>(static_cast<const T*>(args.input) + at, static_cast<const T*>(args.grad_output) + at,
                         static_cast<T*>(args.output) + at, channels, norm, slope, offset);
  }
}

template <class T>
void batch_norm_forward_nhwc(const BatchNormArgs& args, void* scratch, Tiles tiles) {
  const bool clamp = is_clamp(args.problem.activation);
  const auto run = args.wants_sums ? &part_moments<T> : clamp ? &part_forward<true, T> : &part_forward<false, T>;
  for (int64_t part; next_tile(tiles, &part);) run(args, part, scratch);
}

template <class T>
void batch_norm_backward_nhwc(const BatchNormArgs& args, void* scratch, Tiles tiles) {
  const bool clamp = is_clamp(args.problem.activation);
  const auto sums = clamp ? &part_grad_sums<true, T> : &part_grad_sums<false, T>;
  const auto write = clamp ? &part_backward<true, T> : &part_backward<false, T>;
  const auto run = args.wants_sums ? sums : write;
  for (int64_t part; next_tile(tiles, &part);) run(args, part, scratch);
}

template <class T>
int64_t batch_norm_forward_nhwc_scratch(const DepthwiseProblem& p, int64_t) {
  return batch_norm_nhwc_sums_bytes<T>(p);
}
template <class T>
int64_t batch_norm_backward_nhwc_scratch(const DepthwiseProblem& p, int64_t) {
  return batch_norm_nhwc_sums_bytes<T>(p);
}

}  // namespace dwconv::DWCONV_ISA
