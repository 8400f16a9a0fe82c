// The expansion of an inverted residual (Sandler et al., arXiv:1801.04381), a tile's rows at a time: the block's first stage
// reads
//
//   expanded[row][column][channel] = act(expand_weight . in[row][column] + expand_bias)
//
// from scratch in L2, which memory never sees. Rows that a tile shares with the one before it, which the same worker mostly has,
// are moved instead of computed again. Sums are those of a pointwise convolution of its own; what is expanded has the type that
// the product multiplies.
#pragma once

#include "cpu/kernels/separable/pixels.h"

namespace dwconv::DWCONV_ISA {

template <class T, class P, bool kNhwc>
class ExpandedRows {
  using A = typename P::A;
  using M = typename P::Middle;
  static constexpr int64_t kVec = kLanes<A>;

 public:
  ExpandedRows(const SeparableArgs& args, const P& product, void* scratch) : args_(args), product_(product) {
    if (args.expand == nullptr) return;
    expanded_ = reinterpret_cast<M*>(static_cast<char*>(scratch) + args.expand->scratch_offset);
    copies_ = expanded_ + args.expand->most_pixels * args.expand->pitch;
    const int64_t copied = P::padded_pixels(kExpandPixels) * args.expand->copy_pitch;
    sums_ = reinterpret_cast<A*>(copies_ + copied);
    depth_ = padded_channels<P>(args.expand->channels);
    if (depth_ != args.expand->channels) memset(copies_, 0, copied * sizeof(M));  // the channels that nothing is copied to
  }

  // The depthwise stage of output rows [row, row + rows) across images, as depthwise_stage.
  void stage(int64_t row, int64_t rows, int64_t pitch, M* middle) {
    const CpuProblem& whole = args_.depthwise.problem;
    DepthwiseArgs stage = args_.depthwise;
    CpuProblem& p = stage.problem;
    p.batch = 1;
    p.prefetch_input = p.prefetch_output = false;
    p.dtype = p.out_dtype = kDType<M>;
    p.in_stride_w = args_.expand->pitch;
    p.in_stride_h = whole.in_w * args_.expand->pitch;
    p.out_stride_w = pitch;
    p.out_stride_h = whole.out_w * pitch;
    stage.input = expanded_;
    for_each_image(whole, row, rows, [&](int64_t n, int64_t y, int64_t count, int64_t pixel) {
      expand(n, crop_input(whole, y, count, &p));
      stage.rows_per_tile = count;
      stage.output = middle + pixel * pitch;
      args_.depthwise_kernel(stage, nullptr, one_tile());
    });
  }

 private:
  // Makes expanded_ hold these rows of image n.
  void expand(int64_t n, Range rows) {
    const int64_t width = args_.depthwise.problem.in_w, row = width * args_.expand->pitch;
    int64_t kept = 0;
    if (n == image_ && rows.begin >= rows_.begin && rows.begin < rows_.end) {
      kept = (rows.end < rows_.end ? rows.end : rows_.end) - rows.begin;
      __builtin_memmove(expanded_, expanded_ + (rows.begin - rows_.begin) * row, kept * row * sizeof(M));
    }
    const int64_t first = (rows.begin + kept) * width, end = rows.end * width;
    for (int64_t at = first; at < end; at += kExpandPixels) {
      multiply(n, at, end - at < kExpandPixels ? end - at : kExpandPixels,
               expanded_ + kept * row + (at - first) * args_.expand->pitch);
    }
    image_ = n, rows_ = rows;
  }

  // `count` pixels of image n from pixel `first` on.
  void multiply(int64_t n, int64_t first, int64_t count, M* to) {
    const ExpandArgs& e = *args_.expand;
    const T* const image = static_cast<const T*>(e.input) + n * e.in_stride_n;
    const T* const pixels = image + first * e.channels;  // channels_last
    int64_t placed = 0;                                  // pixels that the product reads where they lie
    if constexpr (kNhwc) {
      if (P::kReadsInPlace && kSame<T, M> && depth_ == e.channels &&
          !lines_collide<T>(e.channels, 2 * kGemmRows, args_.depthwise.problem.l1_ways)) {
        placed = count / kGemmRows * kGemmRows;
      }
      copy_pixels<A, T, M>(pixels + placed * e.channels, e.channels, count - placed, e.channels, nullptr, e.copy_pitch, copies_);
    } else {
      for (int64_t c = 0; c < e.channels; c += kVec) {
        const int lanes = lanes_left(e.channels - c, kVec);
        const T* from[kVec];
        for (int l = 0; l < lanes; ++l) from[l] = image + (c + l) * e.in_stride_c + first;
        planes_to_lanes<T, A>(from, 0, lanes, 1, count, 0, sums_);
        copy_pixels<A, A, M>(sums_, kVec, count, lanes, nullptr, e.copy_pitch, copies_ + c);
      }
    }
    const int64_t hidden = args_.depthwise.problem.channels;
    ProductPrefetch nothing;
    for (int64_t j = 0; j < hidden; j += kPanel<A>) {
      const M* const weight = static_cast<const M*>(e.weight) + j * depth_;
      const A* const bias = static_cast<const A*>(e.bias) + j;
      const GemmTarget<M> target = {to + j, nullptr, e.pitch, 0, lanes_left(hidden - j, kPanel<A>)};
      if (placed > 0) {
        product_.multiply(e.activation, reinterpret_cast<const M*>(pixels), e.channels, placed, e.channels, weight, sums_, bias,
                          target, nothing);
      }
      if (placed < count) {
        product_.multiply(e.activation, copies_, e.copy_pitch, count - placed, e.channels, weight, sums_, bias,
                          from_row(target, placed, 0), nothing);
      }
    }
  }

  const SeparableArgs& args_;
  const P& product_;
  M *expanded_ = nullptr, *copies_ = nullptr;
  A* sums_ = nullptr;
  int64_t depth_ = 0;
  int64_t image_ = -1;
  Range rows_ = {0, 0};
};

}  // namespace dwconv::DWCONV_ISA
