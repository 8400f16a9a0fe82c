// Argument checks and shape arithmetic shared by the CPU and the CUDA ops. Every message names the op and the argument.
// Include after defining TORCH_TARGET_VERSION; internal linkage throughout, since two libraries compile it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/activation.h"
#include "common/axis.h"
#include "common/problem.h"

namespace dwconv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// What follows the condition is the message, made only where it is false: the op, the argument, what is wanted, what it was.
#define DWCONV_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]]   \
      refuse(__VA_ARGS__);           \
  } while (false)

inline std::string listed(const Ints& values) {
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text;
}
inline std::string to_string(const Ints& size) { return "[" + listed(size) + "]"; }
inline Ints shape_of(const Tensor& tensor) {
  Ints size;
  for (int64_t i = 0; i < tensor.dim(); ++i) size.push_back(tensor.size(i));
  return size;
}
inline std::string to_string(const Tensor& tensor) { return to_string(shape_of(tensor)); }

// Strides, paddings and dilations are those of axis.h, which give the same as the caller's. A padding is that of an axis'
// beginning: what there is at the end follows from the output's size.
struct ConvolutionShape {
  int64_t batch, channels, multiplier, in_h, in_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
  DType dtype;  // of the input
};

// As Python writes them.
inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return "another dtype";
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline DType check_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      refuse(op, ": ", name, " must be float32, float64, bfloat16 or float16, but got ", dtype_text(tensor.scalar_type()));
  }
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  DWCONV_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.get_device_index() == input.get_device_index(), op, ": ", name,
               " must be on the others' device, ", device_text(input), ", but got ", device_text(tensor));
}

// Same dtype and device as input.
inline void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check_device(op, name, tensor, input);
  DWCONV_CHECK(tensor.scalar_type() == input.scalar_type(), op, ": ", name,
               "'s dtype and the others' should be the same, but got ", dtype_text(tensor.scalar_type()), " and ",
               dtype_text(input.scalar_type()));
}

// Of this shape, and of input's dtype and device.
inline void check_shaped(const char* op, const char* name, const Tensor& tensor, const Ints& shape, const Tensor& input) {
  check_like_input(op, name, tensor, input);
  DWCONV_CHECK(shape_of(tensor) == shape, op, ": ", name, " must have shape ", to_string(shape), ", but got ", to_string(tensor));
}

// Of this shape, in the accumulation type of an input of dtype.
inline void check_wide(const char* op, const char* name, const Tensor& tensor, const Ints& shape, const Tensor& input,
                       DType dtype) {
  check_device(op, name, tensor, input);
  const ScalarType wanted = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  DWCONV_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_text(wanted), " for this input, but got ",
               dtype_text(tensor.scalar_type()));
  DWCONV_CHECK(shape_of(tensor) == shape, op, ": ", name, " must have shape ", to_string(shape), ", but got ", to_string(tensor));
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t size, const Tensor& input) {
  check_like_input(op, name, tensor, input);
  DWCONV_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " must be 1-dimensional with ", size,
               " elements, but got shape ", to_string(tensor));
}

inline void check_pair(const char* op, const char* name, const Ints& value, int64_t least) {
  DWCONV_CHECK(value.size() == 2, op, ": ", name, " must be a pair, but got ", value.size(), " values");
  const char* wanted = least == 0 ? " must be non-negative" : " should be greater than zero";  // as nn.Conv2d puts the latter
  DWCONV_CHECK(value[0] >= least && value[1] >= least, op, ": ", name, wanted, ", but got (", value[0], ", ", value[1], ")");
}

// At the beginning and the end of an axis.
struct Ends {
  int64_t before, after;
};

