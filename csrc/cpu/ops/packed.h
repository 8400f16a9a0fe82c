// Packed weights as tensors of bytes: what the ops that make them and those that take them check.
#pragma once

#include "common/packed_checks.h"
#include "cpu/ops/launch.h"
#include "cpu/runtime/pack_weights.h"

namespace dwconv {
namespace {

inline void check_isa(const char* op, const std::string& isa) {
  DWCONV_CHECK(isa == selected_isa().name, op, ": isa must be the selected instruction set, ", selected_isa().name, ", but got '",
               isa, "'");
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
  const Tensor packed = empty_buffer("packed weights", like, {block_bytes(format)}, ScalarType::Byte);
  pack(packed.mutable_data_ptr());
  return packed;
}

// What they were packed for, where the bytes say the same. possible: whether there can be such weights at all.
inline BlockFormat check_packed(const char* op, const char* name, const char* pack_op, const Tensor& packed, DType dtype,
                                int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, bool possible) {
  BlockFormat wanted;
  const auto is_made = [&] {
    if (!possible || channels <= 0 || !countable(channels, out_channels, kernel_h, kernel_w)) return false;
    if (!packed.is_cpu() || !is_run_of_bytes(packed) || packed.size(0) < static_cast<int64_t>(sizeof wanted)) return false;
    const IsaKernels& isa = selected_isa();
    wanted = block_format(isa, dtype, pointwise_format(isa, dtype), channels, out_channels, kernel_h, kernel_w);
    return is_packed_for(wanted, packed.const_data_ptr()) && packed.size(0) == block_bytes(wanted);
  };
  DWCONV_CHECK(is_made(), op, ": ", name, " must be what ", pack_op, " made on this device of ",
               weights_text(pack_op, channels, out_channels));
  return wanted;
}

struct PackedBlock : BlockShape {
  BlockWeights weights;
};

inline PackedBlock check_block(const char* op, const Tensor& input, int64_t channels, DType dtype, const Tensor& packed,
                               const Ints& block, const std::vector<double>& slopes) {
  BlockFormat wanted;
  const BlockShape shape = check_block_shape(op, input, channels, dtype, block, slopes, [&] {
    wanted = check_packed(op, "packed", "separable_conv2d_pack", packed, dtype, channels, block[0], block[1], block[2],
                          block[0] > 0 && block[1] > 0 && block[2] > 0);
  });
  return {shape, packed_weights(wanted, packed.const_data_ptr())};
}

// The product's part of the arguments, the output, the launch: the same for a block, a pointwise convolution and an inverted
// residual.
inline Tensor run_product(const char* op, SeparableArgs& args, const SeparablePlan& plan, const BlockWeights& weights,
                          const Activation& activation, const std::optional<Tensor>& residual, const Tensor& input,
                          const Ints& size, Layout layout) {
  const Tensor added = residual ? dense(*residual, layout) : input;
  args.out_channels = size[1];
  args.pw_weight = weights.pw_weight;
  args.pw_bias = weights.pw_bias;
  args.residual = residual ? added.const_data_ptr() : nullptr;
  args.activation = activation;
  const Tensor output = fresh_output(op, input, size, layout);  // last: see workspace.h
  args.output = output.mutable_data_ptr();
  args.rows_per_tile = plan.whole.rows_per_tile;
  args.splits = plan.splits;
  set_prefetch(plan.whole, &args.depthwise.problem);
  run_tiles(plan.whole, [&](void* scratch, Tiles tiles) { plan.whole.row->separable(args, scratch, tiles); });
  return output;
}

}  // namespace
}  // namespace dwconv
