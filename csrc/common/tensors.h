// Tensors as the kernels see them: layouts, outputs, and the problem that they make. Include after defining TORCH_TARGET_VERSION;
// internal linkage, as in checks.h.
#pragma once

#include "common/checks.h"

namespace dwconv {
namespace {

// nn.Conv2d's rule (c10's is_channels_last_strides_2d): channels_last where the strides say so and NCHW does not fit too.
inline bool strides_say_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline Layout layout_of(const Tensor& t) { return strides_say_channels_last(t) ? Layout::kNHWC : Layout::kNCHW; }

inline torch::headeronly::MemoryFormat memory_format(Layout layout) {
  return layout == Layout::kNHWC ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
}

// Kernels need unit stride along their lanes and no expanded dimension; slices and other views pass as they are.
inline Tensor as_layout(const Tensor& t, Layout layout) {
  const int64_t lane = layout == Layout::kNHWC ? 1 : 3;
  const bool unit = t.stride(lane) == 1 || t.size(lane) == 1;
  const bool other = t.stride(layout == Layout::kNHWC ? 3 : 2) != 0;
  return unit && other ? t : torch::stable::contiguous(t, memory_format(layout));
}

struct OutputStrides {
  int64_t nchw[4], nhwc[4];

  explicit OutputStrides(const Ints& size)
      : nchw{size[1] * size[2] * size[3], size[2] * size[3], size[3], 1},
        nhwc{size[2] * size[3] * size[1], 1, size[3] * size[1], size[1]} {}
  const int64_t* of(Layout layout) const { return layout == Layout::kNHWC ? nhwc : nchw; }
};

// Whether elements lie one after the other, in the layout's order.
inline bool is_dense(const Tensor& t, Layout layout) {
  const OutputStrides strides(shape_of(t));
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides.of(layout)[d]) return false;
  }
  return true;
}

// Contiguous, in the order of its dimensions or in a layout's. torch::stable::contiguous goes through the dispatcher also where
// nothing is to be done.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor dense(const Tensor& t, Layout layout) {
  return is_dense(t, layout) ? t : torch::stable::contiguous(t, memory_format(layout));
}

// The words are those by which tools know torch's own error (as a search for the largest batch does): the ABI hands on neither
// its type nor its message.
[[noreturn]] inline void refuse_size(const char* op, const Tensor& like, const Ints& size, ScalarType type) {
  const bool byte = type == ScalarType::Byte, half = type == ScalarType::Half || type == ScalarType::BFloat16;
  uint64_t bytes = byte ? 1 : half ? 2 : type == ScalarType::Float ? 4 : 8;
  for (int64_t n : size) bytes *= static_cast<uint64_t>(n);
  const char* const what = like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory:";
  refuse(op, ": ", what, " Tried to allocate ", std::to_string(bytes), " bytes for a tensor of shape [", listed(size),
         "] and dtype ", dtype_text(type));
}

// Of like's type. Straight from the allocator: torch::stable::empty goes through the dispatcher, 1 us of a call's few.
inline Tensor empty_strided(const char* op, const Tensor& like, const Ints& size, const int64_t* strides) {
  int32_t dtype = 0, device_type = 0;
  AtenTensorHandle output = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto status = aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), strides, dtype, device_type,
                                               like.get_device_index(), &output);
  if (status != TORCH_SUCCESS) [[unlikely]]
    refuse_size(op, like, size, like.scalar_type());
  return Tensor(output);
}

inline Tensor empty_output(const char* op, const Tensor& like, const Ints& size, Layout layout) {
  return empty_strided(op, like, size, OutputStrides(size).of(layout));
}

// Contiguous, of any rank and type.
inline Tensor empty_buffer(const char* op, const Tensor& like, const Ints& size, ScalarType type) {
  try {
    return torch::stable::empty(size, type, std::nullopt, like.device());
  } catch (const std::exception&) {
    refuse_size(op, like, size, type);
  }
}

// The same at `data`, which has to outlive it.
inline Tensor output_at(void* data, const Tensor& like, const Ints& size, Layout layout) {
  int32_t dtype = 0, device_type = 0;
  AtenTensorHandle output = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 4, size.data(), OutputStrides(size).of(layout), 0, dtype,
                                                            device_type, like.get_device_index(), &output));
  return Tensor(output);
}

// The same memory with another shape, from `offset` elements after the tensor's first on; no view that autograd would know of.
inline Tensor reinterpreted(const Tensor& t, const Ints& size, const Ints& strides, int64_t offset = 0) {
  AtenTensorHandle same = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()), size.data(), strides.data(), offset, &same));
  return Tensor(same);
}

inline ScalarType accumulate_scalar(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// All but the strides.
inline void set_problem(DepthwiseProblem& p, const ConvolutionShape& s, Layout layout) {
  p.dtype = p.out_dtype = s.dtype;
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

}  // namespace
}  // namespace dwconv
