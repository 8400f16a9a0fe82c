// In the place of csrc/cuda/runtime/device.h: what a Device is to the ops, on the CPU over emulator.h.
#pragma once

#include "common/tensors.h"
#include "cuda/plan/plan.h"
#include "emulator.h"

#define DWCONV_LIBRARY dwconv_emulator
#define DWCONV_DISPATCH_KEY CPU

namespace dwconv::cuda::emulator {

// What a launch leaves behind, for the tests: which kernels ran, and what they moved.
struct Launched {
  const KernelRow* row;
  int64_t blocks;
  int32_t threads;
  int64_t shared_bytes;
  Traffic traffic;
};
std::vector<Launched>& launches();
Gpu& emulated_gpu();

}  // namespace dwconv::cuda::emulator

namespace dwconv::cuda {
namespace {

class Device {
 public:
  Device(const char* op, const Tensor&) : op_(op) {}

  const Gpu& gpu() const { return emulator::emulated_gpu(); }

  void launch(const Launch& launch, const void* args) const { start(launch, args, false); }
  void launch_behind(const Launch& launch, const void* args) const { start(launch, args, launch.row->first_arch == 90); }

  // Tests fake the times (tuner.h).
  Tuner::Clock clock() const { return steady_clock(); }

  Tensor empty(const Tensor& like, const Ints& size, Layout layout) const {
    return poisoned(empty_output(op_, like, size, layout));
  }
  Tensor empty(const Tensor& like, const Ints& size, ScalarType type) const {
    return poisoned(empty_buffer(op_, like, size, type));
  }

 private:
  void start(const Launch& launch, const void* args, bool begins_early) const {
    STD_TORCH_CHECK(launch.shared_bytes <= gpu().shared_per_block, op_, ": ", launch.row->name, ": ", launch.shared_bytes,
                    " bytes of shared memory");
    emulator::Traffic traffic;
    const std::string wrong = emulator::run(reinterpret_cast<emulator::Body>(const_cast<void*>(launch.row->kernel)), args,
                                            launch.blocks, launch.threads, launch.shared_bytes, &traffic, begins_early);
    STD_TORCH_CHECK(wrong.empty(), op_, ": ", launch.row->name, ": ", wrong);
    emulator::launches().push_back({launch.row, launch.blocks, launch.threads, launch.shared_bytes, traffic});
  }

  // NaN, so that an element which no thread writes is seen.
  static Tensor poisoned(Tensor t) {
    if (t.numel() > 0) torch::stable::fill_(t, NAN);
    return t;
  }

  const char* op_;
};

}  // namespace
}  // namespace dwconv::cuda
