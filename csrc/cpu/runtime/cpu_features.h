// What this CPU can run, which kernels were chosen for it, and its cache sizes.
#pragma once

#include <string>
#include <vector>

#include "cpu/plan/machine.h"

namespace dwconv {

const std::vector<IsaKernels>& supported_isas();  // what the build holds and CPU and system allow, best last
const char* isa_name(Isa isa);
std::vector<std::string> cpu_flags();  // those the kernels could use, as the CPU reports and the system allows them
Machine machine(int64_t threads);

void force_row(const std::string& name, int32_t filter, int32_t stride);  // an empty name ends it
// In the place of Machine's, L3 or not, until called with -1; for tests and measurements.
void set_prefetch_threshold(int64_t bytes);

// The chosen set: the best supported one, or what DWCONV_EXT_ISA names; throws std::runtime_error on a bad name.
const IsaKernels& selected_isa();
void select_isa(const std::string& name);

}  // namespace dwconv
