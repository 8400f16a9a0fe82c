// What the CUDA ops share between a problem and the launch of its plan.
#pragma once

#include "common/log_plan.h"
#include "common/plan_cache.h"
#include "common/torch_convolution.h"
#include "cuda/runtime/device.h"

namespace dwconv::cuda {
namespace {

inline bool aligned_start(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Every run of 16 bytes of channels of a channels_last tensor lies on a multiple of 16 bytes.
inline bool aligned_channels(const Tensor& t) {
  const int64_t values = 16 / t.element_size();
  if (!aligned_start(t) || t.size(1) % values != 0) return false;
  for (int64_t d : {0, 2, 3}) {
    if (t.size(d) > 1 && t.stride(d) % values != 0) return false;
  }
  return t.size(1) == 1 || t.stride(1) == 1;
}

// The runs of bytes of which a NCHW tensor's rows are made, and on multiples of which they lie.
inline int32_t aligned_rows(const Tensor& t) {
  if (t.size(3) > 1 && t.stride(3) != 1) return 0;
  int64_t steps = t.size(3);
  for (int64_t d : {0, 1, 2}) steps |= t.size(d) > 1 ? t.stride(d) : 0;
  return whole_runs({steps * static_cast<int64_t>(t.element_size()),
                     static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16)});
}

// Request::aligned.
inline int32_t aligned_runs(Layout layout, const Tensor& a, const Tensor& b) {
  if (layout == Layout::kNCHW) return std::min(aligned_rows(a), aligned_rows(b));
  return aligned_channels(a) && aligned_channels(b) ? 16 : 0;
}

// Plans cost tens of microseconds to make: each is remembered (plan_cache.h).
struct PlanKey {
  Op op;
  Pass pass;
  DepthwiseProblem problem;
  int64_t multiplier;
  int32_t aligned;
  bool allow_tf32;
  Gpu gpu;
  int64_t out_channels = 0;  // of a fused block
  SeparableAlignment alignment = {};
  Forced forced = {};

  bool operator==(const PlanKey&) const = default;
};

inline PlanKey plan_key(Op op, Pass pass, const Request& r, const Gpu& gpu) {
  return {op, pass, r.problem, r.multiplier, r.aligned, r.allow_tf32, gpu, 0, {}, r.forced};
}

// What the tuner has found is remembered by all of that, and its settings.
struct WayKey : PlanKey {
  Pass of;  // Work::pass
  Extras extras;
  uint32_t settings;

  bool operator==(const WayKey&) const = default;
};

// Sets work.request.forced where the tuner is on and nothing is forced: the fastest of the ways, run(request) each. What it
// measured, for the log. first(): before anything is timed, for what the ways themselves choose among.
template <class Run, class First>
std::string tune(const Device& device, Work* work, Run run, First first) {
  Request& request = work->request;
  if (in_torch()) request.forced.source = Source::kOurs;
  const uint32_t settings = tuner().settings();
  if (settings == 0 || request.forced != Forced{}) return {};
  const Gpu& gpu = device.gpu();
  PlanKey plan = plan_key(work->op, work->kernel_pass, request, gpu);
  plan.out_channels = work->out_channels;
  plan.alignment = work->alignment;
  const FoundWay<Forced>* const found = fastest<Forced>(
      WayKey{plan, work->pass, work->extras, settings}, [&] { return subject(*work, gpu); }, [&] { return ways(*work, gpu); },
      [&](const Forced& way) {
        Request one = request;
        one.forced = way;
        run(one);
      },
      [&] {
        const Tuner::Clock clock = device.clock();
        if (clock) first();
        return clock;
      });
  if (found == nullptr) return {};
  request.forced = found->way;
  return "; timed: " + found->times;
}
template <class Run>
std::string tune(const Device& device, Work* work, Run run) {
  return tune(device, work, run, [] {});
}

// Whether torch's convolution is to run, and into the log why.
inline bool is_for_torch(const Work& work, const Gpu& gpu, const std::string& timed) {
  const Forced& forced = work.request.forced;
  if (!work.torch) return false;
  const FasterInTorch* const range = forced == Forced{} ? faster_in_torch(work, gpu) : nullptr;
  if (range == nullptr && forced.source != Source::kTorch) return false;
  if (logs_plans())
    log_plan("cuda ", work.op, work.pass, work.request.problem, work.out_channels,
             range != nullptr ? describe(*range) : kTorchWay + timed);
  return true;
}

// Every index inside an image and a tile is 32 bits wide, offsets between rows and images 64.
inline void check_sides(const char* op, const ConvolutionShape& s) {
  constexpr double kMost = 2147483648.0;  // in doubles, which products do not overflow
  const auto product = [](int64_t a, int64_t b) { return static_cast<double>(a) * static_cast<double>(b); };
  const auto fits = [&](int64_t in, int64_t kernel, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
    const double last = product(out - 1, stride) + product(kernel - 1, dilation);  // from the first output's first tap
    return static_cast<double>(in) + product(2, pad) < kMost && last < kMost && product(in, stride) < kMost &&
           product(out, stride) < kMost;
  };
  DWCONV_CHECK(
      fits(s.in_h, s.kernel_h, s.out_h, s.stride_h, s.pad_h, s.dilation_h) &&
          fits(s.in_w, s.kernel_w, s.out_w, s.stride_w, s.pad_w, s.dilation_w) && product(s.kernel_h, s.kernel_w) < kMost / 2 &&
          product(s.out_h, s.out_w) < kMost && s.channels < (int64_t{1} << 31) - kMostDivided,
      op, ": input's channels, padded height and width, and the output's pixels, must be below 2^31 on CUDA: stride is (",
      s.stride_h, ", ", s.stride_w, "), padding (", s.pad_h, ", ", s.pad_w, "), dilation (", s.dilation_h, ", ", s.dilation_w,
      ")");
}

// timed: what the tuner says, or empty.
inline void log_plan(Op op, Pass pass, const DepthwiseProblem& p, int64_t out_channels, const std::string& reason,
                     const Launch& launch, const std::string& timed) {
  if (!logs_plans()) return;
  char blocks[120];
  snprintf(blocks, sizeof blocks, "; %lld blocks of %d threads, %lld bytes of shared memory", (long long)launch.blocks,
           launch.threads, (long long)launch.shared_bytes);
  log_plan("cuda ", op, pass, p, out_channels, reason + blocks + timed);
}

}  // namespace
}  // namespace dwconv::cuda
