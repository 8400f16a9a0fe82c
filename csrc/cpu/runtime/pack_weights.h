// Weights into the order and type the kernels read, and weight gradients back.
#pragma once

#include "cpu/kernels/args.h"

namespace dwconv {

// Filter rows begin, begin + step, ... (count of them): a whole filter, or the flipped taps of one stride phase.
struct FilterSlice {
  int64_t begin = 0, step = 1, count = 0;
};

// weight is (channels * multiplier, 1, kernel_h, kernel_w), contiguous, of `dtype`. Its multiplier planes [first, first +
// depth), cut to the slices, go to `packed` in `order` (DepthwiseArgs): [depth][rows][columns][pitch], channels repeated
// periodically up to the pitch, or [channels][depth][rows][columns].
struct DepthwisePacking {
  int64_t channels, multiplier, kernel_h, kernel_w;
  FilterSlice rows, columns;
  Layout order;
  int64_t pitch;
};
void pack_depthwise(DType dtype, const void* weight, const DepthwisePacking& packing, int64_t first, int64_t depth, void* packed);

// packed[c] = vector[(c % channels) * multiplier + m] for c < count: one plane's bias, repeated like the weights.
void pack_bias(DType dtype, const void* vector, int64_t channels, int64_t multiplier, int64_t m, int64_t count, void* packed);

// `count` values of `dtype` in its accumulation type.
void widen(DType dtype, const void* values, int64_t count, void* wide);

struct BlockWeights {
  const void *dw_weight, *dw_bias, *pw_weight, *pw_bias;  // SeparableArgs's and its DepthwiseArgs's
  const void* dw_weight_planes;                           // dw_weight in the order kNCHW
};
int64_t block_bytes(const BlockFormat& format);
// Of contiguous tensors of `dtype`, the format's or its accumulation type; a null bias is zero.
void pack_block(const BlockFormat& format, DType dtype, const BlockWeights& weights, void* packed);
// Whether the bytes were packed for this; `packed` has room for a BlockFormat.
bool is_packed_for(const BlockFormat& format, const void* packed);
BlockWeights packed_weights(const BlockFormat& format, const void* packed);

// to[c * to_stride_c + tap] = sum over parts, in order, of partial[part][tap][c].
void reduce_parts(DType dtype, const void* partial, int64_t parts, int64_t channels, int64_t taps, void* to, int64_t to_stride_c);

}  // namespace dwconv
