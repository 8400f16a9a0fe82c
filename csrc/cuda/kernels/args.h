// What the launchers hand to the CUDA kernels. Plain structs: no torch, no CUDA.
#pragma once

#include "common/problem.h"

namespace dwconv::cuda {

// n / divisor as (n * magic) >> shift, exact for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund and Montgomery, PLDI 1994):
// blocks split indices all the time, and the device has no integer division.
struct Divisor {
  int32_t divisor = 1;
  uint32_t magic = (uint32_t{1} << 31) + 1;
  int32_t shift = 31;
  constexpr Divisor() = default;
  constexpr explicit Divisor(int64_t d) : divisor(static_cast<int32_t>(d)) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(d) + 1);
  }
  constexpr int32_t quotient(int32_t n) const {
    return static_cast<int32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> shift);
  }
};
static_assert(Divisor().quotient(0x7fffffff) == 0x7fffffff && Divisor(1).quotient(0x7fffffff) == 0x7fffffff);
static_assert(Divisor(7).quotient(0x7fffffff) == 306783378 && Divisor(7).quotient(306783378 * 7 - 1) == 306783377);
static_assert(Divisor(0x40000001).quotient(0x7fffffff) == 1 && Divisor(0x7fffffff).quotient(0x7ffffffe) == 0);

constexpr int64_t kMostDivided = 1 << 19;

// What the kernels are compiled for and the plan assumes: the threads of a block at most, and how many such blocks an SM's
// registers must hold; of those that walk down rows (depthwise_rows.cuh, depthwise_backward_weight_rows.cuh) by their values'
// bytes and a thread's channels.
constexpr int row_threads(int64_t unit, int channels, int kernel, int stride) {
  return channels > 1 && unit == 2 && stride == 1 ? 128 : 256;
}
constexpr int row_blocks(int64_t unit, int channels, int kernel, int stride) {
  return row_threads(unit, channels, kernel, stride) == 256 ? 2 : channels == 2 && kernel == 3 ? 5 : 3;
}
constexpr int weight_row_threads(int channels, int kernel, int stride) {
  return channels * kernel * kernel < 32 && kernel + 2 * stride < 8 ? 256 : 128;
}
constexpr int weight_row_blocks(int channels, int kernel, int stride) {
  return weight_row_threads(channels, kernel, stride) == 256 || kernel + stride > 8 ? 2 : 3;
}
constexpr int kBackwardRowThreads = 128, kBackwardRowBlocks = 3;  // depthwise_backward_rows.cuh
constexpr int kPlaneRowThreads = 128,
              kPlaneWeightRowBlocks = 4;  // depthwise_rows_nchw.cuh, depthwise_backward_weight_rows_nchw.cuh
constexpr int plane_row_blocks(int kernel) { return kernel == 3 ? 5 : 4; }
constexpr int nhwc_blocks(int kernel) { return kernel < 7 ? 2 : 1; }
constexpr int nchw_blocks(int kernel) { return kernel == 3 ? 3 : 2; }
constexpr int weight_blocks(int kernel) { return kernel < 7 ? 2 : 1; }
constexpr int kLineThreads = 128, kLineBlocks = 8, kPieceBlocks = 6, kWeightPieceBlocks = 4;  // depthwise_lines.cuh, by layout
constexpr int kLineBytes = 8;  // there, a thread's channels in channels_last
constexpr int kLargeBlocks = 2, kSeparableBlocks = 2;
constexpr int kMostThreads = 256;  // of a block of the kernels without a number of their own
constexpr int kRunTaps = 8;  // outputs of a patch of a large filter's kernels, and taps of a thread of their weight gradient
constexpr int kAnyTaps = 8, kAnyPixels = 1024;  // taps of a thread, pixels of a tile: depthwise_backward_weight_any.cuh

// The block's share of the output: `slab` channels of a tile of pixels in channels_last, tiles of `slab` planes in NCHW.
// Blocks are numbered with the slabs fastest, then columns, rows, images.
struct Tiling {
  int32_t tile_h = 0, tile_w = 0;    // outputs
  int32_t tiles_h = 0, tiles_w = 0;  // of an image
  int32_t slab = 0;
  int64_t slabs = 0;
  int32_t aligned = 0;  // channels_last: every run of 16 bytes of channels lies on a multiple of 16 bytes
};

// forward, with the problem's activation, and backward_input. In backward_input the problem's in_* is grad_output, its out_*
// grad_input; stride, padding and dilation are the forward pass's, and at stride 1 it is the forward kernel over the flipped
// filter with the mirrored padding. forward: output channel o reads input channel o / multiplier; backward_input: input channel c
// sums the multiplier planes of its outputs. A transposed convolution is backward_input with bias and activation, whose output
// channel o reads input channel o / multiplier (`spreads`).
struct DepthwiseTileArgs {
  DepthwiseProblem problem;
  int64_t multiplier = 1;
  const void* input = nullptr;
  const void* weight = nullptr;  // [channels * multiplier][kernel_h][kernel_w], of the input's type
  const void* bias = nullptr;
  void* output = nullptr;
  int32_t wide_bias = 0;  // it is of the accumulation type, as packed weights have it, not of the input's
  int32_t flipped = 0;
  int32_t spreads = 0;  // kAny alone has multipliers
  Tiling tiling;
  // NCHW: elements of a segment of the tile in shared memory, and whether a segment is a plane's whole rows or one row.
  int32_t in_pitch = 0, out_pitch = 0;
  int32_t in_whole = 0, out_whole = 0;
  Divisor slabs, tiles_w, tiles_h, lanes;     // channels_last: the tiling's, and threads of a slab
  Divisor in_columns, in_chunks, out_chunks;  // in channels_last: columns, chunks of a pixel; NCHW: chunks of a segment
  Divisor channels;                           // NCHW: of the problem, up to kMostDivided
};

