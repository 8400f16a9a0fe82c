// Which instruction sets above AVX2 the CPU and the system allow: a header of its own, so that a build for tests can put another
// in its place.
#pragma once

#include "cpu/runtime/cpuid.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)

namespace dwconv {

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512_bf16() { return has_leaf7(1, 1u << 5); }

// AMX-TILE and AMX-BF16; and the tiles' 8 KB of state, which Linux saves for processes that have asked for it (5.16 and newer).
inline bool has_amx() {
  if (!has_leaf7(0, (1u << 24) | (1u << 22))) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace dwconv

#endif
