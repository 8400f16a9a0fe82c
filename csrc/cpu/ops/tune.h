// The tuner between the depthwise convolution's passes on the CPU and the ways to compute them.
#pragma once

#include "common/torch_convolution.h"
#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

struct WayKey : PlanKey {
  Extras extras;
  uint32_t settings;

  bool operator==(const WayKey&) const = default;
};

// The fastest way here where the tuner is on and nothing is forced, and for the log what it measured; else as planned. p: the
// forward pass's, without the tensors' strides; planned_row(): of the plan's own kernel; run(way).
template <class PlannedRow, class Run>
FoundWay<Way> tune(Pass pass, const CpuProblem& p, int64_t multiplier, const Extras& extras, bool torch, PlannedRow planned_row,
                   Run run) {
  const uint32_t settings = tuner().settings();
  if (settings == 0 || in_torch()) return {};
  const WayKey key = {{Op::kDepthwise, pass, p, multiplier, &selected_isa(), this_machine()}, extras, settings};
  if (key.machine.forced.name != nullptr) return {};
  const FoundWay<Way>* const found = fastest<Way>(
      key, [&] { return subject(pass, p, multiplier, extras, *key.isa, key.machine); },
      [&] { return ways(pass, p, planned_row(), torch, *key.isa); }, run, steady_clock);
  return found == nullptr ? FoundWay<Way>{} : FoundWay<Way>{found->way, "; timed: " + found->times};
}

}  // namespace
}  // namespace dwconv
