// A dtype as a type, for code outside of the kernels, which the table instantiates for each.
#pragma once

#include "common/dtype.h"
#include "cpu/kernels/scalar_types.h"

namespace dwconv {
namespace {

// body(a value of the type that stands for dtype)
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace
}  // namespace dwconv
