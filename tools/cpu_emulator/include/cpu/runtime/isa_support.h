// Every set above AVX2 is emulated, so that a CPU with AVX2 has all.
#pragma once

#include "cpu/runtime/x86_features.h"

namespace dwconv {

inline Isa widest_isa() {
  const Isa here = widest_x86_isa(x86_answers(), [] { return false; });
  return here == Isa::kBaseline ? here : Isa::kAmx;
}

}  // namespace dwconv
