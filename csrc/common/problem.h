// What a kernel knows: plain structs, no torch, no standard containers.
//
// A depthwise pass is described as one correlation:
//   out[n, c, y, x] = act(bias[c] + sum_{m, r, s} w[m, r, s, c] *
//                     in[n, c, m, y * stride_h + r * dilation_h - pad_h, x * stride_w + s * dilation_w - pad_w])
// where samples outside the input count as absent. The forward pass has depth == 1. The input gradient
// is the same correlation of grad_output with the flipped filter, once per phase of the stride (each phase writes
// every stride-th row and column of grad_input, hence the output strides), and sums `depth` = channel
// multiplier planes. Paddings are signed: a negative one crops.
#pragma once

#include "common/dtype.h"

namespace dwconv {

enum class ActivationKind : int32_t {
  kIdentity = 0,
  kRelu,
  kRelu6,
  kSilu,
  kHardswish,
  kGelu,
  kGeluTanh,
  kLeakyRelu,
};

enum class Op : int32_t {
  kDepthwise = 0,
  kSeparable,
  kPointwise,
  kInvertedResidual,
  kPatch,
  kBatchNorm,
  kSqueezeExcitation,
  kLayerNorm,
  kDepthwiseNorm,
  kDepthwiseStep,
};
enum class Pass : int32_t {
  kForward = 0,
  kBackward,
  kBackwardInput,
  kBackwardWeight,
  kPointwise,  // of a fused block, where the depthwise stage is a kernel of its own
  kSumParts,   // of the weight gradient
  kActivate,
  kTranspose,
  kStatistics,  // of BatchNorm, on CUDA: its first sweep, and what joins its parts
  kJoinStatistics,
  kJoinMeans,  // of images
  kGradSums,   // the same of its backward pass
  kJoinGradSums,
};

static constexpr const char* op_name(Op op) {
  constexpr const char* kNames[] = {"depthwise_conv2d",   "separable_conv2d",     "pointwise_conv2d",   "inverted_residual",
                                    "patch_conv2d",       "batch_norm_act",       "squeeze_excitation", "layer_norm2d",
                                    "depthwise_norm_act", "depthwise_conv1d_step"};
  return kNames[static_cast<int>(op)];
}
static constexpr const char* pass_name(Pass pass) {
  constexpr const char* kNames[] = {"forward",    "backward",  "backward_input", "backward_weight", "pointwise",
                                    "sum_parts",  "activate",  "transpose",      "statistics",      "join_statistics",
                                    "join_means", "grad_sums", "join_grad_sums"};
  return kNames[static_cast<int>(pass)];
}

struct Activation {
  ActivationKind kind = ActivationKind::kIdentity;
  double slope = 0.01;  // leaky_relu only

  bool operator==(const Activation&) const = default;
};

// All strides are in elements.
struct DepthwiseProblem {
  DType dtype = DType::kFloat32;      // of input and, but for a fused stage, output
  DType out_dtype = DType::kFloat32;  // another where the output is a fused block's scratch
  Layout layout = Layout::kNCHW;
  int64_t batch = 0, channels = 0, depth = 1;
  int64_t in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1, pad_h = 0, pad_w = 0;
  int64_t in_stride_n = 0, in_stride_c = 0, in_stride_h = 0, in_stride_w = 0, in_stride_m = 0;
  int64_t out_stride_n = 0, out_stride_c = 0, out_stride_h = 0, out_stride_w = 0;
  Activation activation;

  bool operator==(const DepthwiseProblem&) const = default;
};

}  // namespace dwconv
