// The GPU of a call: its facts, its memory, and torch's current stream, on which kernels are launched.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <memory>
#include <mutex>

#include "common/tensors.h"
#include "cuda/plan/plan.h"

// Which ops the kernels are registered for.
#define DWCONV_LIBRARY dwconv_ext
#define DWCONV_DISPATCH_KEY CUDA

namespace dwconv::cuda {
namespace {

inline void check_status(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next launch finds it, where this one is only a candidate of the tuner's
  refuse(op, ": ", what, ": CUDA error: ", cudaGetErrorString(status));
}

// Makes a tensor's device the current one, and knows its stream.
class Device {
 public:
  Device(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {
    void* stream = nullptr;
    DWCONV_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS, op, ": no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Gpu& gpu() const {
    static std::mutex mutex;
    static std::map<int32_t, Gpu> gpus;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = gpus.find(index_);
    if (found != gpus.end()) return found->second;
    const auto attribute = [this](cudaDeviceAttr which) {
      int value = 0;
      check_status(op_, "device attribute", cudaDeviceGetAttribute(&value, which, index_));
      return static_cast<int64_t>(value);
    };
    Gpu m;
    m.arch =
        static_cast<int32_t>(10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor));
    m.sm_count = static_cast<int32_t>(attribute(cudaDevAttrMultiProcessorCount));
    m.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    m.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    m.l2_bytes = attribute(cudaDevAttrL2CacheSize);
    m.clock = attribute(cudaDevAttrClockRate) * 1e3;
    // Two transfers a clock, about 90 % of which a kernel can use.
    const double peak = 2.0 * attribute(cudaDevAttrMemoryClockRate) * 1e3 * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
    if (peak > 0) m.bytes_per_second = 0.9 * peak;
    return gpus.emplace(index_, m).first->second;
  }

  void launch(const Launch& launch, const void* args) const { start(launch, args, false); }

  // A second or later launch of an op. On Hopper it begins while the one before it ends (programmatic dependent launch), and
  // waits itself, first of all, for that to be complete (wait_for_previous). What follows on the stream begins when this one has
  // ended, and so when both have.
  void launch_behind(const Launch& launch, const void* args) const { start(launch, args, launch.row->first_arch == 90); }

  // Seconds of a run on the stream, whose operands are not in L2: what is written first takes its place, and meanwhile the host
  // gets ahead, so that launches do not count. None while the stream is captured into a graph, and where there is no memory for
  // it.
  Tuner::Clock clock() const {
    struct Event {
      cudaEvent_t event = nullptr;
      ~Event() {
        if (event != nullptr) cudaEventDestroy(event);
      }
    };
    const auto check = [op = op_](cudaError_t status) { check_status(op, "timing", status); };
    try {
      cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
      check(cudaStreamIsCapturing(stream_, &capture));
      if (capture != cudaStreamCaptureStatusNone) return {};
      const auto begin = std::make_shared<Event>(), end = std::make_shared<Event>();
      check(cudaEventCreate(&begin->event));
      check(cudaEventCreate(&end->event));
      const int64_t bytes = 2 * std::max<int64_t>(gpu().l2_bytes, 1 << 20);
      const Tensor written = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                                                  torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
      return [=, stream = stream_](const Tuner::Run& run) {
        check(cudaMemsetAsync(written.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream));
        check(cudaEventRecord(begin->event, stream));
        run();
        check(cudaEventRecord(end->event, stream));
        check(cudaEventSynchronize(end->event));
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin->event, end->event));
        return milliseconds * 1e-3;
      };
    } catch (const std::exception&) {
      return {};
    }
  }

  // Of a size in NCHW's order; and by itself.
  Tensor empty(const Tensor& like, const Ints& size, Layout layout) const { return empty_output(op_, like, size, layout); }
  Tensor empty(const Tensor& like, const Ints& size, ScalarType type) const { return empty_buffer(op_, like, size, type); }

 private:
  void start(const Launch& launch, const void* args, bool begins_early) const {
    DWCONV_CHECK(launch.blocks < (int64_t{1} << 31), op_, ": input is too large: ", launch.blocks, " blocks");
    if (launch.blocks == 0) return;
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (launch.shared_bytes > kWithoutAsking) {
      check_status(op_, launch.row->name,
                   cudaFuncSetAttribute(launch.row->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(launch.shared_bytes)));
    }
    void* pointers[] = {const_cast<void*>(args)};
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = begins_early ? 1 : 0;
    check_status(op_, launch.row->name, cudaLaunchKernelExC(&config, launch.row->kernel, pointers));
    check_status(op_, launch.row->name, cudaGetLastError());
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace
}  // namespace dwconv::cuda
