// What an x86-64 CPU says of itself.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>

namespace dwconv {

// Leaf 7 of CPUID: subleaf 0 in EDX, subleaf 1 in EAX.
inline bool has_leaf7(unsigned subleaf, unsigned bits) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) return false;
  return ((subleaf == 0 ? edx : eax) & bits) == bits;
}

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace dwconv

#endif
