// Depthwise weight and bias gradient, NCHW, square filters at stride 1, where multiply-adds can be masked: output columns are
// lanes, and both operands are read where they lie (depthwise_forward_nchw_direct.h).
//
//   grad_weight[c, r, s] = sum_{n, y, x} grad_output[n, c, y, x] * in[n, c, y + r - pad_h, x + s - pad_w]
//
// All taps' sums stay in registers. A tile is kGradRows output rows by a vector of columns: its grad_output is loaded once, and
// each input vector, of kGradRows + kKernel - 1 rows at kKernel columns, serves every filter row that meets it:
//
//   filter 3x3, 7 rows: 7 + 27 loads for 63 FMAs in 9 chains
//
// A chain is at most kChain vectors long, or a tile's row; chains are added to the image's sums, those to the part's, lane by
// lane; lanes and parts are added last. The order of it all is the problem's alone.
// Tiles: one (part, channel): a range of the N planes of one channel. Partial sums: partial[part][tap][channel].
// Traffic: grad_output and input once. Each plane is far from the one before, so the next is prefetched, row by row; twice as
// fast as without where they come from memory, 5 % slower where they are in the cache.
#pragma once

#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nchw_rows.h"
#include "cpu/kernels/nchw_direct.h"
#include "cpu/kernels/simd_lanes.h"

