// What the launcher hands to the inverted residual's kernel. Plain: no torch, no CUDA.
#pragma once

#include "cuda/kernels/args.h"

namespace dwconv::cuda {

// `block` is the fused block after the expansion, of one image's tiles: its problem is the expanded image's, whose channels are
// the hidden ones, but input and in_stride_* are of the image that is expanded. Biases are of the accumulation type.
struct InvertedResidualArgs {
  SeparableBlockArgs block;
  int64_t in_channels = 0;
  const void* expand_weight = nullptr;  // [hidden channels][in_channels]
  const void* expand_bias = nullptr;
  Activation expand_activation;
  int32_t tiles_h = 0;
  int32_t taps = 0;                     // of a filter
  int32_t in_rows = 0, in_columns = 0;  // of the expanded image that a tile reads
  int32_t in_pixels = 0;                // those, and what a run of outputs may read past them: a multiple of a warp's rows
  int32_t pitch = 0;                    // bytes of a pixel, and of a hidden channel's weights: an odd number of chunks of 16
  // Where in shared memory, behind the map of the tile's pixels and, from block.map_bytes on, the slot: two slabs of the
  // projection's weights and the expanded slab, in whose place the sums are staged; the input; two slabs of the expansion's
  // weights, of filters and of both biases. What is swizzled lies on multiples of 1024 bytes.
  int32_t ring_at = 0, expanded_at = 0, input_at = 0, weights_at = 0, filters_at = 0, biases_at = 0;
  int32_t aligned_expand = 0;       // every run of 16 bytes of expand_weight lies on a multiple of 16 bytes
  Divisor columns, pixels, chunks;  // in_columns; in_pixels; chunks of 16 bytes of a pixel, an even number
};

// Chunks of 16 bytes of a line of so many bytes: whole steps of a matrix product, of two chunks each.
constexpr int64_t line_chunks(int64_t bytes) { return round_up(bytes, 32) / 16; }

}  // namespace dwconv::cuda