// backward_weight, first stage: partial[part][output][tap], then partial_bias[part][output], in the accumulation type, or, where
// there is one part, the gradients themselves in the input's. The problem is the forward pass's; its out_* strides are
// grad_output's. A part is a range of the tiles.
struct BackwardWeightTileArgs {
  DepthwiseProblem problem;
  int64_t multiplier = 1;
  const void* input = nullptr;
  const void* grad_output = nullptr;
  void* partial = nullptr;
  void* partial_bias = nullptr;
  Tiling tiling;
  int32_t parts = 1;
  int64_t tiles = 0;                     // of all images, slabs apart
  int32_t groups = 0, group_blocks = 0;  // large filters: runs of 8 taps a block, and blocks that share them
  int32_t in_pitch = 0, out_pitch = 0;
  int32_t in_whole = 0, out_whole = 0;
  Divisor in_columns, out_columns, in_chunks, out_chunks;
};

// backward, input and weight in one launch: the first blocks make the weight's.
struct BackwardTileArgs {
  DepthwiseTileArgs input;
  BackwardWeightTileArgs weight;
  int32_t weight_blocks = 0;
};

// Activations that the depthwise kernels apply to their results. The others' code would be most of theirs: where their output is
// not the fused block's, activate_values applies them.
constexpr bool is_inlined(ActivationKind kind) {
  return kind != ActivationKind::kSilu && kind != ActivationKind::kGelu && kind != ActivationKind::kGeluTanh;
}
struct ActivateArgs {
  const void* input = nullptr;
  void* output = nullptr;
  int64_t count = 0;
  Activation activation;
};

// One output of a causal convolution in one dimension; output, weight [channels][taps] and bias are dense.
constexpr int kStepThreads = 128;
struct StepArgs {
  const void* input = nullptr;
  void* state = nullptr;  // [batch][channels][(taps - 1) * dilation]
  const void* weight = nullptr;
  const void* bias = nullptr;  // or null
  void* output = nullptr;
  int64_t batch = 0, channels = 0, taps = 0, dilation = 1;
  int64_t in_stride_n = 0, in_stride_c = 0;
  int64_t state_stride_n = 0, state_stride_c = 0, state_stride_w = 0;
  Activation activation;
};

// [batch][channels][pixels] to [batch][pixels][channels], activated, in tiles of kTransposed channels by kTransposed pixels.
constexpr int kTransposed = 64;
struct TransposeArgs {
  const void* input = nullptr;
  void* output = nullptr;
  int64_t channels = 0, pixels = 0;
  int64_t channel_tiles = 0, pixel_tiles = 0;
  Activation activation;
  int32_t aligned_in = 0;   // planes are whole runs of 16 bytes, or of 8 of 16-bit values, and begin on a multiple of that
  int32_t aligned_out = 0;  // every run of 16 bytes of channels lies on a multiple of 16 bytes
};

// Second stage, of the weights' and the biases' gradients: output[i] = sum over the parts, in their order, of
// partial[part * count + i].
struct SumPartsArgs {
  const void* partial[2] = {};
  void* output[2] = {};
  int64_t count[2] = {};
  int64_t first_blocks = 0;  // of the weights
  int32_t parts = 1;
};

// The fused block. in_* is the block's input, out_h x out_w its output's size; the depthwise stage's strides are the problem's.
// For the pointwise convolution alone kernel, stride and dilation are 1, the depthwise kernel has applied its activation, and the
// input is channels_last whatever the output's layout.
struct SeparableBlockArgs {
  DepthwiseProblem problem;  // its activation is the depthwise stage's
  int64_t out_channels = 0;
  const void* input = nullptr;
  const void* dw_weight = nullptr;
  const void* dw_bias = nullptr;
  const void* pw_weight = nullptr;  // [out_channels][channels]
  const void* pw_bias = nullptr;
  int32_t wide_bias = 0;           // the biases are of the accumulation type, as packed weights have them, not of the input's
  const void* gate = nullptr;      // [batch][channels], what the pointwise convolution's input is multiplied by, or null
  const void* residual = nullptr;  // contiguous like the output, or null
  void* output = nullptr;          // contiguous in the problem's layout
  Activation activation;
  int32_t tile_rows = 0, tile_w = 0;  // of the batch * out_h rows of the output; tile_rows * tile_w <= pixels
  int32_t warps_m = 0, warps_n = 0;   // a warp has 32 rows by 64 columns: pixels by outputs, in NCHW outputs by pixels
  int32_t pixels = 0, outputs = 0;    // that the block's warps cover together
  int32_t tiles_w = 0;
  int32_t splits = 1;       // blocks that share a tile of pixels, each a range of the output channels
  int32_t slabs = 0;        // of 128 bytes of input channels
  int32_t slots = 0;        // slabs of pixels kept: all of them, or one a stage of the pointwise convolution
  int32_t stages = 0;       // of the weights' ring, 2 or 3
  int32_t map_bytes = 0;    // of the map of the tile's pixels and rows
  int32_t aligned_in = 0;   // channels_last: every run of 16 bytes of the input's channels lies on a multiple of 16 bytes
  int32_t aligned_out = 0;  // the same of output and residual
  int32_t aligned_weight = 0;
  int64_t row_tiles = 0;
  Divisor tile_columns, run_columns, runs;  // tile_w; runs of 4 pixels in a row of the tile; and in the tile
  Divisor image_rows;                       // out_h, up to kMostDivided
};
constexpr int kColumnPadding = 8;  // values between NCHW's lines of pixels, against bank conflicts

}  // namespace dwconv::cuda
