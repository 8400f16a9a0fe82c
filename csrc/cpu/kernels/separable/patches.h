// A dense convolution of few channels, such as a network's first: the product of its weights, [kernel_h][kernel_w][channels] for
// each output channel, with the pixels' patches. Input rows go to scratch with zeros for padding, pixel by pixel,
//
//   staged[row][x][channel]              a patch's filter row is kernel_w * channels elements that lie one after the other,
//                                        and the next output pixel's begins stride * channels later
//
// so that the register tile's rows are `stride * channels` apart and the product reads the patches where they lie (indirect
// convolution without the pointers; Dukhan, arXiv:1907.02129). Where a product wants pairs of channels, patches are copied to the
// middle (im2col) and multiplied as any pointwise convolution's pixels.
#pragma once

#include "cpu/kernels/separable/pixels.h"

namespace dwconv::DWCONV_ISA {

template <class T, class P>
class Patches {
  using A = typename P::A;

 public:
  Patches(const SeparableArgs& args, void* scratch) : args_(args), p_(args.depthwise.problem) {
    if (args.patches == nullptr) return;
    staged_ = reinterpret_cast<A*>(static_cast<char*>(scratch) + args.patches->scratch_offset);
    channels_ = args.patches->channels, row_pitch_ = args.patches->row_pitch;
    reach_h_ = (p_.kernel_h - 1) * p_.dilation_h + 1;
    // Runs of a patch: filter rows, or single taps where they are apart.
    const bool rows = p_.dilation_w == 1;
    runs_w_ = rows ? 1 : p_.kernel_w, run_ = (rows ? p_.kernel_w : 1) * channels_;
  }

  // The input rows of output rows [row, row + rows) across images.
  void stage(int64_t row, int64_t rows) {
    for_each_image(p_, row, rows, [&, to = staged_](int64_t n, int64_t y, int64_t count, int64_t) mutable {
      const T* const image = static_cast<const T*>(args_.depthwise.input) + n * p_.in_stride_n;
      const int64_t first = y * p_.stride_h - p_.pad_h;
      for (int64_t i = first; i < first + staged_rows(count); ++i, to += row_pitch_) {
        stage_row(i >= 0 && i < p_.in_h ? image + i * p_.in_stride_h : nullptr, to);
      }
    });
  }

  // What was staged, to middle[pixel * pitch + k].
  template <class M>
  void copy(int64_t row, int64_t rows, int64_t pitch, M* middle) const {
    for_each_row(row, rows, [&](const A* staged, int64_t pixel) {
      for (int64_t r = 0; r < p_.kernel_h * runs_w_; ++r) {
        copy_pixels<A, A, M>(staged + run_offset(r), p_.stride_w * channels_, p_.out_w, run_, nullptr, pitch,
                             middle + pixel * pitch + r * run_);
      }
    });
  }

  // What was staged by one panel, to the target's rows, a pixel each.
  template <class O>
  void multiply(int64_t row, int64_t rows, const A* panel, const A* bias, const GemmTarget<O>& to,
                ProductPrefetch& upcoming) const {
    if (to.columns > kLanes<A>) {
      multiply_columns<kGemmColumns>(row, rows, panel, bias, to, upcoming);
    } else {
      multiply_columns<1>(row, rows, panel, bias, to, upcoming);
    }
  }

 private:
  int64_t staged_rows(int64_t count) const { return (count - 1) * p_.stride_h + reach_h_; }
  int64_t run_offset(int64_t r) const {
    return r / runs_w_ * p_.dilation_h * row_pitch_ + r % runs_w_ * p_.dilation_w * channels_;
  }

  // body(the staged input of an output row, its first pixel of the tile)
  template <class Body>
  void for_each_row(int64_t row, int64_t rows, Body body) const {
    const A* staged = staged_;
    for_each_image(p_, row, rows, [&](int64_t, int64_t, int64_t count, int64_t pixel) {
      for (int64_t i = 0; i < count; ++i) body(staged + i * p_.stride_h * row_pitch_, pixel + i * p_.out_w);
      staged += staged_rows(count) * row_pitch_;
    });
  }

  // from: null for a row of padding.
  void stage_row(const T* from, A* to) const {
    const int64_t width = (p_.out_w - 1) * p_.stride_w + (p_.kernel_w - 1) * p_.dilation_w + 1;
    const int64_t left = p_.pad_w < width ? p_.pad_w : width;
    const int64_t there = from == nullptr ? 0 : p_.in_w < width - left ? p_.in_w : width - left;
    const int64_t begin = left * channels_, end = begin + there * channels_;
    memset(to, 0, begin * sizeof(A));
    memset(to + end, 0, (width * channels_ - end) * sizeof(A));
    if (there == 0) return;
    if (p_.in_stride_c == 1 && p_.in_stride_w == channels_) {
      return copy_pixels<A, T, A>(from, 0, 1, there * channels_, nullptr, 0, to + begin);
    }
    for (int64_t c = 0; c < channels_; ++c) {
      const T* const plane = from + c * p_.in_stride_c;
      A* const at = to + begin + c;
      for (int64_t x = 0; x < there; ++x) at[x * channels_] = to_accumulate(plane[x * p_.in_stride_w]);
    }
  }

  template <int kColumns, class O>
  void multiply_columns(int64_t row, int64_t rows, const A* panel, const A* bias, const GemmTarget<O>& to,
                        ProductPrefetch& upcoming) const {
    constexpr int kHalf = kGemmRows / 2;
    for_each_row(row, rows, [&](const A* staged, int64_t pixel) {
      for (int64_t x = 0; x < p_.out_w;) {
        const int64_t left = p_.out_w - x;
        const GemmTarget<O> here = from_row(to, pixel + x, lanes_left(left, kGemmRows));
        const A* const a = staged + x * p_.stride_w * channels_;
        if (upcoming.output) prefetch_for_write(here);
        if (left > kHalf) {
          multiply_rows<kGemmRows, kColumns>(a, panel, bias, here, upcoming);
          x += kGemmRows;
        } else {
          multiply_rows<kHalf, kColumns>(a, panel, bias, here, upcoming);
          x += kHalf;
        }
      }
    });
  }

  template <int kRows, int kColumns, class O>
  void multiply_rows(const A* a, const A* panel, const A* bias, const GemmTarget<O>& to, ProductPrefetch& upcoming) const {
    Vec<A> acc[kRows][kColumns];
    zero_tile<A>(acc);
    for (int64_t r = 0; r < p_.kernel_h * runs_w_; ++r) {
      add_to_tile<A, A>(run_, a + run_offset(r), p_.stride_w * channels_, panel + r * run_ * kPanel<A>, to.rows, upcoming, acc);
    }
    finish_tile<O, A>(args_.activation, acc, bias, to);
  }

  const SeparableArgs& args_;
  const CpuProblem& p_;
  A* staged_ = nullptr;
  int64_t channels_ = 0, row_pitch_ = 0, reach_h_ = 0, runs_w_ = 0, run_ = 0;
};

}  // namespace dwconv::DWCONV_ISA
