#include "cpu/runtime/cpu_features.h"

#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <set>
#include <stdexcept>

#include "cpu/kernels/isa/isa_build.h"
#include "cpu/runtime/arm_features.h"
#include "cpu/runtime/isa_support.h"

namespace dwconv {

#define DWCONV_DECLARE_ISA(ns)      \
  namespace ns {                    \
  KernelTable forward_nhwc_table(); \
  KernelTable forward_nchw_table(); \
  KernelTable backward_table();     \
  KernelTable blocks_table();       \
  }
#define DWCONV_ALL_TABLES(ns) ns::forward_nhwc_table(), ns::forward_nchw_table(), ns::backward_table(), ns::blocks_table()

DWCONV_DECLARE_ISA(baseline)
#if defined(DWCONV_BUILDS_X86)
DWCONV_DECLARE_ISA(avx2)
DWCONV_DECLARE_ISA(avx512)
#endif
#if defined(DWCONV_BUILDS_AVX512_BF16)
DWCONV_DECLARE_ISA(avx512_bf16)
#endif
#if defined(DWCONV_BUILDS_AMX)
DWCONV_DECLARE_ISA(amx)
#endif
#if defined(DWCONV_BUILDS_NEON)
DWCONV_DECLARE_ISA(neon)
#endif
#if defined(DWCONV_BUILDS_NEON_BF16)
DWCONV_DECLARE_ISA(neon_bf16)
#endif

namespace {

std::vector<IsaKernels> find_isas() {
  std::vector<IsaKernels> found;
  found.reserve(5);  // the sets point at one another
  found.push_back({Isa::kBaseline, isa_name(Isa::kBaseline), 16, {DWCONV_ALL_TABLES(baseline)}, nullptr});
#if defined(DWCONV_BUILDS_X86)
  const Isa widest = widest_isa();
  if (widest < Isa::kAvx2) return found;
  found.push_back({Isa::kAvx2, isa_name(Isa::kAvx2), 32, {DWCONV_ALL_TABLES(avx2)}, nullptr});  // it has all
  if (widest < Isa::kAvx512) return found;
  found.push_back({Isa::kAvx512, isa_name(Isa::kAvx512), 64, {DWCONV_ALL_TABLES(avx512)}, &found.back()});
#endif
#if defined(DWCONV_BUILDS_AVX512_BF16)
  if (widest < Isa::kAvx512Bf16) return found;
  found.push_back({Isa::kAvx512Bf16, isa_name(Isa::kAvx512Bf16), 64, {DWCONV_ALL_TABLES(avx512_bf16)}, &found.back()});
#endif
#if defined(DWCONV_BUILDS_AMX)
  if (widest < Isa::kAmx) return found;
  found.push_back({Isa::kAmx, isa_name(Isa::kAmx), 64, {amx::blocks_table()}, &found.back()});
#endif
#if defined(DWCONV_BUILDS_NEON)
  found.push_back({Isa::kNeon, isa_name(Isa::kNeon), 16, {DWCONV_ALL_TABLES(neon)}, nullptr});  // it has all
#endif
#if defined(DWCONV_BUILDS_NEON_BF16)
  if (!has_neon_bf16()) return found;
  found.push_back({Isa::kNeonBf16, isa_name(Isa::kNeonBf16), 16, {DWCONV_ALL_TABLES(neon_bf16)}, &found.back()});
#endif
  return found;
}

}  // namespace

const std::vector<IsaKernels>& supported_isas() {
  static const std::vector<IsaKernels> isas = find_isas();
  return isas;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"};  // in Isa's order
  return kNames[static_cast<int32_t>(isa)];
}

std::vector<std::string> cpu_flags() {
#if defined(__x86_64__)
  return x86_flags(x86_answers());
#else
  std::vector<std::string> flags;
#if defined(__aarch64__)
  flags.push_back("neon");
  if (has_neon_bf16()) flags.push_back("bf16");
#endif
  return flags;
#endif
}

static const IsaKernels* find_isa(const std::string& name) {
  std::string known;
  for (const IsaKernels& isa : supported_isas()) {
    if (name == isa.name) return &isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  std::string shown;  // an environment variable need not be text, which Python's message has to be
  for (const char c : name) shown += c >= ' ' && c <= '~' ? c : '?';
  throw std::runtime_error("DWCONV_EXT_ISA: '" + shown + "' is not available here; this CPU and build run: " + known);
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

static ForcedRow forced;

void force_row(const std::string& name, int32_t filter, int32_t stride) {
  static std::set<std::string> names;  // a name stays at its address, by which plans are remembered
  forced = name.empty() ? ForcedRow{} : ForcedRow{names.insert(name).first->c_str(), filter, stride};
  for (const IsaKernels& isa : supported_isas())
    for (const KernelTable& table : isa.tables)
      for (int32_t i = 0; i < table.count; ++i)
        if (name == table.rows[i].name) forced.pass = table.rows[i].pass;
}

static int64_t prefetch_threshold = -1;
void set_prefetch_threshold(int64_t bytes) { prefetch_threshold = bytes; }

namespace {

// Bytes of cpu0's cache number `index`, or 0 where the system does not say.
int64_t listed_cache(const char* index) {
  int64_t kib = 0;
#if defined(__linux__)
  std::ifstream(std::string("/sys/devices/system/cpu/cpu0/cache/index") + index + "/size") >> kib;  // "32768K"
#endif
  return kib << 10;
}

// Asked for once: some C libraries execute cpuid for it, which a virtual machine traps; on AArch64 they mostly know nothing.
int64_t cache_size(int level) {
#if defined(__APPLE__)
  int64_t bytes = 0;
  size_t size = sizeof bytes;
  const char* const name = level == 1 ? "hw.perflevel0.l1dcachesize" : "hw.perflevel0.l2cachesize";
  if (sysctlbyname(name, &bytes, &size, nullptr, 0) == 0 && bytes > 0) return bytes;
#elif defined(_SC_LEVEL1_DCACHE_SIZE)
  const int64_t known = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
  if (known > 0) return known;
#if defined(__aarch64__)
  const int64_t listed = listed_cache(level == 1 ? "0" : "2");
  if (listed > 0) return listed;
#endif
#endif
  return level == 1 ? 32 << 10 : 512 << 10;
}

// That of one L3: some C libraries add up those of all the CPU's core complexes.
int64_t l3_size() {
  const int64_t listed = listed_cache("3");
  return listed > 0 ? listed : 32 << 20;
}

}  // namespace

Machine machine(int64_t threads) {
  static const int64_t l1 = cache_size(1), l2 = cache_size(2), l3 = l3_size();
  if (prefetch_threshold >= 0) return {l1, l2, threads, forced, prefetch_threshold, kNever};
  return {l1, l2, threads, forced, default_prefetch_threshold(l2), l3};
}

}  // namespace dwconv