// Of two values, each for both ends of an axis, or of four: top, bottom, left, right.
inline std::array<Ends, 2> check_padding(const char* op, const Ints& value) {
  DWCONV_CHECK(value.size() == 2 || value.size() == 4, op, ": padding must be a pair or four values, but got ", value.size(),
               " values");
  for (int64_t pad : value) DWCONV_CHECK(pad >= 0, op, ": padding must be non-negative, but got (", listed(value), ")");
  if (value.size() == 2) return {{{value[0], value[0]}, {value[1], value[1]}}};
  return {{{value[0], value[1]}, {value[2], value[3]}}};
}

// Any 64-bit numbers: what they make may not fit 64 bits, and then no step here overflows.
inline int64_t output_size(const char* op, const char* weight_name, int dimension, int64_t size, int64_t kernel, int64_t stride,
                           Ends pads, int64_t dilation) {
  const int64_t most = (std::numeric_limits<int64_t>::max() - size) / 2;
  for (int64_t pad : {pads.before, pads.after}) {
    DWCONV_CHECK(pad <= most, op, ": Given padding=", pad, " at dimension ", dimension, ", expected padding to be at most ",
                 most);
  }
  const int64_t padded = size + pads.before + pads.after;
  int64_t reach = 0;
  const bool endless = __builtin_mul_overflow(dilation, kernel - 1, &reach) || __builtin_add_overflow(reach, 1, &reach);
  const char* const side = dimension == 0 ? "height" : "width";
  DWCONV_CHECK(!endless && reach <= padded, op, ": ", weight_name, "'s filter is larger than the padded input along ", side,
               ": dilation * (kernel - 1) + 1 = ", endless ? "more than 2^63" : std::to_string(reach), ", but padded input ",
               side, " is ", padded);
  return (padded - reach) / stride + 1;
}

