// One channel's statistics and what follows from them, in double, and the parts they come from. Internal linkage, plain C++: the
// ISA files include it too.
#pragma once

#include <stdint.h>

#include "cpu/kernels/args.h"

namespace dwconv {

// The pixels of one of channels_last's parts (BatchNormArgs).
struct PartOfPixels {
  int64_t begin, end;
};
static inline PartOfPixels pixels_of_part(const BatchNormArgs& args, int64_t part) {
  const int64_t pixels = args.problem.batch * args.problem.in_h * args.problem.in_w;
  return {pixels * part / args.parts, pixels * (part + 1) / args.parts};
}

// How a group of `count` values joins `before` others (Chan, Golub and LeVeque 1983): the same for every channel.
struct JoinWeights {
  double share, between;
};
static inline JoinWeights join_weights(int64_t before, int64_t count) {
  if (before == 0) return {1, 0};  // most channels are one piece
  const double share = static_cast<double>(count) / static_cast<double>(before + count);
  return {share, static_cast<double>(before) * share};
}
// squares: the sum of squared distances from the mean.
static inline void join(const JoinWeights& weights, double mean, double squares, double* all_mean, double* all_squares) {
  const double difference = mean - *all_mean;
  *all_mean += difference * weights.share;
  *all_squares += squares + difference * difference * weights.between;
}

// A piece about a rounded mean, of which `missed` is the sum of the distances.
struct Piece {
  double mean, squares;
};
static inline Piece corrected(int64_t count, double mean, double squares, double missed) {
  const double more = missed / static_cast<double>(count);
  return {mean + more, squares - missed * more};
}

struct Moments {
  int64_t count = 0;
  double mean = 0, squares = 0;
  __attribute__((always_inline)) void join(int64_t more, double its_mean, double its_squares, double missed) {
    const Piece piece = corrected(more, its_mean, its_squares, missed);
    dwconv::join(join_weights(count, more), piece.mean, piece.squares, &mean, &squares);
    count += more;
  }
};

struct GradSums {
  double grad = 0, product = 0;  // of g and g (x - mean)
};

// z = (x - mean) scale + bias; dx = scale g + slope (x - mean) + offset.
template <class A>
struct ChannelConstants {
  A mean, scale, bias, slope, offset;
};

template <class A>
static inline A channel_value(const void* values, int64_t c, A otherwise) {
  return values == nullptr ? otherwise : static_cast<const A*>(values)[c];
}

template <class A>
static inline ChannelConstants<A> saved_constants(const BatchNormArgs& args, int64_t c) {
  const double inv_std = 1 / __builtin_sqrt(static_cast<double>(static_cast<const A*>(args.variance)[c]) + args.eps);
  const double weight = channel_value<A>(args.weight, c, A(1));
  return {static_cast<const A*>(args.mean)[c], static_cast<A>(weight * inv_std), channel_value<A>(args.bias, c, A(0)), A(0),
          A(0)};
}

// Keeps the statistics for backward.
template <class A>
static inline ChannelConstants<A> forward_constants(const BatchNormArgs& args, int64_t c, const Moments& moments) {
  static_cast<A*>(args.mean)[c] = static_cast<A>(moments.mean);
  static_cast<A*>(args.variance)[c] = static_cast<A>(moments.squares / static_cast<double>(moments.count));
  return saved_constants<A>(args, c);
}

// Writes the gradients of weight and bias and sets slope and offset.
template <class A>
static inline void backward_constants(const BatchNormArgs& args, int64_t c, const GradSums& sums, ChannelConstants<A>* k) {
  const double inv_std = 1 / __builtin_sqrt(static_cast<double>(static_cast<const A*>(args.variance)[c]) + args.eps);
  const double count = static_cast<double>(args.problem.batch * args.problem.in_h * args.problem.in_w);
  const double grad_weight = sums.product * inv_std;
  static_cast<A*>(args.grad_weight)[c] = static_cast<A>(grad_weight);
  static_cast<A*>(args.grad_bias)[c] = static_cast<A>(sums.grad);
  k->slope = static_cast<A>(-static_cast<double>(k->scale) * grad_weight * inv_std / count);
  k->offset = static_cast<A>(-static_cast<double>(k->scale) * sums.grad / count);
}

}  // namespace dwconv
