// From a plan to threads: the workers share the tiles (tiles.h), each with its own scratch.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <mutex>
#include <set>

#include "common/checks.h"
#include "common/plan_cache.h"
#include "cpu/plan/plan.h"
#include "cpu/runtime/tiles.h"
#include "cpu/runtime/workspace.h"

namespace dwconv {
namespace {

// An output of several megabytes is often fresh from the system: a fault for each 4 KB of it costs five times what the
// kernel does. Huge pages make that one fault for each 2 MB. Harmless where the system has none or the pages are there.
inline Tensor fresh_output(const Tensor& like, const Ints& size, Layout layout) {
  Tensor output = empty_output(like, size, layout);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t end = begin + output.numel() * output.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first + kHugePage < end) madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return output;
}

template <class Body>  // body(scratch, tiles)
void run_tiles(const Plan& plan, Body body) {
  if (plan.tiles == 0) return;
  constexpr int64_t kClaims = 16;  // of a worker; each is one atomic addition
  const int64_t workers = plan.workers;
  const int64_t pitch = (plan.scratch_bytes + 127) / 128 * 128;
  char* const base = static_cast<char*>(workspace(Workspace::kScratch, pitch * workers));
#if defined(DWCONV_POISON_SCRATCH)  // for tests: what a kernel reads before it wrote it is NaN
  if (pitch > 0) memset(base, 0xff, pitch * workers);
#endif
  TileShare* const shares = static_cast<TileShare*>(workspace(Workspace::kShares, workers * sizeof(TileShare)));
  for (int64_t i = 0; i < workers; ++i) shares[i] = {plan.tiles * i / workers, plan.tiles * (i + 1) / workers};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Tiles tiles;
      tiles.shares = shares;
      tiles.count = workers;
      tiles.own = worker;
      tiles.grain = std::max<int64_t>(plan.tiles / (workers * kClaims), 1);
      body(base + worker * pitch, tiles);
    }
  });
}

inline void set_prefetch(const Plan& plan, DepthwiseProblem* p) {
  p->far_input = plan.far_input, p->far_output = plan.far_output, p->next_output = plan.next_output;
}

inline bool logs_plans() {
  static const bool wanted = getenv("DWCONV_EXT_LOG_PLAN") != nullptr && *getenv("DWCONV_EXT_LOG_PLAN") == '1';
  return wanted;
}

inline Machine this_machine() {
  Machine here = machine(torch::stable::get_num_threads());
  here.with_reasons = logs_plans();
  return here;
}

struct PlanKey {
  Op op;
  Pass pass;
  DepthwiseProblem problem;
  int64_t out_channels;  // of a fused block
  const IsaKernels* isa;
  Machine machine;

  bool operator==(const PlanKey&) const = default;
};

// make(isa, machine) of this thread's set and machine, remembered. The reference holds until the thread's next call.
template <class Made, class Make>
const Made& plan_for(Op op, Pass pass, const DepthwiseProblem& p, int64_t out_channels, Make make) {
  const PlanKey key = {op, pass, p, out_channels, &selected_isa(), this_machine()};
  return planned<Made>(key, [&] { return make(*key.isa, key.machine); });
}

// DWCONV_EXT_LOG_PLAN=1: each plan once per shape.
inline void log_plan(const DepthwiseProblem& p, const Plan& plan, int64_t out_channels = 0) {
  if (!logs_plans()) return;
  static std::mutex mutex;
  static std::set<std::string> seen;
  char line[640];
  snprintf(line, sizeof line,
           "dwconv_ext: %s %s %s %s N=%lld C=%lld%s%s in=%lldx%lld out=%lldx%lld filter=%lldx%lld stride=%lldx%lld -> %s "
           "(%s), %lld tiles of %lld rows, %lld workers, %.1f MB, %.1f MFLOP",
           op_name(plan.row->op), pass_name(plan.row->pass), dtype_name(p.dtype), layout_name(p.layout), (long long)p.batch,
           (long long)p.channels, out_channels ? " O=" : "", out_channels ? std::to_string(out_channels).c_str() : "",
           (long long)p.in_h, (long long)p.in_w, (long long)p.out_h, (long long)p.out_w, (long long)p.kernel_h,
           (long long)p.kernel_w, (long long)p.stride_h, (long long)p.stride_w, plan.row->name, plan.reason.c_str(),
           (long long)plan.tiles, (long long)plan.rows_per_tile, (long long)plan.workers, plan.bytes / 1e6, plan.flops / 1e6);
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) fprintf(stderr, "%s\n", line);
}

// Strides of one image batch, in the struct's terms.
inline void set_input(DepthwiseProblem& p, const Tensor& t) {
  p.in_stride_n = t.stride(0), p.in_stride_c = t.stride(1), p.in_stride_h = t.stride(2), p.in_stride_w = t.stride(3);
}
inline void set_output(DepthwiseProblem& p, const Tensor& t) {
  p.out_stride_n = t.stride(0), p.out_stride_c = t.stride(1), p.out_stride_h = t.stride(2), p.out_stride_w = t.stride(3);
}

inline DepthwiseProblem forward_problem(const ConvolutionShape& s, DType dtype, Layout layout) {
  DepthwiseProblem p;
  p.dtype = p.out_dtype = dtype;
  p.layout = layout;
  p.batch = s.batch, p.channels = s.channels;
  p.in_h = s.in_h, p.in_w = s.in_w, p.out_h = s.out_h, p.out_w = s.out_w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.pad_h = s.pad_h, p.pad_w = s.pad_w;
  p.l1_ways = machine(1).l1_ways();
  return p;
}

template <class T>
T* offset(T* pointer, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<Byte*>(pointer) + elements * element_size(dtype);
}

}  // namespace
}  // namespace dwconv
