// What the ops hand to the CPU kernels: plain structs, no torch, no standard containers.
#pragma once

#include "common/problem.h"

namespace dwconv {

// The problem, and what the plan tells a kernel of this machine.
struct CpuProblem : DepthwiseProblem {
  bool prefetch_input = false, prefetch_output = false;  // not in a cache near by (sequential_rows.h)
  bool prefetch_next_output = false;  // a tile prefetches the output lines of the next one (depthwise_row_pair.h)
  int64_t l1_ways = 8;                // lines of an L1 set (stage_lines.h)

  bool operator==(const CpuProblem&) const = default;
};

// Weights arrive packed in the accumulation type (float, or double for float64), in the order the kernel's row names:
//   kNHWC: [depth][kernel_h][kernel_w][weight_pitch]     kNCHW: [channels][depth][kernel_h][kernel_w]
// In the first, channel c stands at c, c + channels, ... up to the pitch, which leaves a whole vector readable at every
// channel. bias is [weight_pitch] in the same way, or null.
struct DepthwiseArgs {
  CpuProblem problem;
  const void* input = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* output = nullptr;
  int64_t weight_pitch = 0;
  int64_t rows_per_tile = 1;
};

// grad_weight: partial[part][tap][channel] in the accumulation type, and partial_bias[part][channel]; a second stage adds
// the parts in order. The problem is that of the forward pass.
struct BackwardWeightArgs {
  CpuProblem problem;
  const void* input = nullptr;
  const void* grad_output = nullptr;
  void* partial = nullptr;       // null: only the bias gradient is wanted
  void* partial_bias = nullptr;  // null: not wanted
  int64_t parts = 1;
  int64_t rows_per_tile = 1;
};

// The input gradient at a stride: phase (first_h, first_w) covers grad_input's rows first_h, first_h + stride_h, ... (out_h of
// them) and columns alike, each a stride-1 correlation of grad_output with kernel_h x kernel_w of the filter's taps, flipped.
struct InputPhase {
  int64_t first_h, first_w, out_h, out_w;
  int64_t kernel_h, kernel_w, dilation_h, dilation_w, pad_h, pad_w;
  const void* weight;  // kNHWC order, [depth][kernel_h][kernel_w][weight_pitch]
};
// The problem's input is grad_output (in_*, with depth = multiplier) and its output grad_input (out_*); filter, stride, padding
// and dilation are the forward pass's. A transposed convolution is the same, with a bias (as DepthwiseArgs's, in the weights'
// order) and the problem's activation.
struct BackwardInputArgs {
  CpuProblem problem;
  const void* input = nullptr;
  const void* bias = nullptr;
  void* output = nullptr;
  const InputPhase* phases = nullptr;
  int64_t phase_count = 0;
  int64_t weight_pitch = 0;
  int64_t rows_per_tile = 1;  // of each phase
};

struct Tiles;  // what a worker is to do (cpu/kernels/tiles.h)
using DepthwiseKernel = void (*)(const DepthwiseArgs&, void* scratch, Tiles);
using BackwardInputKernel = void (*)(const BackwardInputArgs&, void* scratch, Tiles);
using BackwardWeightKernel = void (*)(const BackwardWeightArgs&, void* scratch, Tiles);

// How a fused block's kernel wants the pointwise weights: panels [ceil(out_channels / panel)][depth][panel] of `dtype`,
// zero-padded, with depth the channels up to a multiple of `depth_multiple`. bfloat16 panels hold channels k and k + 1 of an
// output channel side by side: [depth / 2][panel][2]. The depthwise stage's result is of `dtype` too.
struct PointwiseFormat {
  int32_t panel, depth_multiple;
  DType dtype;
  int32_t rows;  // pixels of a register tile
};

// The weights of a fused block, or of a pointwise convolution (a filter of 0x0), in one run of bytes, as SeparableArgs wants
// them, each kind on a cache line; first what they were packed for.
struct BlockFormat {
  uint32_t version = 3;  // of this layout
  DType dtype;
  PointwiseFormat pointwise;
  int64_t channels, out_channels, kernel_h, kernel_w;
  int64_t pitch;  // of the depthwise weights
};

// The expansion of an inverted residual, a pointwise convolution before a fused block; the block's problem is that of the
// expanded image, which is made a tile's rows at a time: [row][column][pitch] of the product's type.
struct ExpandArgs {
  const void* input = nullptr;  // dense in its layout
  int64_t channels = 0;         // of the input
  int64_t in_stride_n = 0, in_stride_c = 0;
  const void* weight = nullptr;  // as SeparableArgs's pw_weight
  const void* bias = nullptr;
  Activation activation;
  // The scratch: most_pixels of the expanded image, `pitch` apart; kExpandPixels copies of the input's, as many more as a product
  // reads past them, copy_pitch apart; and as many rows of a panel.
  int64_t scratch_offset = 0, most_pixels = 0, pitch = 0, copy_pitch = 0;
};
constexpr int64_t kExpandPixels = 168;  // multiplied at a time: whole register tiles of every set

// A dense convolution of few channels, as the product of patches: the problem is the convolution's, with any strides of the
// input, but its channels are a patch's, [kernel_h][kernel_w][channels].
struct PatchArgs {
  int64_t channels = 0;
  int64_t scratch_offset = 0, row_pitch = 0;  // the staged input rows (patches.h)
};

// The fused block. The depthwise stage is a kNHWC kernel whose out_dtype is the pointwise format's: of the input's type and
// strides in channels_last, of the accumulation type in NCHW, where the block's kernel transposes the input for it.
struct SeparableArgs {
  DepthwiseArgs depthwise;  // of the whole input; the block's kernel cuts it
  DepthwiseKernel depthwise_kernel = nullptr;
  int64_t out_channels = 0;
  const void* pw_weight = nullptr;  // in the row's PointwiseFormat
  const void* pw_bias = nullptr;    // whole panels, zero-padded; accumulation type
  const void* residual = nullptr;   // contiguous like the output, or null
  void* output = nullptr;           // contiguous in its layout
  // A pointwise convolution has no depthwise kernel: its problem is that of a 1x1 filter without padding, whose pixels are the
  // product's, times a gate, [batch][gate_pitch] of the accumulation type with whole vectors, where that is not null.
  const void* gate = nullptr;
  int64_t gate_pitch = 0;
  Activation activation;
  const ExpandArgs* expand = nullptr;  // an inverted residual's; or null
  const PatchArgs* patches = nullptr;  // a dense convolution's, which has no depthwise kernel; or null
  int64_t rows_per_tile = 1;           // of the batch * out_h output rows
  int64_t splits = 1;                  // ranges of output channels; tile = rows * splits + split
};
using SeparableKernel = void (*)(const SeparableArgs&, void* scratch, Tiles);

// BatchNorm by the batch's statistics, and the activation after it. The problem is that of a 1x1 convolution: it gives shape,
// dtype, layout and activation. The tensors are dense in the layout; what there is one of a channel is in the accumulation type.
struct BatchNormArgs {
  CpuProblem problem;
  double eps = 0;
  const void* input = nullptr;
  const void* grad_output = nullptr;
  void* output = nullptr;        // backward: grad_input
  const void* weight = nullptr;  // null: one
  const void* bias = nullptr;    // null: zero
  void* mean = nullptr;          // NCHW's forward pass writes them, backward reads them
  void* variance = nullptr;      // of n, not n - 1
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  // channels_last goes over the tensor in two calls: sums [part][2][channels], the mean and the squares about it or those of
  // GradSums; then, with constants [mean, scale, bias, slope, offset][constants_pitch], the output.
  bool wants_sums = false;
  int64_t parts = 1;
  double* partial = nullptr;
  const void* constants = nullptr;
  int64_t constants_pitch = 0;
};
using BatchNormKernel = void (*)(const BatchNormArgs&, void* scratch, Tiles);

// Squeeze-and-excitation. The problem gives the input's shape, strides, dtype and layout, and the activation between the layers.
// Weights and biases have the input's dtype, means and hidden values the accumulation type.
enum class SqueezeStage : int32_t { kMean = 0, kHidden, kGate };
enum class GateKind : int32_t { kSigmoid = 0, kHardsigmoid };
struct SqueezeArgs {
  CpuProblem problem;
  int64_t squeezed = 0;
  const void* input = nullptr;
  const void* reduce_weight = nullptr;  // [squeezed][channels]
  const void* reduce_bias = nullptr;    // or null
  const void* expand_weight = nullptr;  // [squeezed][channels]
  const void* expand_bias = nullptr;    // or null
  GateKind gate = GateKind::kSigmoid;
  SqueezeStage stage = SqueezeStage::kMean;  // a call each, in order
  void* mean = nullptr;                      // [batch][channels]
  void* hidden = nullptr;                    // [batch][hidden_pitch], whole vectors
  int64_t hidden_pitch = 0;
  void* output = nullptr;  // [batch][channels]
};
using SqueezeKernel = void (*)(const SqueezeArgs&, void* scratch, Tiles&);
// LayerNorm over the channels of each pixel, channels_last; the output is dense. Weight and bias are in the accumulation type.
struct LayerNormArgs {
  CpuProblem problem;
  double eps = 0;
  const void* input = nullptr;
  const void* weight = nullptr;  // or null
  const void* bias = nullptr;    // or null
  void* output = nullptr;
  int64_t rows_per_tile = 1;
};
using LayerNormKernel = void (*)(const LayerNormArgs&, void* scratch, Tiles);

// One output of a causal convolution in one dimension. The problem gives batch, channels, kernel_w, dilation_w, dtype, activation
// and the input's strides n and c; output, weight [channels][kernel_w] and bias are dense, all of the input's dtype.
struct StepArgs {
  CpuProblem problem;
  const void* input = nullptr;
  void* state = nullptr;  // [batch][channels][(kernel_w - 1) * dilation_w]
  int64_t state_stride_n = 0, state_stride_c = 0, state_stride_w = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;  // or null
  void* output = nullptr;
};
using StepKernel = void (*)(const StepArgs&, void* scratch, Tiles);
constexpr int64_t kStepChannels = 128;  // of a tile
constexpr int64_t kMostLanes = 16;      // of any set's vector of accumulation types
constexpr int kMeanVectors = 4;         // of channels, of which a channels_last tile takes the means

}  // namespace dwconv
