// Checks of the ops that make packed weights and those that take them, the same on both devices. See checks.h.
#pragma once

#include <string_view>

#include "common/countable.h"
#include "common/separable_checks.h"

namespace dwconv {
namespace {

// Of the inputs, whose accumulation type the weights may have.
inline DType packed_dtype(const char* op, DType weights, const std::string& input_dtype) {
  if (input_dtype.empty() || input_dtype == dtype_name(weights)) return weights;
  DWCONV_CHECK(weights == DType::kFloat32 && (input_dtype == "bfloat16" || input_dtype == "float16"), op,
               ": input_dtype must be the weights', or bfloat16 or float16 where these are float32, but got '", input_dtype, "'");
  return input_dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16;
}

// pointwise_conv2d_pack's weights; and separable_conv2d_pack's filters.
inline DType check_pointwise_weight(const char* op, const Tensor& weight) {
  DWCONV_CHECK(weight.dim() == 4 && weight.numel() > 0 && weight.size(2) == 1 && weight.size(3) == 1, op,
               ": weight must have shape (out_channels, C, 1, 1), but got ", to_string(weight));
  return check_dtype(op, "weight", weight);
}
inline DType check_block_filters(const char* op, const Tensor& dw_weight) {
  DWCONV_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) > 0 && dw_weight.size(1) == 1 && dw_weight.numel() > 0, op,
               ": dw_weight must have shape (C, 1, kH, kW), but got ", to_string(dw_weight));
  return check_dtype(op, "dw_weight", dw_weight);
}

inline std::string weights_text(std::string_view pack_op, int64_t channels_in, int64_t out_channels) {
  const std::string channels = std::to_string(channels_in);
  if (pack_op == "depthwise_conv2d_pack") return channels + " filters of this size, for inputs of this dtype";
  return "weights for " + channels + " channels of input, of its dtype, and of the block's filter and " +
         std::to_string(out_channels) + " output channels";
}

// Whether it is a run of bytes as the ops that pack make them: from a multiple of 16 on, since what lies there is read in its own
// type, and all of it in memory, since a storage may have been freed or cut under its tensor.
inline bool is_run_of_bytes(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Byte || t.dim() != 1 || !t.is_contiguous()) return false;
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  return t.size(0) <= held - t.storage_offset() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline bool is_activation(int64_t number) { return number >= 0 && number < static_cast<int64_t>(std::size(kActivationNames)); }

constexpr size_t kFilterNumbers = 11;

// numbers: out_channels, kernel_h, kernel_w, stride (height and width), padding (top, bottom, left, right), dilation (as stride),
// and what may follow.
inline ConvolutionShape check_filter_numbers(const char* op, const Tensor& input, const char* name, DType dtype,
                                             const Ints& numbers) {
  const Ints padding(&numbers[5], &numbers[9]);
  const ConvolutionShape s =
      check_filter(op, input, name, dtype, numbers[1], numbers[2], {numbers[3], numbers[4]}, padding, {numbers[9], numbers[10]});
  check_output(op, input, s, numbers[0], padding);
  return s;
}

struct BlockShape {
  ConvolutionShape shape;
  int64_t out_channels;
  Activation dw_activation, pw_activation;
};

// A block over an image of `channels` and the input's other sizes. block: check_filter_numbers's, and the activations' numbers
// (problem.h).
// check_weights: of what was packed.
template <class CheckWeights>
BlockShape check_block_shape(const char* op, const Tensor& input, int64_t channels, DType dtype, const Ints& block,
                             const std::vector<double>& slopes, CheckWeights check_weights) {
  DWCONV_CHECK(block.size() == kFilterNumbers + 2 && slopes.size() == 2 && is_activation(block[11]) && is_activation(block[12]),
               op, ": block must be 13 integers that end in two activations' numbers, and slopes two numbers");
  check_weights();
  const auto activation = [](int64_t number, double slope) { return Activation{static_cast<ActivationKind>(number), slope}; };
  BlockShape b = {check_filter_numbers(op, input, "block", dtype, block), block[0], activation(block[11], slopes[0]),
                  activation(block[12], slopes[1])};
  b.shape.channels = channels;
  return b;
}

}  // namespace
}  // namespace dwconv
