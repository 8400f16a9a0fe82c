// max_pool2d on the CPU, in inference: without the indices of the maxima that a derivative would want.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include <limits>

#include "cpu/kernels/scalar_types.h"
#include "cpu/ops/calls.h"
#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "max_pool2d";

// The greater one; NaN where one of them is, as in torch.
template <class A>
A greater(A value, A best) {
  return value > best || value != value ? value : best;
}

struct Taps {
  int64_t begin, end;  // those inside the image
};
Taps taps_inside(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = origin >= 0 ? 0 : ceil_div(-origin, dilation);
  const int64_t end = size <= origin ? 0 : ceil_div(size - origin, dilation);
  return {begin, std::min(kernel, end)};
}

// Calls body(sample's row, sample's column) for the taps of output (y, x) inside the image.
template <class Body>
void for_each_tap(const ConvolutionShape& s, int64_t y, int64_t x, Body body) {
  const int64_t top = y * s.stride_h - s.pad_h, left = x * s.stride_w - s.pad_w;
  const Taps rows = taps_inside(top, s.kernel_h, s.dilation_h, s.in_h);
  const Taps columns = taps_inside(left, s.kernel_w, s.dilation_w, s.in_w);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t c = columns.begin; c < columns.end; ++c) body(top + r * s.dilation_h, left + c * s.dilation_w);
  }
}

// Rows [begin, end) of the batch's output, channels_last.
template <class T>
void pool_pixels(const ConvolutionShape& s, const Tensor& input, const Tensor& output, int64_t begin, int64_t end) {
  using A = typename AccumulateType<T>::type;
  constexpr int64_t kChunk = 64;  // channels at a time
  const int64_t step_h = input.stride(2), step_w = input.stride(3);
  T* to = static_cast<T*>(output.mutable_data_ptr()) + begin * s.out_w * s.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* const image = static_cast<const T*>(input.const_data_ptr()) + row / s.out_h * input.stride(0);
    for (int64_t x = 0; x < s.out_w; ++x, to += s.channels) {
      for (int64_t first = 0; first < s.channels; first += kChunk) {
        const int64_t count = std::min(kChunk, s.channels - first);
        A best[kChunk];
        std::fill(best, best + kChunk, -std::numeric_limits<A>::infinity());
        for_each_tap(s, row % s.out_h, x, [&](int64_t h, int64_t w) {
          const T* const from = image + h * step_h + w * step_w + first;
          for (int64_t i = 0; i < count; ++i) best[i] = greater(static_cast<A>(to_accumulate(from[i])), best[i]);
        });
        for (int64_t i = 0; i < count; ++i) from_accumulate(best[i], to + first + i);
      }
    }
  }
}

// Planes [begin, end) of the batch's, NCHW.
template <class T>
void pool_planes(const ConvolutionShape& s, const Tensor& input, const Tensor& output, int64_t begin, int64_t end) {
  using A = typename AccumulateType<T>::type;
  T* to = static_cast<T*>(output.mutable_data_ptr()) + begin * s.out_h * s.out_w;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t offset = plane / s.channels * input.stride(0) + plane % s.channels * input.stride(1);
    const T* const from = static_cast<const T*>(input.const_data_ptr()) + offset;
    for (int64_t y = 0; y < s.out_h; ++y) {
      for (int64_t x = 0; x < s.out_w; ++x, ++to) {
        A best = -std::numeric_limits<A>::infinity();
        for_each_tap(s, y, x, [&](int64_t h, int64_t w) {
          best = greater(static_cast<A>(to_accumulate(from[h * input.stride(2) + w * input.stride(3)])), best);
        });
        from_accumulate(best, to);
      }
    }
  }
}

template <class T>
void pool(const ConvolutionShape& s, Layout layout, const Tensor& input, const Tensor& output) {
  const bool last = layout == Layout::kNHWC;
  const int64_t count = s.batch * (last ? s.out_h : s.channels);
  const int64_t work = output.numel() / count * s.kernel_h * s.kernel_w;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) / work), [&](int64_t begin, int64_t end) {
    last ? pool_pixels<T>(s, input, output, begin, end) : pool_planes<T>(s, input, output, begin, end);
  });
}

}  // namespace

Tensor max_pool2d(const Tensor& input, const Ints kernel_size, const Ints stride, const Ints padding, const Ints dilation) {
  const CpuProblem p = pixelwise_problem(kOp, input);
  check_pair(kOp, "kernel_size", kernel_size, 1);
  const ConvolutionShape s =
      check_filter(kOp, input, "kernel_size", p.dtype, kernel_size[0], kernel_size[1], stride, padding, dilation);
  for (size_t i = 0; i < 2; ++i) {
    DWCONV_CHECK(padding[i] <= kernel_size[i] / 2, kOp, ": padding must be at most half of kernel_size, ", kernel_size[i],
                 ", but got ", padding[i]);
  }
  check_output(kOp, input, s, s.channels, padding);
  const Tensor x = as_layout(input, p.layout);
  const Tensor output = fresh_output(input, {s.batch, s.channels, s.out_h, s.out_w}, p.layout);
  switch (p.dtype) {
    case DType::kFloat32:
      pool<float>(s, p.layout, x, output);
      break;
    case DType::kFloat64:
      pool<double>(s, p.layout, x, output);
      break;
    case DType::kBFloat16:
      pool<BFloat16>(s, p.layout, x, output);
      break;
    case DType::kFloat16:
      pool<Float16>(s, p.layout, x, output);
      break;
  }
  return output;
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&dwconv::max_pool2d)); }
