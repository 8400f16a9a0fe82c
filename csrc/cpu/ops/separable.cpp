// separable_conv2d on the CPU, with weights as the modules keep them and packed: checks, output allocation, problem, plan,
// launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/packed.h"

namespace dwconv {
namespace {

constexpr const char* kPack = "separable_conv2d_pack";
constexpr const char* kPacked = "separable_conv2d_packed";

// A block's weights in the order this CPU's kernels read, for many calls with the same.
Tensor separable_conv2d_pack(const Tensor& dw_weight, const std::optional<Tensor>& dw_bias, const Tensor& pw_weight,
                             const std::optional<Tensor>& pw_bias, const std::string isa, const std::string input_dtype) {
  check_isa(kPack, isa);
  const DType weights = check_block_filters(kPack, dw_weight);
  const DType dtype = packed_dtype(kPack, weights, input_dtype);
  const int64_t channels = dw_weight.size(0);
  check_pointwise(kPack, dw_bias, pw_weight, pw_bias, channels, dw_weight);
  const BlockFormat format = block_format(selected_isa(), dtype, pointwise_format(selected_isa(), dtype), channels,
                                          pw_weight.size(0), dw_weight.size(2), dw_weight.size(3));
  return packed_tensor(format, dw_weight,
                       [&](void* packed) { pack(format, weights, dw_weight, dw_bias, pw_weight, pw_bias, packed); });
}

template <class Weights>  // weights(PointwiseFormat) -> BlockWeights
Tensor run_block(const Tensor& input, const BlockShape& block, const std::optional<Tensor>& residual, Weights weights) {
  const ConvolutionShape& s = block.shape;
  const Layout layout = layout_of(input);
  const Ints size = {s.batch, block.out_channels, s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(op_name(Op::kSeparable), input, size, layout);

  SeparableArgs args;
  CpuProblem& p = args.depthwise.problem;
  p = forward_problem(s, layout);
  p.activation = block.dw_activation;
  const Tensor x = as_layout(input, layout);
  set_input(p, x);
  const SeparablePlan& plan = plan_for<SeparablePlan>(
      Op::kSeparable, Pass::kForward, p, block.out_channels,
      [&](const IsaKernels& isa, const Machine& here) { return plan_separable(p, block.out_channels, isa, here); });
  log_plan(p, plan.whole, block.out_channels);

  const BlockWeights w = weights(plan.whole.row->pointwise);
  args.depthwise.input = x.const_data_ptr();
  args.depthwise.weight = plan.depthwise.row->weight_order == Layout::kNHWC ? w.dw_weight : w.dw_weight_planes;
  args.depthwise.bias = w.dw_bias;
  args.depthwise.weight_pitch = plan.depthwise.weight_pitch;
  args.depthwise_kernel = plan.depthwise.row->depthwise;
  return run_product(op_name(Op::kSeparable), args, plan, w, block.pw_activation, residual, input, size, layout);
}

Tensor separable_conv2d(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints stride, const Ints padding,
                        const Ints dilation, const std::string dw_act, const std::string pw_act,
                        const std::optional<Tensor>& residual, double dw_slope, double pw_slope, bool /*allow_tf32*/) {
  const BlockShape block = {check_separable(input, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, residual),
                            pw_weight.size(0), check_activation(kSeparable, "dw_act", dw_act, dw_slope),
                            check_activation(kSeparable, "pw_act", pw_act, pw_slope)};
  return run_block(input, block, residual, [&](const PointwiseFormat& pointwise) {
    const ConvolutionShape& s = block.shape;
    const BlockFormat format =
        block_format(selected_isa(), s.dtype, pointwise, s.channels, block.out_channels, s.kernel_h, s.kernel_w);
    void* const packed = workspace(Workspace::kBlockWeight, block_bytes(format));
    pack(format, s.dtype, dw_weight, dw_bias, pw_weight, pw_bias, packed);
    return packed_weights(format, packed);
  });
}

}  // namespace

Tensor separable_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints block, const std::vector<double> slopes,
                               const std::optional<Tensor>& residual, bool /*allow_tf32*/) {
  DWCONV_CHECK(input.dim() == 4, kPacked, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kPacked, "input", input);
  const PackedBlock b = check_block(kPacked, input, input.size(1), dtype, packed, block, slopes);
  if (residual) check_residual(kPacked, *residual, input, b.shape, b.out_channels);
  return run_block(input, b, residual, [&](const PointwiseFormat&) { return b.weights; });
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&dwconv::separable_conv2d));
  m.impl("separable_conv2d_pack", TORCH_BOX(&dwconv::separable_conv2d_pack));
  m.impl("separable_conv2d_packed", TORCH_BOX(&dwconv::separable_conv2d_packed));
}
