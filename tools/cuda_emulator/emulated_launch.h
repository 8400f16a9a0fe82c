// The host side of csrc/cuda/ops/launch.h on the CPU: what a Device is to the ops, over tools/cuda_emulator/emulator.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

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
Machine& emulated_machine();

}  // namespace dwconv::cuda::emulator

namespace dwconv::cuda {
namespace {

class Device {
 public:
  Device(const char* op, const torch::stable::Tensor&) : op_(op) {}

  const Machine& machine() const { return emulator::emulated_machine(); }

  void launch(const Launch& launch, const void* args) const {
    STD_TORCH_CHECK(launch.shared_bytes <= machine().shared_per_block, op_, ": ", launch.row->name, ": ", launch.shared_bytes,
                    " bytes of shared memory");
    emulator::Traffic traffic;
    const std::string wrong = emulator::run(reinterpret_cast<emulator::Body>(const_cast<void*>(launch.row->kernel)), args,
                                            launch.blocks, launch.threads, launch.shared_bytes, &traffic);
    STD_TORCH_CHECK(wrong.empty(), op_, ": ", launch.row->name, ": ", wrong);
    emulator::launches().push_back({launch.row, launch.blocks, launch.threads, launch.shared_bytes, traffic});
  }

  // NaN, so that an element which no thread writes is seen.
  void poison(const torch::stable::Tensor& t) const {
    if (t.numel() > 0) torch::stable::fill_(t, NAN);
  }

 private:
  const char* op_;
};

}  // namespace
}  // namespace dwconv::cuda
