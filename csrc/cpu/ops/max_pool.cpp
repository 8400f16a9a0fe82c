// max_pool2d on the CPU, in inference: without the indices of the maxima that a derivative would want.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include <limits>

#include "cpu/ops/calls.h"
#include "cpu/ops/launch.h"
#include "cpu/runtime/with_type.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "max_pool2d";

// The greater one; NaN where one of them is, as in torch.
template <class A>
A greater(A value, A best) {
  return value > best || value != value ? value : best;
}

struct Span {
  int64_t begin, end;
};
// Of 0, 1, ... count - 1 those whose sample, origin + step times it, lies inside the image: taps of an output, outputs of a tap.
Span inside(int64_t origin, int64_t count, int64_t step, int64_t size) {
  const int64_t begin = origin >= 0 ? 0 : ceil_div(-origin, step);
  const int64_t end = size <= origin ? 0 : ceil_div(size - origin, step);
  return {begin, std::min(count, end)};
}

// Rows [begin, end) of the batch's output, channels_last: the channels of a pixel tap by tap.
template <class T>
void pool_pixels(const ConvolutionShape& s, const Tensor& input, const Tensor& output, int64_t begin, int64_t end) {
  using A = typename AccumulateType<T>::type;
  constexpr int64_t kChunk = 64;  // channels at a time
  const int64_t step_h = input.stride(2), step_w = input.stride(3);
  T* to = static_cast<T*>(output.mutable_data_ptr()) + begin * s.out_w * s.channels;
  for (int64_t y = begin; y < end; ++y) {
    const T* const image = static_cast<const T*>(input.const_data_ptr()) + y / s.out_h * input.stride(0);
    const int64_t top = y % s.out_h * s.stride_h - s.pad_h;
    const Span rows = inside(top, s.kernel_h, s.dilation_h, s.in_h);
    for (int64_t x = 0; x < s.out_w; ++x, to += s.channels) {
      const int64_t left = x * s.stride_w - s.pad_w;
      const Span columns = inside(left, s.kernel_w, s.dilation_w, s.in_w);
      for (int64_t first = 0; first < s.channels; first += kChunk) {
        const int64_t count = std::min(kChunk, s.channels - first);
        A best[kChunk];
        std::fill(best, best + kChunk, -std::numeric_limits<A>::infinity());
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          for (int64_t c = columns.begin; c < columns.end; ++c) {
            const T* const from = image + (top + r * s.dilation_h) * step_h + (left + c * s.dilation_w) * step_w + first;
            for (int64_t i = 0; i < count; ++i) best[i] = greater(static_cast<A>(to_accumulate(from[i])), best[i]);
          }
        }
        for (int64_t i = 0; i < count; ++i) from_accumulate(best[i], to + first + i);
      }
    }
  }
}

// Planes [begin, end) of the batch's, NCHW: a row of outputs tap by tap.
template <class T>
void pool_planes(const ConvolutionShape& s, const Tensor& input, const Tensor& output, int64_t begin, int64_t end) {
  using A = typename AccumulateType<T>::type;
  std::vector<A> best(s.out_w);
  T* to = static_cast<T*>(output.mutable_data_ptr()) + begin * s.out_h * s.out_w;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t offset = plane / s.channels * input.stride(0) + plane % s.channels * input.stride(1);
    const T* const image = static_cast<const T*>(input.const_data_ptr()) + offset;
    for (int64_t y = 0; y < s.out_h; ++y) {
      std::fill(best.begin(), best.end(), -std::numeric_limits<A>::infinity());
      const int64_t top = y * s.stride_h - s.pad_h;
      const Span rows = inside(top, s.kernel_h, s.dilation_h, s.in_h);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* const row = image + (top + r * s.dilation_h) * input.stride(2);
        for (int64_t c = 0; c < s.kernel_w; ++c) {
          const int64_t left = c * s.dilation_w - s.pad_w;
          const Span outputs = inside(left, s.out_w, s.stride_w, s.in_w);
          for (int64_t x = outputs.begin; x < outputs.end; ++x) {
            best[x] = greater(static_cast<A>(to_accumulate(row[left + x * s.stride_w])), best[x]);
          }
        }
      }
      for (int64_t x = 0; x < s.out_w; ++x) from_accumulate(best[x], to++);
    }
  }
}

template <class T>
void pool(const ConvolutionShape& s, Layout layout, const Tensor& input, const Tensor& output) {
  const bool last = layout == Layout::kNHWC;
  const int64_t count = s.batch * (last ? s.out_h : s.channels);
  const int64_t work = output.numel() / count * s.kernel_h * s.kernel_w;
  parallel_for(0, count, std::max<int64_t>(1, (1 << 15) / work), [&](int64_t begin, int64_t end) {
    last ? pool_pixels<T>(s, input, output, begin, end) : pool_planes<T>(s, input, output, begin, end);
  });
}

}  // namespace

Tensor max_pool2d(const Tensor& input, const Ints kernel_size, const Ints stride, const Ints padding, const Ints dilation) {
  const CpuProblem p = pixelwise_problem(kOp, input);
  check_pair(kOp, "kernel_size", kernel_size, 1);
  check_pair(kOp, "padding", padding, 0);
  const ConvolutionShape s =
      check_filter(kOp, input, "kernel_size", p.dtype, kernel_size[0], kernel_size[1], stride, padding, dilation);
  for (size_t i = 0; i < 2; ++i) {
    DWCONV_CHECK(padding[i] <= kernel_size[i] / 2, kOp, ": padding must be at most half of kernel_size, ", kernel_size[i],
                 ", but got ", padding[i]);
  }
  check_output(kOp, input, s, s.channels, padding);
  const Tensor x = as_layout(input, p.layout);
  const Tensor output = fresh_output(kOp, input, {s.batch, s.channels, s.out_h, s.out_w}, p.layout);
  with_type(p.dtype, [&](auto zero) { pool<decltype(zero)>(s, p.layout, x, output); });
  return output;
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&dwconv::max_pool2d)); }
