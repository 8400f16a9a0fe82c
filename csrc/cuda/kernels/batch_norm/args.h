// What the launcher hands to the kernels of BatchNorm and activation. Plain: no torch, no CUDA.
#pragma once

#include "common/problem.h"

namespace dwconv::cuda {

constexpr int kNormThreads = 256, kNormBlocks = 2;        // of a block; that the registers of an SM must hold
constexpr int kJoinedChannels = 8, kJoiningThreads = 64;  // channels of a block that joins parts, and threads of each

// Tensors are dense. A block's threads are `rows` times `lanes`; the rest idle. The sums of a part are
// partial[part][value][channel] in the accumulation type: mean, sum of squares about it and count of the statistics; the two sums
// of backward.
//
//   channels_last   lanes lie along the channels of one of `slabs` slabs, rows along pixels; a part is a range of all pixels
//   NCHW            lanes lie along one of the `pieces` pieces of a plane, rows along images (of sums, for which a part is a
//   piece
//                   of the planes of a range of images) or planes
struct BatchNormArgs {
  Layout layout = Layout::kNCHW;
  int64_t batch = 0, channels = 0, pixels = 0;  // pixels of an image
  const void* input = nullptr;
  const void* grad_output = nullptr;
  void* output = nullptr;        // the result, or grad_input
  const void* weight = nullptr;  // this and the following in the accumulation type, of a channel each; null: ones
  const void* bias = nullptr;    // null: zeros
  const void* mean = nullptr;
  const void* variance = nullptr;  // biased
  const void* grad_weight = nullptr;
  const void* grad_bias = nullptr;
  void* partial = nullptr;
  double eps = 0;
  double count = 0;  // values of a channel that the gradients were summed over
  Activation activation;
  int32_t lanes = 1, rows = 1;
  int32_t slabs = 1, pieces = 1;
  int64_t piece = 0;    // elements
  int32_t parts = 1;    // of sums; in NCHW ranges of images times pieces
  int32_t aligned = 0;  // every run of 16 bytes of channels, or of a plane, lies on a multiple of 16 bytes
};

// Joins the parts of sums: into the statistics, or into the gradients of weight and bias.
struct JoinPartsArgs {
  const void* partial = nullptr;
  const void* variance = nullptr;  // of the gradients
  void* first = nullptr;           // mean, or grad_weight
  void* second = nullptr;          // variance, or grad_bias
  double eps = 0;
  int64_t channels = 0;
  int32_t parts = 1;
};

}  // namespace dwconv::cuda
