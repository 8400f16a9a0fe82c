// What the launcher hands to the backward kernel of a depthwise convolution and the BatchNorm and activation after it.
#pragma once

#include "cuda/kernels/args.h"
#include "cuda/kernels/batch_norm/args.h"

namespace dwconv::cuda {

constexpr int kDepthwiseNormThreads = 256, kDepthwiseNormBlocks = 2;
constexpr int kGradientColumns = 4;  // of the input's gradient, a thread's at a time; its rows are the stride
constexpr int depthwise_norm_channels(int kernel) { return kernel > 3 ? 1 : 2; }  // of a thread

// `norm` is batch_norm_backward's: its input is the convolution's output, its count that of the sums; pieces and lanes are
// unused.
struct DepthwiseNormArgs {
  DepthwiseProblem problem;  // of the forward pass; all tensors are dense
  BatchNormArgs norm;
  const void* input = nullptr;  // of the convolution
  const void* weight = nullptr;
  void* grad_input = nullptr;
  void* partial = nullptr;           // [part][channel][tap], the filters' gradient in the accumulation type
  int32_t tile_h = 0, tile_w = 0;    // of the input, multiples of the stride and of kGradientColumns
  int32_t tiles_h = 0, tiles_w = 0;  // of an image
  int64_t tiles = 0;                 // of all images
  int32_t slab = 0;                  // channels_last: channels of a block; NCHW: images of a tile, of the one channel of a block
  int32_t slabs = 0;                 // blocks side by side: slabs of channels, or channels
  int32_t pitch = 0;                 // NCHW: of the lines in shared memory, elements
  int32_t parts = 1;                 // ranges of the tiles
};

// Those of depthwise_rows_nhwc and depthwise_rows_nchw, and for each tile what batch_norm_statistics leaves of a part. A part is
// a tile of an image; by_image: the same tile of all images, with a channel of each image as a channel.
struct DepthwiseStatisticsArgs {
  DepthwiseTileArgs convolution;
  void* partial = nullptr;
  int32_t by_image = 0;
};
constexpr int statistics_blocks(int64_t unit, int channels, int kernel, int stride) {
  const int blocks = row_blocks(unit, channels, kernel, stride);
  return blocks > 2 ? blocks - 1 : blocks;
}
constexpr int plane_statistics_blocks(int kernel) { return plane_row_blocks(kernel) - 1; }

}  // namespace dwconv::cuda
