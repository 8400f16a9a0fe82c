// The Python module of the emulator: the ops are registered as torch.ops.dwconv_emulator.* for CPU tensors (ops.cpp and the CUDA
// launchers, compiled for it); here are the switches and what was observed.
#include "cuda/plan/describe.h"
#include "cuda/runtime/device.h"
#include "planted.h"

namespace dwconv::cuda::emulator {

std::vector<Launched>& launches() {
  static std::vector<Launched> the_launches;
  return the_launches;
}
Gpu& emulated_gpu() {
  static Gpu the_gpu;
  return the_gpu;
}

}  // namespace dwconv::cuda::emulator

namespace py = pybind11;

PYBIND11_MODULE(_emulator, m) {
  using namespace dwconv::cuda;
  m.doc() = "The CUDA kernels on the CPU.";
  define_plans(m);
  m.def(
      "set_order",
      [](const std::string& order, uint32_t seed) {
        emulator::options().seed = seed;
        emulator::options().order = order == "backwards"  ? emulator::Order::kBackwards
                                    : order == "shuffled" ? emulator::Order::kShuffled
                                                          : emulator::Order::kForwards;
      },
      py::arg("order"), py::arg("seed") = 0);
  m.def(
      "set_gpu", [](const py::dict& facts) { emulator::emulated_gpu() = gpu_from(facts); },
      "Facts of the emulated GPU that differ from an H100's.");
  m.def(
      "count_traffic",
      [](bool count, bool arithmetic, const std::vector<std::pair<uintptr_t, uintptr_t>>& activations) {
        auto& options = emulator::options();
        options.count = count;
        options.arithmetic = arithmetic;
        options.regions.clear();
        for (const auto& [begin, end] : activations) options.regions.push_back({begin, end, true});
      },
      "Counts accesses from now on; loads from the given ranges of addresses are of activations, others of weights.");
  m.def(
      "launches",
      [] {
        py::list list;
        for (const auto& launched : emulator::launches()) {
          py::dict d = row_dict(*launched.row);
          d["blocks"] = launched.blocks;
          d["threads"] = launched.threads;
          d["shared_bytes"] = launched.shared_bytes;
          d["load_bytes"] = launched.traffic.load_bytes;
          d["store_bytes"] = launched.traffic.store_bytes;
          d["weight_bytes"] = launched.traffic.weight_bytes;
          d["requests"] = launched.traffic.requests;
          list.append(d);
        }
        emulator::launches().clear();
        return list;
      },
      "What has run since the last call.");
  m.def("run_planted", &run_planted, py::arg("bug"), py::arg("order"),
        "Runs a small kernel with one planted bug, or 'none'; returns its output, or raises what the emulator found.");
}
