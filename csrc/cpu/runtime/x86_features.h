// Which of the kernels' instruction sets an x86-64 CPU runs: what CPU and system say of themselves, and what follows from it. The
// two are apart, so that tests/kernels/test_x86_cpus.py can answer for CPUs that are not here.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>
#include <vector>

#include "cpu/kernels/kernel_table.h"

namespace dwconv {

struct X86Answers {
  uint32_t leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax;  // of CPUID, subleaf 0 or 1; 0 where the CPU has no such leaf
  uint64_t xcr0;                                          // the registers that the system saves; 0 where it has no XSAVE
};

inline X86Answers x86_answers() {
  X86Answers said = {};
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &said.leaf1_ecx, &edx) && (said.leaf1_ecx & bit_OSXSAVE) != 0) {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    said.xcr0 = uint64_t{high} << 32 | low;
  }
  uint32_t subleaves = 0;
  if (__get_cpuid_count(7, 0, &subleaves, &said.leaf7_ebx, &ecx, &said.leaf7_edx) && subleaves >= 1)
    __get_cpuid_count(7, 1, &said.leaf7_1_eax, &ebx, &ecx, &edx);
  return said;
}

// An instruction set's bit in a leaf, and the bits of XCR0 without which its instructions are illegal whatever the leaf says.
struct X86Flag {
  const char* name;
  uint32_t X86Answers::* leaf;
  int bit;
  uint64_t state;
  Isa needed_by;  // the narrowest set of kernels that uses it
};

constexpr uint64_t kYmm = 0x6, kZmm = 0xe0 | kYmm, kTiles = 0x60000;
constexpr X86Flag kX86Flags[] = {
    {"avx", &X86Answers::leaf1_ecx, 28, kYmm, Isa::kAvx2},
    {"f16c", &X86Answers::leaf1_ecx, 29, kYmm, Isa::kAvx2},
    {"fma", &X86Answers::leaf1_ecx, 12, kYmm, Isa::kAvx2},
    {"avx2", &X86Answers::leaf7_ebx, 5, kYmm, Isa::kAvx2},
    {"avx512f", &X86Answers::leaf7_ebx, 16, kZmm, Isa::kAvx512},
    {"avx512bw", &X86Answers::leaf7_ebx, 30, kZmm, Isa::kAvx512},
    {"avx512dq", &X86Answers::leaf7_ebx, 17, kZmm, Isa::kAvx512},
    {"avx512vl", &X86Answers::leaf7_ebx, 31, kZmm, Isa::kAvx512},
    {"avx512bf16", &X86Answers::leaf7_1_eax, 5, kZmm, Isa::kAvx512Bf16},
    {"amx_tile", &X86Answers::leaf7_edx, 24, kTiles, Isa::kAmx},
    {"amx_bf16", &X86Answers::leaf7_edx, 22, kTiles, Isa::kAmx},
};

inline bool has(const X86Answers& said, const X86Flag& flag) {
  return (said.*flag.leaf >> flag.bit & 1) != 0 && (said.xcr0 & flag.state) == flag.state;
}

inline std::vector<std::string> x86_flags(const X86Answers& said) {
  std::vector<std::string> names = {"sse2"};  // which x86-64 always has
  for (const X86Flag& flag : kX86Flags)
    if (has(said, flag)) names.push_back(flag.name);
  return names;
}

// The widest set of kernels, each of which needs the narrower ones' instructions too. The system is asked for the tiles only
// where nothing else is missing.
template <class Permission>
Isa widest_x86_isa(const X86Answers& said, const Permission& system_permits_tiles) {
  Isa widest = Isa::kBaseline;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    for (const X86Flag& flag : kX86Flags)
      if (flag.needed_by == isa && !has(said, flag)) return widest;
    if (isa == Isa::kAmx && !system_permits_tiles()) return widest;
    widest = isa;
  }
  return widest;
}

// Linux (5.16 and newer) saves the tiles' 8 KB for processes that have asked for it; a sandbox may refuse the call.
inline bool system_permits_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace dwconv

#endif