namespace dwconv::DWCONV_ISA {

// Output rows of a tile, so that kKernel^2 sums, as many of grad_output and an input vector fit 32 registers.
template <int kKernel>
inline constexpr int kGradRows = kKernel == 3 ? 7 : 4;

// How a register tile reads: every input row; the rows that the image has; those, and masked, where whole vectors could reach
// beyond the tensor.
enum class Reads { kAll, kRows, kMasked };

template <Reads kReads, class T>
DWCONV_INLINE auto load_as(const T* p, LaneMask lanes) {
  return in_register(kReads == Reads::kMasked ? load_masked(p, lanes) : load(p));
}

// A channel's operands: the strides of a row and from an image to the next, and where they end.
template <class T>
struct DirectPlanes {
  int64_t row, image;
  const T* end;
};

template <class T>
struct DirectGrad {
  DirectPlanes<T> in, grad;
  int64_t in_h, pad_h, pad_w, out_h, out_w;
};

// masks: [kKernel] of the input, then grad_output's. valid_rows: of the input.
template <class T, class A, int kKernel, Reads kReads>
DWCONV_INLINE void direct_grad_tile(const DirectGrad<T>& f, const T* in, const T* grad, int64_t rows, uint32_t valid_rows,
                                    const LaneMask* masks, Vec<A> (&acc)[kKernel][kKernel]) {
  constexpr int kRows = kGradRows<kKernel>;
  Vec<A> g[kRows];
  DWCONV_UNROLL
  for (int j = 0; j < kRows; ++j) {
    g[j] = kReads == Reads::kAll || j < rows ? load_as<kReads>(grad + j * f.grad.row, masks[kKernel]) : Vec<A>{};
  }
  DWCONV_UNROLL
  for (int i = 0; i < kRows + kKernel - 1; ++i, in += f.in.row) {
    if (kReads != Reads::kAll && !((valid_rows >> i) & 1)) continue;
    DWCONV_UNROLL
    for (int s = 0; s < kKernel; ++s) {
      const Vec<A> v = load_as<kReads>(in + s, masks[s]);
      DWCONV_UNROLL
      for (int r = 0; r < kKernel; ++r) {
        const int j = i - r;
        if (j < 0 || j >= kRows || (kReads != Reads::kAll && j >= rows)) continue;
        acc[r][s] = add_masked(acc[r][s], v, g[j], masks[s]);
      }
    }
  }
}

// sums[tap] += what the image gives, lane by lane.
template <class T, class A, int kKernel>
void direct_grad_image(const DirectGrad<T>& f, const T* in, const T* grad, bool inside, const LaneMask* masks, A* sums) {
  constexpr int kVec = kLanes<A>, kRows = kGradRows<kKernel>, kCount = kRows + kKernel - 1;
  constexpr uint32_t kAll = (1u << kCount) - 1u;
  const int64_t vectors = ceil_div(f.out_w, kVec);
  const int64_t block = kChain / vectors > kRows ? kChain / vectors / kRows * kRows : kRows;  // output rows
  for (int64_t begin = 0; begin < f.out_h; begin += block) {
    const int64_t end = begin + block < f.out_h ? begin + block : f.out_h;
    Vec<A> acc[kKernel][kKernel] = {};
    for (int64_t y = begin; y < end; y += kRows) {
      const uint32_t valid = valid_columns(y - f.pad_h, 1, f.in_h, kCount);  // rows, that is
      const T* const in_rows = in + (y - f.pad_h) * f.in.row - f.pad_w;
      const T* const grad_rows = grad + y * f.grad.row;
      prefetch(in + f.in.image + y * f.in.row, kRows * f.in.row, f.in.end);
      prefetch(grad_rows + f.grad.image, kRows * f.grad.row, f.grad.end);
      const LaneMask* mask = masks;
      for (int64_t x = 0; x < f.out_w; x += kVec, mask += kKernel + 1) {
        const auto add = [&]<Reads kReads>() {
          direct_grad_tile<T, A, kKernel, kReads>(f, in_rows + x, grad_rows + x, end - y, valid, mask, acc);
        };
        if (!inside) {
          add.template operator()<Reads::kMasked>();
        } else if (valid == kAll && end - y >= kRows) {
          add.template operator()<Reads::kAll>();
        } else {
          add.template operator()<Reads::kRows>();
        }
      }
    }
    DWCONV_UNROLL
    for (int i = 0; i < kKernel * kKernel; ++i) {
      store(sums + i * kVec, load(sums + i * kVec) + acc[i / kKernel][i % kKernel]);
    }
  }
}

template <class T, int kKernel, int kStride>
void depthwise_backward_weight_nchw_direct(const BackwardWeightArgs& args, void* scratch, Tiles tiles) {
  using A = typename AccumulateType<T>::type;
  static_assert(kKernel > 0 && kStride == 1);
  constexpr int kVec = kLanes<A>, kTaps = kKernel * kKernel;
  const CpuProblem& p = args.problem;
  A* const image_sums = static_cast<A*>(scratch);
  A* const part_sums = image_sums + kTaps * kVec;
  LaneMask* const masks = reinterpret_cast<LaneMask*>(part_sums + kTaps * kVec);
  LaneMask* mask = masks;
  for (int64_t x = 0; x < p.out_w; x += kVec) {
    const uint32_t columns = valid_columns(x, 1, p.out_w, kVec);
    for (int s = 0; s < kKernel; ++s) *mask++ = static_cast<LaneMask>(valid_columns(x + s - p.pad_w, 1, p.in_w, kVec) & columns);
    *mask++ = static_cast<LaneMask>(columns);
  }
  const T* const input_begin = static_cast<const T*>(args.input);
  const T* const grad_begin = static_cast<const T*>(args.grad_output);
  const int64_t grad_plane = (p.out_h - 1) * p.out_stride_h + p.out_w;
  const int64_t needed = (p.in_h - 1) * p.in_stride_h + p.in_w + direct_reach<A>(p);
  const DirectGrad<T> frame = {
      {p.in_stride_h, p.in_stride_n, end_of_input(p, input_begin)},
      {p.out_stride_h, p.out_stride_n,
       grad_begin + (p.batch - 1) * p.out_stride_n + (p.channels - 1) * p.out_stride_c + grad_plane},
      p.in_h,
      p.pad_h,
      p.pad_w,
      p.out_h,
      p.out_w,
  };
  const bool one_chain = p.out_h * (ceil_div(p.out_w, kVec)) <= kChain;
  for (int i = 0; i < kTaps * kVec; ++i) image_sums[i] = A(0);
  nchw_weight_tiles<T, A>(args, tiles, part_sums, [&](const T* input, const T* grad) {
    const A bias_sum = args.partial_bias != nullptr ? nchw_sum<T, A>(p, grad, p.out_h) : A(0);
    if (args.partial == nullptr) return bias_sum;
    const bool inside =
        input - input_begin >= p.pad_w && frame.in.end - input >= needed && frame.grad.end - grad >= grad_plane + kVec;
    direct_grad_image<T, A, kKernel>(frame, input, grad, inside, masks, one_chain ? part_sums : image_sums);
    if (!one_chain) move_sums(image_sums, part_sums, kTaps);
    return bias_sum;
  });
}

template <class T, int = 0>
int64_t depthwise_backward_weight_nchw_direct_scratch(const CpuProblem& p, int64_t) {
  using A = typename AccumulateType<T>::type;
  constexpr int64_t kVec = kLanes<A>;
  return 2 * p.kernel_h * p.kernel_w * kVec * static_cast<int64_t>(sizeof(A)) +
         ceil_div(p.out_w, kVec) * (p.kernel_w + 1) * static_cast<int64_t>(sizeof(LaneMask));
}

}  // namespace dwconv::DWCONV_ISA
