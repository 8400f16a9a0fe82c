// What a plan depends on besides the problem: an instruction set's kernels, caches, threads.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels/kernel_table.h"

namespace dwconv {

struct IsaKernels {
  Isa isa;
  const char* name;
  int32_t vector_bytes;
  std::vector<KernelTable> tables;  // a family each
  const IsaKernels* base;           // the one that has what the set lacks
};

// Only rows of this name, filter and stride, where they fit; for tests and measurements. A null name forces nothing.
struct ForcedRow {
  const char* name = nullptr;
  int32_t filter = 0, stride = 0;
  Pass pass = Pass::kForward;

  bool operator==(const ForcedRow&) const = default;
};

struct Machine {
  int64_t l1_bytes;
  int64_t l2_bytes;
  int64_t threads;
  ForcedRow forced = {};
  int64_t prefetch_threshold;  // an input of as many is not expected in a cache near by (default_prefetch_threshold)
  int64_t l3_bytes;
  bool with_reasons = true;  // plans say in words why they are as they are: a microsecond

  bool operator==(const Machine&) const = default;
  int64_t l1_ways() const { return l1_bytes / (64 * 64); }  // of 64 sets of 64-byte lines, as x86 has
};

// Machine::prefetch_threshold for an L2 of this size. Reading rows before the register tiles do pays where L2 is small (0.5 MB:
// up to 1.8x); with 2 MB the hardware's prefetchers do better and it costs up to 1.5x (docs/design/cpu-channels-last.md).
constexpr int64_t kLargeL2 = 1 << 20;
constexpr int64_t kNever = int64_t{1} << 60;
constexpr int64_t default_prefetch_threshold(int64_t l2_bytes) { return l2_bytes < kLargeL2 ? 8 << 20 : kNever; }

}  // namespace dwconv
