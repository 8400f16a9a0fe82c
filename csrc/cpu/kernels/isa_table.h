// Expands kernels.inc into one instruction set's table. Included once, last, by each isa_*.cpp.
#pragma once

#include "depthwise_backward_weight.h"
#include "depthwise_forward_nchw.h"
#include "depthwise_forward_nhwc.h"
#include "separable_forward.h"

namespace dwconv::DWCONV_ISA {

static const KernelRow kRows[] = {
#define DWCONV_FORWARD(name, T, O, dtype, out_dtype, layout, function, kh, kw, sh, sw)                                 \
  {name, "depthwise_conv2d", "forward", DType::dtype, DType::out_dtype, Layout::layout, kh, kw, sh, sw, DWCONV_ISA_ID, \
   DWCONV_VECTOR_BYTES, function, nullptr, nullptr},
#define DWCONV_BACKWARD_WEIGHT(name, T, dtype, layout, function)                                                   \
  {name, "depthwise_conv2d", "backward_weight", DType::dtype, DType::dtype, Layout::layout, 0, 0, 0, 0, DWCONV_ISA_ID, \
   DWCONV_VECTOR_BYTES, nullptr, function, nullptr},
#define DWCONV_SEPARABLE(name, T, dtype, layout, function)                                                             \
  {name, "separable_conv2d", "forward", DType::dtype, DType::dtype, Layout::layout, 0, 0, 0, 0, DWCONV_ISA_ID,         \
   DWCONV_VECTOR_BYTES, nullptr, nullptr, function},
#include "../kernels.inc"
#undef DWCONV_FORWARD
#undef DWCONV_BACKWARD_WEIGHT
#undef DWCONV_SEPARABLE
};

KernelTable kernel_table() {
  return {kRows,           static_cast<int32_t>(sizeof kRows / sizeof kRows[0]),
          DWCONV_VECTOR_BYTES, kPixelTile,
          kPanel<float>,   kPanel<double>};
}

// Elements of the accumulation type; the plan's sizes come from the kernels' own formulas.
int64_t forward_scratch(const DepthwiseProblem& p, int64_t rows_per_tile, int64_t lanes) {
  return p.layout == Layout::kNCHW ? depthwise_forward_nchw_scratch(p, rows_per_tile, lanes) : 0;
}
int64_t backward_weight_scratch(const DepthwiseProblem& p, int64_t rows_per_tile, int64_t lanes) {
  return p.layout == Layout::kNCHW ? depthwise_backward_weight_nchw_scratch(p, rows_per_tile, lanes) : 0;
}
int64_t separable_scratch(int64_t channels, int64_t pixels, int64_t panel) {
  return separable_forward_scratch(channels, pixels, panel);
}

}  // namespace dwconv::DWCONV_ISA
