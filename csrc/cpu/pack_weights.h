// Weights into the order and type the kernels read, and weight gradients back.
#pragma once

#include "../problem.h"

namespace dwconv {

// Filter rows begin, begin + step, ... (count of them): a whole filter, or the flipped taps of one stride phase.
struct FilterSlice {
  int64_t begin = 0, step = 1, count = 0;
};

// weight is (channels * multiplier, 1, kernel_h, kernel_w), contiguous, of `dtype`. The element of channel c, multiplier
// m and slice position (r, s) goes to packed[c * stride_c + m * stride_m + r * stride_r + s * stride_s].
struct DepthwisePacking {
  int64_t channels, multiplier, kernel_h, kernel_w;
  FilterSlice rows, columns;
  int64_t stride_c, stride_m, stride_r, stride_s;
};
void pack_depthwise(DType dtype, const void* weight, const DepthwisePacking& packing, void* packed);

// (out_channels, channels) into panels [ceil(out_channels / panel)][channels][panel], zero-padded.
void pack_pointwise_panels(DType dtype, const void* weight, int64_t out_channels, int64_t channels, int64_t panel, void* packed);

// `count` values of `dtype` widened to the accumulation type.
void widen(DType dtype, const void* values, int64_t count, void* wide);

// to[c * to_stride_c + tap] = sum over parts, in order, of partial[part * part_size + c * stride_c + tap * stride_t].
void reduce_parts(DType dtype, const void* partial, int64_t parts, int64_t part_size, int64_t channels, int64_t taps,
                  int64_t stride_c, int64_t stride_t, void* to, int64_t to_stride_c);

}  // namespace dwconv
