#include "cpu_features.h"

#include <stdlib.h>
#include <unistd.h>

#include <stdexcept>

namespace dwconv {

#define DWCONV_DECLARE_ISA(ns) \
  namespace ns {               \
  KernelTable kernel_table();  \
  }
#define DWCONV_ISA_ENTRY(ns, id) {id, #ns, ns::kernel_table()}

DWCONV_DECLARE_ISA(baseline)
#if defined(__x86_64__)
DWCONV_DECLARE_ISA(avx2)
DWCONV_DECLARE_ISA(avx512)
#endif

const std::vector<IsaKernels>& supported_isas() {
  static const std::vector<IsaKernels> isas = [] {
    std::vector<IsaKernels> found = {DWCONV_ISA_ENTRY(baseline, Isa::kBaseline)};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) found.push_back(DWCONV_ISA_ENTRY(avx2, Isa::kAvx2));
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(DWCONV_ISA_ENTRY(avx512, Isa::kAvx512));
    }
#endif
    return found;
  }();
  return isas;
}

std::vector<std::string> cpu_flags() {
  std::vector<std::string> flags;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define DWCONV_FLAG(name) \
  if (__builtin_cpu_supports(name)) flags.push_back(name);
  DWCONV_FLAG("sse2")
  DWCONV_FLAG("avx")
  DWCONV_FLAG("f16c")
  DWCONV_FLAG("fma")
  DWCONV_FLAG("avx2")
  DWCONV_FLAG("avx512f")
  DWCONV_FLAG("avx512bw")
  DWCONV_FLAG("avx512dq")
  DWCONV_FLAG("avx512vl")
  DWCONV_FLAG("avx512bf16")
#undef DWCONV_FLAG
#elif defined(__aarch64__)
  flags.push_back("neon");
#endif
  return flags;
}

static const IsaKernels* find_isa(const std::string& name) {
  std::string known;
  for (const IsaKernels& isa : supported_isas()) {
    if (name == isa.name) return &isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error("DWCONV_EXT_ISA: '" + name + "' is not available here; this CPU and build run: " + known);
}

static const IsaKernels*& selection() {
  static const IsaKernels* selected = [] {
    const char* name = getenv("DWCONV_EXT_ISA");
    return name != nullptr && *name != '\0' ? find_isa(name) : &supported_isas().back();
  }();
  return selected;
}

const IsaKernels& selected_isa() { return *selection(); }
void select_isa(const std::string& name) { selection() = find_isa(name); }

static std::string forced_name;
static ForcedRow forced;

void force_row(const std::string& name, int32_t filter, int32_t stride) {
  forced_name = name;
  forced = name.empty() ? ForcedRow{} : ForcedRow{forced_name.c_str(), filter, stride};
}

Machine machine(int64_t threads) {
  int64_t l1 = 0, l2 = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return {l1 > 0 ? l1 : 32 << 10, l2 > 0 ? l2 : 512 << 10, threads, forced};
}

}  // namespace dwconv
