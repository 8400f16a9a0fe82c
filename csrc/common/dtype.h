// Element types and layouts, and how they are called. Plain, no torch.
#pragma once

#include <stdint.h>

namespace dwconv {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Layout : int32_t { kNCHW = 0, kNHWC = 1 };

static constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

static constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
// Of the type that sums are taken in: float64 for float64, else float32.
static constexpr int64_t accumulate_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

static constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}
static constexpr const char* layout_name(Layout layout) { return layout == Layout::kNHWC ? "channels_last" : "NCHW"; }

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace dwconv
