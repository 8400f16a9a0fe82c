// Expands kernels.inc into one instruction set's table. Included once, last, by each isa_*.cpp.
#pragma once

#include "batch_norm_nchw.h"
#include "batch_norm_nhwc.h"
#include "depthwise_backward_input.h"
#include "depthwise_backward_weight_nchw_direct.h"
#include "depthwise_backward_weight_nchw_rows.h"
#include "depthwise_backward_weight_nchw_transposed.h"
#include "depthwise_forward_nchw_direct.h"
#include "depthwise_forward_nchw_rows.h"
#include "depthwise_forward_nchw_transposed.h"
#include "depthwise_forward_nhwc_flat.h"
#include "separable_forward.h"
#include "separable_forward_nchw_direct.h"

namespace dwconv::DWCONV_ISA {

// clang-format off
#define DWCONV_ROW(FUNCTION, OP, PASS, T, DTYPE, OUT_DTYPE, LAYOUT, FILTER, STRIDE, ORDER, ...)               \
  {.name = #FUNCTION, .op = OP, .pass = PASS, .dtype = DType::DTYPE, .out_dtype = DType::OUT_DTYPE,          \
   .layout = Layout::LAYOUT, .filter = FILTER, .stride = STRIDE, .weight_order = ORDER, .isa = DWCONV_ISA_ID, \
   .vector_bytes = DWCONV_VECTOR_BYTES, .scratch = &FUNCTION##_scratch<T>, __VA_ARGS__},
#define DWCONV_DEPTHWISE(function, T, O, dtype, out_dtype, layout, kernel, stride)                    \
  DWCONV_ROW(function, "depthwise_conv2d", "forward", T, dtype, out_dtype, layout, kernel, stride, \
             function##_weight_order, .depthwise = &function<T, O, kernel, stride>)
#define DWCONV_BACKWARD_INPUT(function, T, dtype, layout)                                     \
  DWCONV_ROW(function, "depthwise_conv2d", "backward_input", T, dtype, dtype, layout, 0, 0, \
             Layout::kNHWC, .backward_input = &function<T>)
#define DWCONV_BACKWARD_WEIGHT(function, T, dtype, layout, kernel, stride)                             \
  DWCONV_ROW(function, "depthwise_conv2d", "backward_weight", T, dtype, dtype, layout, kernel, stride, \
             Layout::kNHWC, .backward_weight = &function<T, kernel, stride>)
#define DWCONV_SEPARABLE(function, T, dtype, layout)                                                    \
  DWCONV_ROW(function, "separable_conv2d", "forward", T, dtype, dtype, layout, 0, 0, Layout::kNHWC, \
             .separable = &function<T>, .pointwise = pointwise_format<T>())
#define DWCONV_BATCH_NORM(function, pass, T, dtype, layout)                                         \
  DWCONV_ROW(function, "batch_norm_act", pass, T, dtype, dtype, layout, 0, 0, Layout::kNHWC, \
             .batch_norm = &function<T>)
// clang-format on

static const KernelRow kRows[] = {
#include "../kernels.inc"
#undef DWCONV_ROW
#undef DWCONV_DEPTHWISE
#undef DWCONV_BACKWARD_INPUT
#undef DWCONV_BACKWARD_WEIGHT
#undef DWCONV_SEPARABLE
#undef DWCONV_BATCH_NORM
};

KernelTable kernel_table() { return {kRows, static_cast<int32_t>(sizeof kRows / sizeof kRows[0]), DWCONV_VECTOR_BYTES}; }

}  // namespace dwconv::DWCONV_ISA
