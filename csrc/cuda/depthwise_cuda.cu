// depthwise_conv2d on CUDA: checks, output allocation, problem, launch on torch's current stream.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "kernels/depthwise_forward.cuh"

namespace dwconv {
namespace {

constexpr const char* kForward = "depthwise_conv2d";
constexpr int kThreads = 256;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

template <class T, class Index>
void launch(const cuda::ForwardArgs& args, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((args.out_elements + kThreads - 1) / kThreads, 1 << 20);
  if (args.problem.layout == Layout::kNHWC) {
    cuda::depthwise_forward_nhwc<T, Index><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    cuda::depthwise_forward_nchw<T, Index><<<blocks, kThreads, 0, stream>>>(args);
  }
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, kForward, ": CUDA launch failed: ", cudaGetErrorString(status));
}

template <class T>
void launch_indexed(const cuda::ForwardArgs& args, bool fits_32_bits, cudaStream_t stream) {
  fits_32_bits ? launch<T, uint32_t>(args, stream) : launch<T, uint64_t>(args, stream);
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation) {
  const ConvolutionShape s = check_convolution(kForward, input, "weight", weight, stride, padding, dilation);
  if (bias) check_vector(kForward, "bias", *bias, s.channels * s.multiplier, input);
  const Layout layout = layout_of(input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_output(input, {s.batch, s.channels * s.multiplier, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;
  const Tensor x = as_layout(input, layout);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : input;

  cuda::ForwardArgs args = {};
  DepthwiseProblem& p = args.problem;
  p.dtype = check_dtype(kForward, "input", input);
  p.layout = layout;
  p.batch = s.batch, p.channels = s.channels;
  p.in_h = s.in_h, p.in_w = s.in_w, p.out_h = s.out_h, p.out_w = s.out_w;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.pad_h = s.pad_h, p.pad_w = s.pad_w;
  p.in_stride_n = x.stride(0), p.in_stride_c = x.stride(1), p.in_stride_h = x.stride(2), p.in_stride_w = x.stride(3);
  args.multiplier = s.multiplier;
  args.out_elements = output.numel();
  args.input = x.const_data_ptr();
  args.weight = w.const_data_ptr();
  args.bias = bias ? b.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  // Pointer offsets are 64-bit either way (the strides are); this bounds the flat output index and its grid stride.
  const bool fits = args.out_elements < (int64_t{1} << 31) && w.numel() < (int64_t{1} << 31);
  const cudaStream_t stream = current_stream(input.get_device_index());
  switch (p.dtype) {
    case DType::kFloat32:
      launch_indexed<float>(args, fits, stream);
      break;
    case DType::kFloat64:
      launch_indexed<double>(args, fits, stream);
      break;
    case DType::kBFloat16:
      launch_indexed<__nv_bfloat16>(args, fits, stream);
      break;
    case DType::kFloat16:
      launch_indexed<__half>(args, fits, stream);
      break;
  }
  return output;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CUDA, m) { m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::depthwise_conv2d)); }
