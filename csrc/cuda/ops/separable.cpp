// separable_conv2d on CUDA, with weights as the modules keep them and packed: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include "cuda/ops/calls.h"
#include "cuda/ops/packed.h"

namespace dwconv::cuda {
namespace {

constexpr const char* kPack = "separable_conv2d_pack";
constexpr const char* kPacked = "separable_conv2d_packed";

// Contiguous, on the device.
struct BlockWeights {
  const void *dw_weight, *dw_bias, *pw_weight, *pw_bias;
  bool wide_bias;
};

bool starts_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The block of an input in its layout, by torch's own convolutions.
using ByTorch = std::function<Tensor(const Tensor& input, Layout layout)>;

// by_torch: empty where there is none.
Tensor run_block(const Device& device, const Tensor& input, const BlockShape& block, const BlockWeights& weights,
                 const std::optional<Tensor>& residual, bool allow_tf32, const ByTorch& by_torch) {
  const ConvolutionShape& s = block.shape;
  const int64_t out_channels = block.out_channels;
  Work work = {Op::kSeparable, Pass::kForward, Pass::kForward};
  Request& request = work.request;
  const Layout layout = layout_of(input);
  set_problem(request.problem, s, layout);
  request.problem.activation = block.dw_activation;
  request.allow_tf32 = allow_tf32;
  Tensor output = device.empty(input, {s.batch, out_channels, s.out_h, s.out_w}, layout);
  if (output.numel() == 0) return output;
  const Tensor x = as_layout(input, layout);
  const std::optional<Tensor> added =
      residual ? std::optional(torch::stable::contiguous(*residual, memory_format(layout))) : std::nullopt;
  set_input(request.problem, x);

  const bool nhwc = layout == Layout::kNHWC;
  SeparableAlignment& alignment = work.alignment;
  alignment.input = nhwc && aligned_channels(x) && starts_aligned(weights.dw_weight);
  alignment.middle = s.channels * x.element_size() % 16 == 0;
  alignment.output = nhwc && aligned_channels(output) && (!added || aligned_channels(*added));
  alignment.weight = starts_aligned(weights.pw_weight) && alignment.middle;
  alignment.rows = nhwc ? 0 : std::min(aligned_rows(x), whole_runs({s.out_w * element_size(request.problem.dtype)}));
  work.out_channels = out_channels;
  work.extras = {block.dw_activation,        block.pw_activation,  weights.dw_bias != nullptr,
                 weights.pw_bias != nullptr, residual.has_value(), !is_dense(x, layout)};
  work.torch = by_torch != nullptr;
  const Gpu& gpu = device.gpu();
  const auto plan_for = [&](const Request& way) -> const SeparablePlan& {
    PlanKey key = plan_key(Op::kSeparable, Pass::kForward, way, gpu);
    key.out_channels = out_channels;
    key.alignment = alignment;
    return planned<SeparablePlan>(key, [&] { return plan_separable(way, out_channels, alignment, gpu); });
  };
  const auto by_us = [&](const SeparablePlan& plan) {
    SeparableBlockArgs args = plan.block_args;
    args.activation = block.pw_activation;
    args.pw_weight = weights.pw_weight;
    args.pw_bias = weights.pw_bias;
    args.wide_bias = weights.wide_bias;
    args.residual = added ? added->const_data_ptr() : nullptr;
    args.output = output.mutable_data_ptr();
    if (plan.fused) {
      args.problem.activation = block.dw_activation;
      args.input = x.const_data_ptr();
      args.dw_weight = weights.dw_weight;
      args.dw_bias = weights.dw_bias;
      device.launch(plan.block.launch, &args);
      return;
    }
    const Ints middle_size = {s.batch, s.channels, s.out_h, s.out_w};
    const Tensor middle = device.empty(input, middle_size, layout);
    DepthwiseTileArgs first = plan.depthwise_args;
    first.problem.activation = block.dw_activation;
    first.input = x.const_data_ptr();
    first.weight = weights.dw_weight;
    first.bias = weights.dw_bias;
    first.wide_bias = weights.wide_bias;
    first.output = middle.mutable_data_ptr();
    device.launch(plan.depthwise.launch, &first);
    const bool done = is_inlined(block.dw_activation.kind);
    const Tensor activated = done && nhwc ? middle : device.empty(input, middle_size, Layout::kNHWC);
    if (!nhwc) {
      TransposeArgs values = plan.transpose_args;
      values.input = middle.const_data_ptr();
      values.output = activated.mutable_data_ptr();
      if (!done) values.activation = block.dw_activation;
      device.launch_behind(plan.transpose.launch, &values);
    } else if (!done) {
      const ActivateArgs values = {middle.const_data_ptr(), activated.mutable_data_ptr(), middle.numel(), block.dw_activation};
      device.launch(plan_activation(request.problem.dtype, values.count, gpu).launch, &values);
    }
    args.input = activated.const_data_ptr();
    if (args.aligned_in) {  // then it reads pixels by asynchronous copies, past the cache that is not coherent
      device.launch_behind(plan.block.launch, &args);
    } else {
      device.launch(plan.block.launch, &args);
    }
  };
  const std::string timed = tune(device, &work, [&](const Request& way) {
    way.forced.source == Source::kTorch ? void(by_torch(x, layout)) : by_us(plan_for(way));
  });
  if (is_for_torch(work, gpu, timed)) {
    output = Tensor();  // its memory first
    return by_torch(x, layout);
  }
  const SeparablePlan& plan = plan_for(request);
  log_plan(Op::kSeparable, Pass::kForward, request.problem, out_channels, plan.reason, plan.block.launch, timed);
  by_us(plan);
  return output;
}

Tensor separable_conv2d(const Tensor& input, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Ints stride, const Ints padding,
                        const Ints dilation, const std::string dw_act, const std::string pw_act,
                        const std::optional<Tensor>& residual, double dw_slope, double pw_slope, bool allow_tf32) {
  const BlockShape block = {check_separable(input, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, residual),
                            pw_weight.size(0), check_activation(kSeparable, "dw_act", dw_act, dw_slope),
                            check_activation(kSeparable, "pw_act", pw_act, pw_slope)};
  const ConvolutionShape& s = block.shape;
  check_sides(kSeparable, s);
  const Device device(kSeparable, input);
  const Tensor dw = dense(dw_weight), pw = dense(pw_weight);
  const Tensor db = dw_bias ? dense(*dw_bias) : dw, pb = pw_bias ? dense(*pw_bias) : pw;
  const BlockWeights weights = {dw.const_data_ptr(), dw_bias ? db.const_data_ptr() : nullptr, pw.const_data_ptr(),
                                pw_bias ? pb.const_data_ptr() : nullptr, false};
  ByTorch by_torch;
  // Whether torch's convolution may use tf32 is a setting of its own.
  if (torch_has(s) && torch_has(block.dw_activation) && torch_has(block.pw_activation) && !residual &&
      (s.dtype != DType::kFloat32 || allow_tf32)) {
    by_torch = [&](const Tensor& x, Layout layout) {
      const Tensor middle = in_torch_forward(x, dw, dw_bias, TorchConvolution(s), block.dw_activation,
                                             {s.batch, s.channels, s.out_h, s.out_w}, layout);
      return in_torch_forward(middle, pw, pw_bias, TorchConvolution(), block.pw_activation,
                              {s.batch, block.out_channels, s.out_h, s.out_w}, layout);
    };
  }
  return run_block(device, input, block, weights, residual, allow_tf32, by_torch);
}

Tensor separable_conv2d_pack(const Tensor& dw_weight, const std::optional<Tensor>& dw_bias, const Tensor& pw_weight,
                             const std::optional<Tensor>& pw_bias, const std::string /*isa*/, const std::string input_dtype) {
  const DType weights = check_block_filters(kPack, dw_weight);
  const DType dtype = packed_dtype(kPack, weights, input_dtype);
  const int64_t channels = dw_weight.size(0);
  check_pointwise(kPack, dw_bias, pw_weight, pw_bias, channels, dw_weight);
  const Device device(kPack, dw_weight);
  const PackedPlaces places(dtype, channels, pw_weight.size(0), dw_weight.size(2), dw_weight.size(3));
  return pack(dtype, places, dw_weight, dw_weight, dw_bias, pw_weight, pw_bias);
}

}  // namespace

Tensor separable_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints block, const std::vector<double> slopes,
                               const std::optional<Tensor>& residual, bool allow_tf32) {
  DWCONV_CHECK(input.dim() == 4, kPacked, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kPacked, "input", input);
  const int64_t channels = input.size(1);
  const BlockShape b = check_block_shape(kPacked, input, channels, dtype, block, slopes, [&] {
    check_packed(kPacked, "packed", kPack, packed, input, dtype, channels, block[0], block[1], block[2],
                 block[1] > 0 && block[2] > 0);
  });
  if (residual) check_residual(kPacked, *residual, input, b.shape, b.out_channels);
  check_sides(kPacked, b.shape);
  const Device device(kPacked, input);
  const PackedPlaces at(dtype, channels, b.out_channels, block[1], block[2]);
  const BlockWeights weights = {at_byte(packed, at.dw_weight), at_byte(packed, at.dw_bias), at_byte(packed, at.pw_weight),
                                at_byte(packed, at.pw_bias), true};
  return run_block(device, input, b, weights, residual, allow_tf32, {});
}

}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("separable_conv2d", TORCH_BOX(&dwconv::cuda::separable_conv2d));
  m.impl("separable_conv2d_pack", TORCH_BOX(&dwconv::cuda::separable_conv2d_pack));
  m.impl("separable_conv2d_packed", TORCH_BOX(&dwconv::cuda::separable_conv2d_packed));
}
