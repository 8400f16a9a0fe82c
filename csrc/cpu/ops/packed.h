// Packed weights as tensors of bytes: what the ops that make them and those that take them check.
#pragma once

#include <string_view>

#include "common/separable_checks.h"
#include "cpu/ops/launch.h"
#include "cpu/runtime/pack_weights.h"

namespace dwconv {
namespace {

inline void check_isa(const char* op, const std::string& isa) {
  DWCONV_CHECK(isa == selected_isa().name, op, ": isa must be the selected instruction set, ", selected_isa().name, ", but got '",
               isa, "'");
}

// Of the inputs, whose accumulation type the weights may have.
inline DType packed_dtype(const char* op, DType weights, const std::string& input_dtype) {
  if (input_dtype.empty() || input_dtype == dtype_name(weights)) return weights;
  DWCONV_CHECK(weights == DType::kFloat32 && (input_dtype == "bfloat16" || input_dtype == "float16"), op,
               ": input_dtype must be the weights', or bfloat16 or float16 where these are float32, but got '", input_dtype, "'");
  return input_dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16;
}

// Weights of dtype, whose shapes have been checked, into block_bytes() at `packed`; without one of the weights for a convolution
// that is no block.
inline void pack(const BlockFormat& format, DType dtype, const std::optional<Tensor>& dw_weight,
                 const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_weight,
                 const std::optional<Tensor>& pw_bias, void* packed) {
  const std::optional<Tensor> given[] = {dw_weight, dw_bias, pw_weight, pw_bias};
  std::optional<Tensor> held[4];
  const void* data[4] = {};
  for (int i = 0; i < 4; ++i) {
    if (given[i]) data[i] = held[i].emplace(dense(*given[i])).const_data_ptr();
  }
  pack_block(format, dtype, {data[0], data[1], data[2], data[3], nullptr}, packed);
}

template <class Pack>  // pack(bytes)
Tensor packed_tensor(const BlockFormat& format, const Tensor& like, Pack pack) {
  const Tensor packed = torch::stable::empty({block_bytes(format)}, ScalarType::Byte, std::nullopt, like.device());
  pack(packed.mutable_data_ptr());
  return packed;
}

inline std::string weights_text(std::string_view pack_op, const BlockFormat& format) {
  const std::string channels = std::to_string(format.channels);
  if (pack_op == "depthwise_conv2d_pack") return channels + " filters of this size, for inputs of this dtype";
  return "weights for " + channels + " channels of input, of its dtype, and of the block's filter and " +
         std::to_string(format.out_channels) + " output channels";
}

// possible: whether there can be weights of the wanted format at all.
inline void check_packed(const char* op, const char* name, const char* pack_op, const Tensor& packed, const BlockFormat& wanted,
                         bool possible) {
  const bool bytes =
      possible && packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous();
  DWCONV_CHECK(bytes && packed.size(0) >= static_cast<int64_t>(sizeof wanted) && is_packed_for(wanted, packed.const_data_ptr()) &&
                   packed.size(0) == block_bytes(wanted),
               op, ": ", name, " must be what ", pack_op, " made on this CPU of ", weights_text(pack_op, wanted));
}

inline bool is_activation(int64_t number) { return number >= 0 && number < static_cast<int64_t>(std::size(kActivationNames)); }

// numbers: out_channels, kernel_h, kernel_w, stride, padding, dilation (height and width each), and what may follow.
inline ConvolutionShape check_filter_numbers(const char* op, const Tensor& input, const char* name, DType dtype,
                                             const Ints& numbers) {
  const Ints padding = {numbers[5], numbers[6]};
  const ConvolutionShape s =
      check_filter(op, input, name, dtype, numbers[1], numbers[2], {numbers[3], numbers[4]}, padding, {numbers[7], numbers[8]});
  check_output(op, input, s, numbers[0], padding);
  return s;
}

struct PackedBlock {
  ConvolutionShape shape;
  int64_t out_channels;
  Activation dw_activation, pw_activation;
  BlockWeights weights;
};

// A block of packed weights over an image of `channels` and the input's other sizes. block: out_channels, the filter's height and
// width, stride, padding, dilation (height and width each), the activations' numbers (problem.h), all that the output's shape
// depends on first.
inline PackedBlock check_block(const char* op, const Tensor& input, int64_t channels, DType dtype, const Tensor& packed,
                               const Ints& block, const std::vector<double>& slopes) {
  DWCONV_CHECK(block.size() == 11 && slopes.size() == 2 && is_activation(block[9]) && is_activation(block[10]), op,
               ": block must be 11 integers that end in two activations' numbers, and slopes two numbers");
  const BlockFormat wanted =
      block_format(selected_isa(), dtype, pointwise_format(selected_isa(), dtype), channels, block[0], block[1], block[2]);
  check_packed(op, "packed", "separable_conv2d_pack", packed, wanted, block[0] > 0 && block[1] > 0 && block[2] > 0);
  const auto activation = [](int64_t number, double slope) { return Activation{static_cast<ActivationKind>(number), slope}; };
  PackedBlock b = {check_filter_numbers(op, input, "block", dtype, block), block[0], activation(block[9], slopes[0]),
                   activation(block[10], slopes[1]), packed_weights(wanted, packed.const_data_ptr())};
  b.shape.channels = channels;
  return b;
}

// The product's part of the arguments, the output, the launch: the same for a block, a pointwise convolution and an inverted
// residual.
inline Tensor run_product(SeparableArgs& args, const SeparablePlan& plan, const BlockWeights& weights,
                          const Activation& activation, const std::optional<Tensor>& residual, const Tensor& input,
                          const Ints& size, Layout layout) {
  const Tensor added = residual ? dense(*residual, layout) : input;
  args.out_channels = size[1];
  args.pw_weight = weights.pw_weight;
  args.pw_bias = weights.pw_bias;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  args.activation = activation;
  const Tensor output = fresh_output(input, size, layout);  // last: see workspace.h
  args.output = output.mutable_data_ptr();
  args.rows_per_tile = plan.whole.rows_per_tile;
  args.splits = plan.splits;
  set_prefetch(plan.whole, &args.depthwise.problem);
  run_tiles(plan.whole, [&](void* scratch, Tiles tiles) { plan.whole.row->separable(args, scratch, tiles); });
  return output;
}

}  // namespace
}  // namespace dwconv
