// From a plan to threads: the workers share the tiles (tiles.h), each with its own scratch.
#pragma once

#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <thread>

#include "common/log_plan.h"
#include "common/plan_cache.h"
#include "common/tensors.h"
#include "cpu/kernels/tiles.h"
#include "cpu/plan/plan.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/cpu_features.h"
#include "cpu/runtime/threads.h"
#include "cpu/runtime/workspace.h"

namespace dwconv {
namespace {

// An output of several megabytes is often fresh from the system: a fault for each 4 KB of it costs five times what the
// kernel does. Huge pages make that one fault for each 2 MB. Harmless where the system has none or the pages are there.
inline Tensor fresh_output(const char* op, const Tensor& like, const Ints& size, Layout layout) {
  Arena* const arena = active_arena();
  if (arena != nullptr) {
    void* const data = arena->allocate(size[0] * size[1] * size[2] * size[3] * like.element_size());
    if (data != nullptr) return output_at(data, like, size, layout);
  }
  Tensor output = empty_output(op, like, size, layout);
  if (arena != nullptr) arena->own(output.const_data_ptr());
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t end = begin + output.numel() * output.element_size();
  const uintptr_t first = round_up(begin, kHugePage);
  if (first + kHugePage < end) madvise(reinterpret_cast<void*>(first), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return output;
}

inline void share_tiles(int64_t tiles, int64_t workers, TileShare* shares) {
  for (int64_t i = 0; i < workers; ++i) shares[i] = {tiles * i / workers, tiles * (i + 1) / workers};
}

inline Tiles tiles_of(TileShare* shares, int64_t workers, int64_t worker, int64_t all) {
  constexpr int64_t kClaims = 16;  // of a worker; each is one atomic addition
  Tiles tiles;
  tiles.shares = shares;
  tiles.count = workers;
  tiles.own = worker;
  tiles.grain = std::max<int64_t>(all / (workers * kClaims), 1);
  return tiles;
}

template <class Body>  // body(scratch, tiles)
void run_tiles(const Plan& plan, Body body) {
  if (plan.tiles == 0) return;
  const int64_t workers = plan.workers;
  const int64_t pitch = round_up(plan.scratch_bytes, 128);
  char* const base = static_cast<char*>(workspace(Workspace::kScratch, pitch * workers));
#if defined(DWCONV_POISON_SCRATCH)  // for tests: what a kernel reads before it wrote it is NaN
  if (pitch > 0) memset(base, 0xff, pitch * workers);
#endif
  TileShare* const shares = static_cast<TileShare*>(workspace(Workspace::kShares, workers * sizeof(TileShare)));
  share_tiles(plan.tiles, workers, shares);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      body(base + worker * pitch, tiles_of(shares, workers, worker, plan.tiles));
    }
  });
}

// Stages without scratch, none of which begins before the one before it is done, in one launch. A worker waits for tiles that
// others have taken and are at, never for tiles that nobody has taken: any number of threads may run the workers, one too.
template <class Body>  // body(number of the stage, tiles)
void run_stages(std::initializer_list<const Plan*> stages, Body body) {
  struct alignas(64) Done {
    int64_t tiles;
  };
  int64_t workers = 1;
  for (const Plan* stage : stages) workers = std::max(workers, stage->workers);
  const int64_t count = static_cast<int64_t>(stages.size());
  TileShare* const shares = static_cast<TileShare*>(workspace(Workspace::kShares, count * (workers + 1) * sizeof(TileShare)));
  Done* const done = reinterpret_cast<Done*>(shares + count * workers);
  for (int64_t s = 0; s < count; ++s) {
    share_tiles(stages.begin()[s]->tiles, workers, shares + s * workers);
    done[s].tiles = 0;
  }
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t s = 0; s < count; ++s) {
        const int64_t all = stages.begin()[s]->tiles;
        Tiles tiles = tiles_of(shares + s * workers, workers, worker, all);
        body(s, tiles);
        __atomic_fetch_add(&done[s].tiles, tiles.taken, __ATOMIC_RELEASE);
        constexpr int kSpins = 1000;  // then somebody else may need the core
        for (int spins = 0; __atomic_load_n(&done[s].tiles, __ATOMIC_ACQUIRE) < all; ++spins) {
          if (spins > kSpins) std::this_thread::yield();
        }
      }
    }
  });
}

inline void set_prefetch(const Plan& plan, CpuProblem* p) {
  p->prefetch_input = plan.prefetch_input, p->prefetch_output = plan.prefetch_output,
  p->prefetch_next_output = plan.prefetch_next_output;
}

inline Machine this_machine() {
  Machine here = machine(torch::stable::get_num_threads());
  here.with_reasons = logs_plans();
  return here;
}

struct PlanKey {
  Op op;
  Pass pass;
  CpuProblem problem;
  int64_t size;  // what the plan depends on besides: a block's output channels, how often channels are repeated
  const IsaKernels* isa;
  Machine machine;

  bool operator==(const PlanKey&) const = default;
};

// make(isa, machine) of this thread's set and machine, remembered; row: one that the tuner has found to be faster than the
// plan's. The reference holds until the thread's next call.
template <class Made, class Make>
const Made& plan_for(Op op, Pass pass, const CpuProblem& p, int64_t size, Make make, const ForcedRow& row = {}) {
  PlanKey key = {op, pass, p, size, &selected_isa(), this_machine()};
  if (row.name != nullptr) key.machine.forced = row;
  return planned<Made>(key, [&] { return make(*key.isa, key.machine); });
}

// timed: what the tuner says, or empty.
inline void log_plan(const CpuProblem& p, const Plan& plan, int64_t out_channels = 0, const std::string& timed = {}) {
  if (!logs_plans()) return;
  char how[400];
  snprintf(how, sizeof how, "%s (%s), %lld tiles of %lld rows, %lld workers, %.1f MB, %.1f MFLOP", plan.row->name,
           plan.reason.c_str(), (long long)plan.tiles, (long long)plan.rows_per_tile, (long long)plan.workers, plan.bytes / 1e6,
           plan.flops / 1e6);
  log_plan("", plan.row->op, plan.row->pass, p, out_channels, how + timed);
}

// A 1x1 problem over all of the input, which it checks, of ops that are no convolutions.
inline CpuProblem pixelwise_problem(const char* op, const Tensor& input) {
  CpuProblem p;
  p.dtype = p.out_dtype = check_pixels(op, input);
  p.layout = layout_of(input);
  p.batch = input.size(0), p.channels = input.size(1);
  p.in_h = p.out_h = input.size(2), p.in_w = p.out_w = input.size(3);
  p.kernel_h = p.kernel_w = 1;
  return p;
}

inline CpuProblem forward_problem(const ConvolutionShape& s, Layout layout) {
  CpuProblem p;
  set_problem(p, s, layout);
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
