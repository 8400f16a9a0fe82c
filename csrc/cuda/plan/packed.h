// Packed weights on CUDA: those that the kernels read, one behind the other in the types that they read, each from a multiple of
// 16 bytes on: filters [channels][kernel_h][kernel_w], their biases, weights [out_channels][channels], their biases. Weights are
// rounded to the input's type; biases stay in the accumulation type, since the folded ones of a channel that is always zero need
// not fit float16.
#pragma once

#include "common/dtype.h"

namespace dwconv::cuda {

// Bytes from the first on. A pointwise convolution alone has a filter of 0x0.
struct PackedPlaces {
  int64_t dw_weight = 0, dw_bias = 0, pw_weight = 0, pw_bias = 0, end = 0;

  PackedPlaces(DType dtype, int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w) {
    const int64_t unit = element_size(dtype), wide = accumulate_size(dtype), taps = kernel_h * kernel_w;
    const auto place = [&](int64_t bytes) {
      const int64_t begin = end;
      end = round_up(end + bytes, 16);
      return begin;
    };
    dw_weight = place(channels * taps * unit);
    dw_bias = place(taps > 0 ? channels * wide : 0);
    pw_weight = place(out_channels * channels * unit);
    pw_bias = place(out_channels * wide);
  }
};

}  // namespace dwconv::cuda
