// interleave_channels on the CPU: a ShuffleNet unit's concatenation and channel shuffle (Ma et al., arXiv:1807.11164).
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "interleave_channels";

// Rows [begin, end) of the batch's, channels_last.
template <class Bits>
void interleave_pixels(const Tensor& first, const Tensor& second, const Tensor& output, int64_t begin, int64_t end) {
  const int64_t channels = first.size(1), height = first.size(2), width = first.size(3);
  const auto row_of = [&](const Tensor& t, int64_t row) {
    return static_cast<const Bits*>(t.const_data_ptr()) + row / height * t.stride(0) + row % height * t.stride(2);
  };
  const int64_t step_a = first.stride(3), step_b = second.stride(3);
  Bits* to = static_cast<Bits*>(output.mutable_data_ptr()) + begin * width * 2 * channels;
  for (int64_t row = begin; row < end; ++row) {
    const Bits *a = row_of(first, row), *b = row_of(second, row);
    for (int64_t x = 0; x < width; ++x, a += step_a, b += step_b, to += 2 * channels) {
      for (int64_t c = 0; c < channels; ++c) to[2 * c] = a[c], to[2 * c + 1] = b[c];
    }
  }
}

// Planes [begin, end) of the output, NCHW.
void interleave_planes(const Tensor& first, const Tensor& second, const Tensor& output, int64_t begin, int64_t end) {
  const int64_t channels = 2 * first.size(1), height = first.size(2), unit = first.element_size(), row = first.size(3) * unit;
  char* to = static_cast<char*>(output.mutable_data_ptr()) + begin * height * row;
  for (int64_t plane = begin; plane < end; ++plane) {
    const Tensor& from = plane % 2 == 0 ? first : second;
    const int64_t offset = plane / channels * from.stride(0) + plane % channels / 2 * from.stride(1);
    for (int64_t y = 0; y < height; ++y, to += row) {
      memcpy(to, static_cast<const char*>(from.const_data_ptr()) + (offset + y * from.stride(2)) * unit, row);
    }
  }
}

}  // namespace

Tensor interleave_channels(const Tensor& first, const Tensor& second) {
  DWCONV_CHECK(first.dim() == 4, kOp, ": first must be 4-dimensional (N, C, H, W), but got shape ", to_string(first));
  check_dtype(kOp, "first", first);
  check_like_input(kOp, "second", second, first);
  DWCONV_CHECK(shape_of(second) == shape_of(first), kOp, ": second must have first's shape ", to_string(first), ", but got ",
               to_string(second));
  const Layout layout = layout_of(first);
  const Ints size = {first.size(0), 2 * first.size(1), first.size(2), first.size(3)};
  const Tensor a = as_layout(first, layout), b = as_layout(second, layout);
  const Tensor output = fresh_output(kOp, first, size, layout);
  if (first.numel() == 0) return output;
  const int64_t count = size[0] * (layout == Layout::kNHWC ? size[2] : size[1]), unit = first.element_size();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, output.numel() * unit / count));
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    if (layout == Layout::kNCHW) return interleave_planes(a, b, output, begin, end);
    if (unit == 2) return interleave_pixels<uint16_t>(a, b, output, begin, end);
    if (unit == 4) return interleave_pixels<uint32_t>(a, b, output, begin, end);
    interleave_pixels<uint64_t>(a, b, output, begin, end);
  });
  return output;
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("interleave_channels", TORCH_BOX(&dwconv::interleave_channels)); }
