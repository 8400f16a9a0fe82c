// Expands a family's part of kernels.inc into a table of one instruction set. Included once, last, by each isa/*.h.
//   DWCONV_FORWARD_NHWC, DWCONV_FORWARD_NCHW, DWCONV_BACKWARD, DWCONV_BLOCKS    one of them is defined: the family
// A file each, so that they compile side by side.
#pragma once

#include "cpu/kernels/kernel_table.h"

#if defined(DWCONV_FORWARD_NHWC)
#define DWCONV_TABLE forward_nhwc_table
#include "cpu/kernels/depthwise_forward/depthwise_forward_nhwc.h"
#include "cpu/kernels/depthwise_forward/depthwise_forward_nhwc_flat.h"
#elif defined(DWCONV_FORWARD_NCHW)
#define DWCONV_TABLE forward_nchw_table
#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_direct.h"
#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_rows.h"
#include "cpu/kernels/depthwise_forward/depthwise_forward_nchw_transposed.h"
#elif defined(DWCONV_BACKWARD)
#define DWCONV_TABLE backward_table
#include "cpu/kernels/depthwise_backward/depthwise_backward_input.h"
#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nchw_direct.h"
#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nchw_rows.h"
#include "cpu/kernels/depthwise_backward/depthwise_backward_weight_nchw_transposed.h"
#elif defined(DWCONV_BLOCKS)
#define DWCONV_TABLE blocks_table
#include "cpu/kernels/batch_norm/batch_norm_nchw.h"
#include "cpu/kernels/batch_norm/batch_norm_nhwc.h"
#include "cpu/kernels/depthwise_step/depthwise_step.h"
#include "cpu/kernels/layer_norm/layer_norm.h"
#include "cpu/kernels/separable/separable_forward.h"
#include "cpu/kernels/separable/separable_forward_nchw_direct.h"
#include "cpu/kernels/squeeze_excitation/squeeze_excitation.h"
#endif

namespace dwconv::DWCONV_ISA {

// clang-format off
#define DWCONV_ROW(FUNCTION, OP, PASS, FAMILY, T, DTYPE, LAYOUT, FILTER, STRIDE, ORDER, ...)                   \
  {.name = #FUNCTION, .op = Op::OP, .pass = Pass::PASS, .family = Family::FAMILY,                              \
   .dtype = DType::DTYPE, .layout = Layout::LAYOUT,                                                            \
   .filter = FILTER, .stride = STRIDE, .weight_order = ORDER, .isa = DWCONV_ISA_ID,                            \
   .vector_bytes = DWCONV_VECTOR_BYTES, .scratch = &FUNCTION##_scratch<T, FILTER>, __VA_ARGS__},
#define DWCONV_FORWARD(function, family, T, dtype, layout, kernel, stride)                   \
  DWCONV_ROW(function, kDepthwise, kForward, family, T, dtype, layout, kernel, stride,       \
             function##_weight_order, .depthwise = &function<T, kernel, stride>)
#define DWCONV_BACKWARD_INPUT(function, family, T, dtype, layout)                            \
  DWCONV_ROW(function, kDepthwise, kBackwardInput, family, T, dtype, layout, 0, 0,           \
             Layout::kNHWC, .backward_input = &function<T>)
#define DWCONV_BACKWARD_WEIGHT(function, family, T, dtype, layout, kernel, stride)           \
  DWCONV_ROW(function, kDepthwise, kBackwardWeight, family, T, dtype, layout, kernel, stride, \
             Layout::kNHWC, .backward_weight = &function<T, kernel, stride>)
#define DWCONV_SEPARABLE(function, family, T, dtype, layout)                                 \
  DWCONV_ROW(function, kSeparable, kForward, family, T, dtype, layout, 0, 0, Layout::kNHWC,  \
             .separable = &function<T>, .pointwise = pointwise_format<T>())
#define DWCONV_SQUEEZE(function, family, T, dtype, layout)                                   \
  DWCONV_ROW(function, kSqueezeExcitation, kForward, family, T, dtype, layout, 0, 0, Layout::kNHWC, \
             .squeeze = &function<T>)
#define DWCONV_LAYER_NORM(function, family, T, dtype, layout)                                \
  DWCONV_ROW(function, kLayerNorm, kForward, family, T, dtype, layout, 0, 0, Layout::kNHWC,  \
             .layer_norm = &function<T>)
#define DWCONV_STEP(function, family, T, dtype, layout)                                      \
  DWCONV_ROW(function, kDepthwiseStep, kForward, family, T, dtype, layout, 0, 0, Layout::kNCHW, \
             .step = &function<T>)
#define DWCONV_BATCH_NORM(function, pass, family, T, dtype, layout)                          \
  DWCONV_ROW(function, kBatchNorm, pass, family, T, dtype, layout, 0, 0, Layout::kNHWC,      \
             .batch_norm = &function<T>)
// clang-format on

static const KernelRow kRows[] = {
#include "cpu/kernels.inc"
};

KernelTable DWCONV_TABLE() { return {kRows, static_cast<int32_t>(sizeof kRows / sizeof kRows[0])}; }

// Cores that no row of this file is, or that it calls only where they may be inlined (cores.h).
#if !defined(DWCONV_BASELINE) && defined(DWCONV_FORWARD_NHWC)
#define DWCONV_CORE(T) template void depthwise_forward_nhwc<T, 5, 1>(const DepthwiseArgs&, void*, Tiles);
#if defined(DWCONV_BFLOAT16_PAIRS)
DWCONV_CORE(BFloat16)
#else
DWCONV_CORE(float)
DWCONV_CORE(Float16)
#if DWCONV_VECTOR_BYTES != 64
DWCONV_CORE(BFloat16)
#endif
#endif
#elif !defined(DWCONV_BASELINE) && defined(DWCONV_BACKWARD) && !defined(DWCONV_BFLOAT16_PAIRS)
#define DWCONV_CORE(T, kernel, stride) \
  template void accumulate_rows<T, kernel, stride>(const CpuProblem&, const T*, const T*, int64_t, int64_t, int64_t, T*, T*);
DWCONV_SQUARES(DWCONV_CORE, float)
#endif
#undef DWCONV_CORE

}  // namespace dwconv::DWCONV_ISA
