// What the tuner times for a problem, and how it names problem and CPU.
#include <stdio.h>

#include "common/log_plan.h"
#include "cpu/plan/plan.h"

namespace dwconv {
namespace {

std::string name_of(const KernelRow& row) {
  return std::string(row.name) + " (filter " + std::to_string(row.filter) + ", stride " + std::to_string(row.stride) + ")";
}

}  // namespace

std::vector<NamedWay<Way>> ways(Pass pass, const CpuProblem& p, const KernelRow* chosen, bool torch, const IsaKernels& isa) {
  std::vector<NamedWay<Way>> all = {{{}, chosen != nullptr ? name_of(*chosen) : "phases of the stride"}};
  if (chosen != nullptr) {
    for (const KernelRow* row : fitting_rows(isa, Op::kDepthwise, pass, p)) {
      if (row->family != chosen->family) all.push_back({{{row->name, row->filter, row->stride, pass}}, name_of(*row)});
    }
  }
  if (torch) all.push_back({{{}, true}, kTorchWay});
  return all;
}

Tuner::Subject subject(Pass pass, const CpuProblem& p, int64_t multiplier, const Extras& extras, const IsaKernels& isa,
                       const Machine& machine) {
  char device[120];
  snprintf(device, sizeof device, "%s, %lld threads, L1 %lld KiB, L2 %lld KiB, L3 %lld MiB", isa.name, (long long)machine.threads,
           (long long)(machine.l1_bytes >> 10), (long long)(machine.l2_bytes >> 10), (long long)(machine.l3_bytes >> 20));
  return {device, problem_text(Op::kDepthwise, pass, p, multiplier > 1 ? p.channels * multiplier : 0) + extras_text(extras)};
}

}  // namespace dwconv
