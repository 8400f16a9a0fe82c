// From a plan to a kernel on torch's current stream. The emulator's build of the ops replaces what starts the kernel, nothing
// else.
#pragma once

#if !defined(DWCONV_EMULATOR)
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define DWCONV_LIBRARY dwconv_ext
#define DWCONV_DISPATCH_KEY CUDA
#else
#include "emulated_launch.h"
#endif

#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <set>

#include "common/checks.h"
#include "common/plan_cache.h"
#include "cuda/plan/plan.h"

namespace dwconv::cuda {
namespace {

#if !defined(DWCONV_EMULATOR)

inline void check_status(const char* op, const char* what, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", what, ": CUDA error: ", cudaGetErrorString(status));
}

// Makes a tensor's device the current one, and knows its stream.
class Device {
 public:
  Device(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS, op, ": no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Machine& machine() const {
    static std::mutex mutex;
    static std::map<int32_t, Machine> machines;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = machines.find(index_);
    if (found != machines.end()) return found->second;
    const auto attribute = [this](cudaDeviceAttr which) {
      int value = 0;
      check_status(op_, "device attribute", cudaDeviceGetAttribute(&value, which, index_));
      return static_cast<int64_t>(value);
    };
    Machine m;
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
    return machines.emplace(index_, m).first->second;
  }

  void launch(const Launch& launch, const void* args) const {
    STD_TORCH_CHECK(launch.blocks < (int64_t{1} << 31), op_, ": input is too large: ", launch.blocks, " blocks");
    if (launch.blocks == 0) return;
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (launch.shared_bytes > kWithoutAsking) {
      check_status(op_, launch.row->name,
                   cudaFuncSetAttribute(launch.row->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(launch.shared_bytes)));
    }
    void* pointers[] = {const_cast<void*>(args)};
    check_status(op_, launch.row->name,
                 cudaLaunchKernel(launch.row->kernel, dim3(static_cast<unsigned>(launch.blocks)),
                                  dim3(static_cast<unsigned>(launch.threads)), pointers, static_cast<size_t>(launch.shared_bytes),
                                  stream_));
    check_status(op_, launch.row->name, cudaGetLastError());
  }

  void poison(const Tensor&) const {}

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_ = nullptr;
};

#endif

inline void set_problem(DepthwiseProblem& p, const ConvolutionShape& s, DType dtype, Layout layout) {
  p.dtype = p.out_dtype = dtype;
  p.layout = layout;
  p.batch = s.batch, p.channels = s.channels;
  p.in_h = s.in_h, p.in_w = s.in_w, p.out_h = s.out_h, p.out_w = s.out_w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.pad_h = s.pad_h, p.pad_w = s.pad_w;
}
inline void set_input(DepthwiseProblem& p, const Tensor& t) {
  p.in_stride_n = t.stride(0), p.in_stride_c = t.stride(1), p.in_stride_h = t.stride(2), p.in_stride_w = t.stride(3);
}
inline void set_output(DepthwiseProblem& p, const Tensor& t) {
  p.out_stride_n = t.stride(0), p.out_stride_c = t.stride(1), p.out_stride_h = t.stride(2), p.out_stride_w = t.stride(3);
}

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
  const char* pass;  // a literal of the op's file
  DepthwiseProblem problem;
  int64_t multiplier;
  int32_t aligned;
  bool allow_tf32;
  Machine machine;
  int64_t out_channels = 0;  // of a fused block
  SeparableAlignment alignment = {};
  const KernelRow* forced = forced_row();
  Fusion fusion = forced_fusion();
  int32_t rank = forced_rank();

  bool operator==(const PlanKey&) const = default;
};

inline PlanKey plan_key(const char* pass, const Request& r, const Machine& machine) {
  return {pass, r.problem, r.multiplier, r.aligned, r.allow_tf32, machine};
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
  STD_TORCH_CHECK(
      fits(s.in_h, s.kernel_h, s.out_h, s.stride_h, s.pad_h, s.dilation_h) &&
          fits(s.in_w, s.kernel_w, s.out_w, s.stride_w, s.pad_w, s.dilation_w) && product(s.kernel_h, s.kernel_w) < kMost / 2 &&
          product(s.out_h, s.out_w) < kMost && s.channels < (int64_t{1} << 31) - kMostDivided,
      op, ": input's channels, padded height and width, and the output's pixels, must be below 2^31 on CUDA: stride is (",
      s.stride_h, ", ", s.stride_w, "), padding (", s.pad_h, ", ", s.pad_w, "), dilation (", s.dilation_h, ", ", s.dilation_w,
      ")");
}

// DWCONV_EXT_LOG_PLAN=1: each plan once per shape.
inline void log_plan(const char* op, const char* pass, const DepthwiseProblem& p, const std::string& reason,
                     const Launch& launch) {
  static const bool wanted = getenv("DWCONV_EXT_LOG_PLAN") != nullptr && *getenv("DWCONV_EXT_LOG_PLAN") == '1';
  if (!wanted) return;
  static std::mutex mutex;
  static std::set<std::string> seen;
  char line[768];
  snprintf(line, sizeof line,
           "dwconv_ext: cuda %s %s %s N=%lld C=%lld in=%lldx%lld out=%lldx%lld filter=%lldx%lld stride=%lldx%lld -> %s; "
           "%lld blocks of %d threads, %lld bytes of shared memory",
           op, pass, p.layout == Layout::kNHWC ? "channels_last" : "NCHW", (long long)p.batch, (long long)p.channels,
           (long long)p.in_h, (long long)p.in_w, (long long)p.out_h, (long long)p.out_w, (long long)p.kernel_h,
           (long long)p.kernel_w, (long long)p.stride_h, (long long)p.stride_w, reason.c_str(), (long long)launch.blocks,
           launch.threads, (long long)launch.shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) fprintf(stderr, "%s\n", line);
}

}  // namespace
}  // namespace dwconv::cuda