// A batch of images with at least one value.
inline DType check_pixels(const char* op, const Tensor& input) {
  DWCONV_CHECK(input.dim() == 4, op, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(op, "input", input);
  DWCONV_CHECK(input.numel() > 0, op, ": input must not be empty, but got shape ", to_string(input));
  return dtype;
}

// A filter on an image with at least one pixel.
inline ConvolutionShape check_filter(const char* op, const Tensor& input, const char* weight_name, DType dtype, int64_t kernel_h,
                                     int64_t kernel_w, const Ints& stride, const Ints& padding, const Ints& dilation) {
  DWCONV_CHECK(input.size(2) > 0 && input.size(3) > 0, op, ": input must have a non-empty height and width, but got shape ",
               to_string(input));
  check_pair(op, "stride", stride, 1);
  const auto [pads_h, pads_w] = check_padding(op, padding);
  check_pair(op, "dilation", dilation, 1);
  ConvolutionShape s = {};
  s.dtype = dtype;
  s.batch = input.size(0);
  s.channels = input.size(1);
  s.multiplier = 1;
  s.in_h = input.size(2);
  s.in_w = input.size(3);
  s.kernel_h = kernel_h;
  s.kernel_w = kernel_w;
  s.out_h = output_size(op, weight_name, 0, s.in_h, s.kernel_h, stride[0], pads_h, dilation[0]);
  s.out_w = output_size(op, weight_name, 1, s.in_w, s.kernel_w, stride[1], pads_w, dilation[1]);
  const Axis h = within_sizes({s.in_h, s.kernel_h, s.out_h, stride[0], pads_h.before, dilation[0]});
  const Axis w = within_sizes({s.in_w, s.kernel_w, s.out_w, stride[1], pads_w.before, dilation[1]});
  s.stride_h = h.stride, s.stride_w = w.stride;
  s.pad_h = h.pad, s.pad_w = w.pad;
  s.dilation_h = h.dilation, s.dilation_w = w.dilation;
  return s;
}

inline ConvolutionShape check_convolution(const char* op, const Tensor& input, const char* weight_name, const Tensor& weight,
                                          const Ints& stride, const Ints& padding, const Ints& dilation) {
  DWCONV_CHECK(input.dim() == 4, op, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  DWCONV_CHECK(weight.dim() == 4, op, ": ", weight_name, " must be 4-dimensional (C * multiplier, 1, kH, kW), but got shape ",
               to_string(weight));
  const DType dtype = check_dtype(op, "input", input);
  check_like_input(op, weight_name, weight, input);
  const int64_t channels = input.size(1);
  DWCONV_CHECK(channels > 0, op, ": input must have at least one channel, but got shape ", to_string(input));
  DWCONV_CHECK(weight.size(1) == 1 && weight.size(0) > 0, op, ": ", weight_name,
               " must have shape (C * multiplier, 1, kH, kW), but got ", to_string(weight));
  DWCONV_CHECK(weight.size(0) % channels == 0, op, ": input must have the ", weight.size(0), " channels of ", weight_name,
               ", or a divisor of them, but got shape ", to_string(input));
  DWCONV_CHECK(weight.size(2) > 0 && weight.size(3) > 0, op, ": ", weight_name, " must have a non-empty filter, but got shape ",
               to_string(weight));
  ConvolutionShape s = check_filter(op, input, weight_name, dtype, weight.size(2), weight.size(3), stride, padding, dilation);
  s.multiplier = weight.size(0) / channels;
  return s;
}

// Before anything is computed from the output's size.
inline void check_output(const char* op, const Tensor& input, const ConvolutionShape& s, int64_t out_channels,
                         const Ints& padding) {
  constexpr double kMostBytes = 281474976710656.0;  // 2^48, more than a process can address
  double bytes = static_cast<double>(input.element_size());
  for (int64_t size : {s.batch, out_channels, s.out_h, s.out_w})
    bytes *= static_cast<double>(std::max<int64_t>(size, 1));  // no images: strides too
  DWCONV_CHECK(bytes < kMostBytes, op, ": the output's shape [", s.batch, ", ", out_channels, ", ", s.out_h, ", ", s.out_w,
               "] is too large to allocate: padding is (", listed(padding), ")");
}

// depthwise_conv2d's operands.
inline ConvolutionShape check_forward(const char* op, const Tensor& input, const Tensor& weight,
                                      const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
                                      const Ints& dilation) {
  const ConvolutionShape s = check_convolution(op, input, "weight", weight, stride, padding, dilation);
  check_output(op, input, s, s.channels * s.multiplier, padding);
  if (bias) check_vector(op, "bias", *bias, s.channels * s.multiplier, input);
  return s;
}

// 128-bit numbers as Python writes them.
inline std::string to_string(__int128 value) {
  const bool negative = value < 0;
  std::string digits;
  do {
    digits.insert(digits.begin(), static_cast<char>('0' + (negative ? -(value % 10) : value % 10)));
    value /= 10;
  } while (value != 0);
  return (negative ? "-" : "") + digits;
}

// One side of a transposed convolution's output. Any 64-bit numbers.
inline int64_t transposed_size(const char* op, int dimension, int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                               int64_t more, int64_t dilation) {
  const char* const side = dimension == 0 ? "height" : "width";
  DWCONV_CHECK(more < stride || more < dilation, op, ": output_padding must be smaller than either stride or dilation along ",
               side, ", but got output_padding ", more, ", stride ", stride, " and dilation ", dilation);
  using Wide = __int128;
  const Wide out = Wide(size - 1) * stride - 2 * Wide(pad) + Wide(dilation) * (kernel - 1) + more + 1;
  const char* const formula =
      "(input - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1 must be positive along ";
  DWCONV_CHECK(out > 0, op, ": the output is too small: ", formula, side, ", but is ", to_string(out));
  constexpr Wide kMost = Wide(1) << 48;  // as check_output's bytes
  DWCONV_CHECK(out < kMost, op, ": the output is too large to allocate: its ", side, " is ", to_string(out));
  const int64_t most = (std::numeric_limits<int64_t>::max() - static_cast<int64_t>(out)) / 2;
  DWCONV_CHECK(pad <= most, op, ": Given padding=", pad, " at dimension ", dimension, ", expected padding to be at most ", most);
  return static_cast<int64_t>(out);
}

// depthwise_conv_transpose2d's operands: the convolution whose input gradient it is, of one filter a channel, whatever the
// multiplier; its in_h and in_w are those of this one's output.
inline ConvolutionShape check_transposed(const char* op, const Tensor& input, const Tensor& weight,
                                         const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
                                         const Ints& output_padding, const Ints& dilation) {
  DWCONV_CHECK(input.dim() == 4, op, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  DWCONV_CHECK(weight.dim() == 4, op, ": weight must be 4-dimensional (C, multiplier, kH, kW), but got shape ",
               to_string(weight));
  const DType dtype = check_dtype(op, "input", input);
  check_like_input(op, "weight", weight, input);
  const int64_t channels = input.size(1), multiplier = weight.size(1);
  DWCONV_CHECK(channels > 0, op, ": input must have at least one channel, but got shape ", to_string(input));
  DWCONV_CHECK(weight.size(0) == channels && multiplier > 0, op,
               ": weight must have shape (C, multiplier, kH, kW) with C = ", channels, ", input's channels, but got ",
               to_string(weight));
  DWCONV_CHECK(weight.size(2) > 0 && weight.size(3) > 0, op, ": weight must have a non-empty filter, but got shape ",
               to_string(weight));
  DWCONV_CHECK(input.size(2) > 0 && input.size(3) > 0, op, ": input must have a non-empty height and width, but got shape ",
               to_string(input));
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "output_padding", output_padding, 0);
  check_pair(op, "dilation", dilation, 1);
  ConvolutionShape s = {};
  s.dtype = dtype;
  s.batch = input.size(0), s.channels = channels, s.multiplier = 1;
  s.out_h = input.size(2), s.out_w = input.size(3);
  s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  s.in_h = transposed_size(op, 0, s.out_h, s.kernel_h, stride[0], padding[0], output_padding[0], dilation[0]);
  s.in_w = transposed_size(op, 1, s.out_w, s.kernel_w, stride[1], padding[1], output_padding[1], dilation[1]);
  const Axis h = within_sizes({s.in_h, s.kernel_h, s.out_h, stride[0], padding[0], dilation[0]});
  const Axis w = within_sizes({s.in_w, s.kernel_w, s.out_w, stride[1], padding[1], dilation[1]});
  s.stride_h = h.stride, s.stride_w = w.stride;
  s.pad_h = h.pad, s.pad_w = w.pad;
  s.dilation_h = h.dilation, s.dilation_w = w.dilation;
  ConvolutionShape output = s;
  std::swap(output.in_h, output.out_h);
  std::swap(output.in_w, output.out_w);
  check_output(op, input, output, channels * multiplier, padding);
  if (bias) check_vector(op, "bias", *bias, channels * multiplier, input);
  return s;
}

// Of the convolution's output: its gradient, or what lies between it and another layer.
inline void check_output_like(const char* op, const char* name, const Tensor& t, const Tensor& input, const ConvolutionShape& s) {
  check_like_input(op, name, t, input);
  const Ints shape = {s.batch, s.channels * s.multiplier, s.out_h, s.out_w};
  DWCONV_CHECK(shape_of(t) == shape, op, ": ", name, " must have the output's shape ", to_string(shape), ", but got ",
               to_string(t));
}

inline void check_mask(const char* op, const std::vector<bool>& output_mask) {
  DWCONV_CHECK(output_mask.size() == 3, op, ": output_mask must have 3 values, but got ", output_mask.size());
}

inline Activation check_activation(const char* op, const char* name, const std::string& value, double slope) {
  const auto known = [] {
    std::string names;
    for (const ActivationName& entry : kActivationNames) names += (names.empty() ? "" : ", ") + std::string(entry.name);
    return names;
  };
  Activation activation;
  DWCONV_CHECK(parse_activation(value.c_str(), &activation.kind), op, ": ", name, " must be one of ", known(), ", but got '",
               value, "'");
  activation.slope = slope;
  return activation;
}

}  // namespace
}  // namespace dwconv
