// What this CPU can run, which kernels were chosen for it, and its cache sizes.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace dwconv {

// The scratch formulas of an instruction set's kernels, in elements of the accumulation type.
struct IsaKernels {
  Isa isa;
  const char* name;
  KernelTable table;
  int64_t (*forward_scratch)(const DepthwiseProblem&, int64_t rows_per_tile, int64_t lanes);
  int64_t (*backward_weight_scratch)(const DepthwiseProblem&, int64_t rows_per_tile, int64_t lanes);
  int64_t (*separable_scratch)(int64_t channels, int64_t pixels, int64_t panel);
};

struct Machine {
  int64_t l1_bytes;
  int64_t l2_bytes;
  int64_t threads;
};

const std::vector<IsaKernels>& supported_isas();  // what the build holds and the CPU reports, best last
std::vector<std::string> cpu_flags();             // the instruction sets the kernels could use, as the CPU reports them
Machine machine(int64_t threads);

// The chosen set: the best supported one, or what DWCONV_EXT_ISA names; throws std::runtime_error on a bad name.
const IsaKernels& selected_isa();
void select_isa(const std::string& name);

}  // namespace dwconv
