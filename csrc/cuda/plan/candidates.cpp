// What the tuner times for a problem, and how it names problem and GPU.
#include <stdio.h>

#include <algorithm>

#include "common/log_plan.h"
#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

// What a plan's reason says after what the cost model does.
std::string without_costs(const std::string& reason) { return reason.substr(reason.find("; ") + 2); }

// The kernels and tiles of a plan, which tell it from others.
std::string name_of(const Work& work, const Forced& forced, const Gpu& gpu) {
  Request request = work.request;
  request.forced = forced;
  if (work.op == Op::kDepthwiseNorm) {
    if (forced.fusion == Fusion::kNever) return "apart";
    return work.pass == Pass::kForward ? plan_depthwise_statistics(request, false, gpu).reason
                                       : without_costs(plan_depthwise_norm(request, gpu).reason);
  }
  if (work.op == Op::kSeparable) return without_costs(plan_separable(request, work.out_channels, work.alignment, gpu).reason);
  if (work.kernel_pass == Pass::kBackwardWeight) {
    BackwardWeightTileArgs args;
    return plan_backward_weight(request, gpu, &args).reason;
  }
  DepthwiseTileArgs args;
  return plan_depthwise(work.kernel_pass, request, gpu, &args).reason;
}

}  // namespace

void turn_to_input(Work* work) {
  DepthwiseProblem& p = work->request.problem;
  std::swap(p.in_h, p.out_h);
  std::swap(p.in_w, p.out_w);
  work->pass = work->kernel_pass = Pass::kBackwardInput;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1 || work->request.multiplier != 1) return;
  p.pad_h = p.kernel_h - 1 - p.pad_h, p.pad_w = p.kernel_w - 1 - p.pad_w;
  work->kernel_pass = Pass::kForward;
}

std::vector<NamedWay<Forced>> ways(const Work& work, const Gpu& gpu) {
  constexpr int32_t kMostRanks = 8;
  std::vector<NamedWay<Forced>> all;
  const auto offer = [&](Forced forced) {
    forced.source = Source::kOurs;
    const std::string name = name_of(work, forced, gpu);
    if (std::none_of(all.begin(), all.end(), [&](const auto& way) { return way.name == name; })) all.push_back({forced, name});
  };
  offer({});
  if (work.op == Op::kDepthwiseNorm) {
    for (const Fusion fusion : {Fusion::kAlways, Fusion::kNever}) offer({nullptr, fusion});
  } else if (work.op == Op::kSeparable) {
    for (const Fusion fusion : {Fusion::kAlways, Fusion::kNever}) {
      for (const int32_t rank : {0, 1}) offer({nullptr, fusion, rank});
    }
  } else {
    for (int32_t rank = 1; rank < kMostRanks && all.size() < 2; ++rank) offer({nullptr, Fusion::kByCost, rank});
    for (const KernelRow* row : kernel_table()) {
      const bool fits = misfit(*row, work.op, work.kernel_pass, work.request.problem, work.request.multiplier, gpu) == nullptr;
      if (all.size() < 3 && fits && row->aligned <= work.request.aligned && row->family != Family::kAny) offer({row});
    }
  }
  if (work.torch) all.push_back({{nullptr, Fusion::kByCost, 0, Source::kTorch}, kTorchWay});
  return all;
}

Tuner::Subject subject(const Work& work, const Gpu& gpu) {
  char device[120];
  snprintf(device, sizeof device, "sm_%d, %d SMs at %.2f GHz, %lld MiB of L2, %.2f TB/s", gpu.arch, gpu.sm_count, gpu.clock / 1e9,
           (long long)(gpu.l2_bytes >> 20), gpu.bytes_per_second / 1e12);
  const Request& request = work.request;
  const int64_t outputs = request.multiplier > 1 ? request.problem.channels * request.multiplier : work.out_channels;
  std::string problem = problem_text(work.op, work.pass, request.problem, outputs);
  const SeparableAlignment& a = work.alignment;
  int32_t aligned = request.aligned;
  if (work.op == Op::kSeparable) aligned = a.input + 2 * a.middle + 4 * a.output + 8 * a.weight + 16 * a.rows;
  problem += " aligned=" + std::to_string(aligned);
  return {device, problem + extras_text(work.extras) + (request.allow_tf32 ? " tf32" : "")};
}

}  // namespace dwconv::cuda
