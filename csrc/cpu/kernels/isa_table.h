// Expands kernels.inc into one instruction set's table. Included once, last, by each isa_*.cpp.
#pragma once

#include "depthwise_backward_weight_nchw_rows.h"
#include "depthwise_backward_weight_nchw_transposed.h"
#include "depthwise_forward_nchw_rows.h"
#include "depthwise_forward_nchw_transposed.h"
#include "separable_forward.h"

namespace dwconv::DWCONV_ISA {

static const KernelRow kRows[] = {
#define DWCONV_DEPTHWISE(function, T, O, dtype, out_dtype, layout, kernel, stride) \
  {#function,                                                                      \
   "depthwise_conv2d",                                                             \
   "forward",                                                                      \
   DType::dtype,                                                                   \
   DType::out_dtype,                                                               \
   Layout::layout,                                                                 \
   kernel,                                                                         \
   stride,                                                                         \
   function##_weight_order,                                                        \
   DWCONV_ISA_ID,                                                                  \
   DWCONV_VECTOR_BYTES,                                                            \
   &function##_scratch<T>,                                                         \
   &function<T, O, kernel, stride>,                                                \
   nullptr,                                                                        \
   nullptr},
#define DWCONV_BACKWARD_WEIGHT(function, T, dtype, layout, kernel, stride) \
  {#function,                                                              \
   "depthwise_conv2d",                                                     \
   "backward_weight",                                                      \
   DType::dtype,                                                           \
   DType::dtype,                                                           \
   Layout::layout,                                                         \
   kernel,                                                                 \
   stride,                                                                 \
   Layout::kNHWC,                                                          \
   DWCONV_ISA_ID,                                                          \
   DWCONV_VECTOR_BYTES,                                                    \
   &function##_scratch<T>,                                                 \
   nullptr,                                                                \
   &function<T, kernel, stride>,                                           \
   nullptr},
#define DWCONV_SEPARABLE(function, T, dtype, layout)                                                                        \
  {                                                                                                                         \
      #function,   "separable_conv2d", "forward",     DType::dtype,        DType::dtype,           Layout::layout, 0,       \
      0,           Layout::layout,     DWCONV_ISA_ID, DWCONV_VECTOR_BYTES, &function##_scratch<T>, nullptr,        nullptr, \
      &function<T>},
#include "../kernels.inc"
#undef DWCONV_DEPTHWISE
#undef DWCONV_BACKWARD_WEIGHT
#undef DWCONV_SEPARABLE
};

KernelTable kernel_table() {
  return {kRows, static_cast<int32_t>(sizeof kRows / sizeof kRows[0]), DWCONV_VECTOR_BYTES, kPanel<float>, kPanel<double>};
}

}  // namespace dwconv::DWCONV_ISA
