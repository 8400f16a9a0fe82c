// What plan.cpp and block_plan.cpp share.
#pragma once

#include "cpu/plan/plan.h"

namespace dwconv {

int64_t weight_pitch(const IsaKernels& isa, DType dtype, int64_t channels);
bool should_prefetch(const CpuProblem& p, const Machine& machine, bool forward);
int64_t workers_for(int64_t elements, int64_t tiles, const Machine& machine);
std::string describe(const KernelRow& row);

}  // namespace dwconv
