// squeeze_excitation on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "squeeze_excitation";

void check_weights(const char* name, const Tensor& weight, const std::optional<Tensor>& bias, const char* bias_name,
                   int64_t biases, int64_t rows, int64_t columns, DType dtype) {
  const ScalarType wanted = accumulate_scalar(dtype);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns &&
                      weight.scalar_type() == wanted,
                  kOp, ": ", name, " must have shape [", rows, ", ", columns, "] and the input's accumulation type, on the CPU, ",
                  "but got shape ", to_string(weight));
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == biases && bias->scalar_type() == wanted), kOp,
                  ": ", bias_name, " must have ", biases,
                  " elements of the input's accumulation type, on the CPU, but got shape ", bias ? to_string(*bias) : "");
}

Tensor squeeze_excitation(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& expand_weight, const std::optional<Tensor>& expand_bias, const std::string act,
                          const std::string gate, double slope) {
  STD_TORCH_CHECK(input.dim() == 4, kOp, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kOp, "input", input);
  STD_TORCH_CHECK(input.numel() > 0, kOp, ": input must not be empty, but got shape ", to_string(input));
  STD_TORCH_CHECK(gate == "sigmoid" || gate == "hardsigmoid", kOp, ": gate must be sigmoid or hardsigmoid, but got '", gate, "'");
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(reduce_weight.dim() == 2 && reduce_weight.size(0) > 0, kOp, ": reduce_weight must have shape (S, ", channels,
                  "), but got ", to_string(reduce_weight));
  SqueezeArgs args;
  args.squeezed = reduce_weight.size(0);
  check_weights("reduce_weight", reduce_weight, reduce_bias, "reduce_bias", args.squeezed, args.squeezed, channels, dtype);
  check_weights("expand_weight", expand_weight, expand_bias, "expand_bias", channels, args.squeezed, channels, dtype);
  CpuProblem& p = args.problem;
  p.dtype = p.out_dtype = dtype;
  p.layout = layout_of(input);
  p.batch = input.size(0), p.channels = channels;
  p.in_h = p.out_h = input.size(2), p.in_w = p.out_w = input.size(3);
  p.kernel_h = p.kernel_w = 1;
  p.activation = check_activation(kOp, "act", act, slope);
  const Tensor x = as_layout(input, p.layout);
  set_input(p, x);
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor reduce = dense(reduce_weight), expand = dense(expand_weight);
  const Tensor first = reduce_bias ? dense(*reduce_bias) : reduce, second = expand_bias ? dense(*expand_bias) : expand;
  args.input = x.const_data_ptr();
  args.reduce_weight = reduce.const_data_ptr();
  args.reduce_bias = reduce_bias ? first.const_data_ptr() : nullptr;
  args.expand_weight = expand.const_data_ptr();
  args.expand_bias = expand_bias ? second.const_data_ptr() : nullptr;
  args.gate = gate == "sigmoid" ? GateKind::kSigmoid : GateKind::kHardsigmoid;
  const int64_t unit = accumulate_size(dtype);
  args.hidden_pitch = round_up(args.squeezed, kMostLanes);
  args.mean = workspace(Workspace::kPartial, p.batch * channels * unit);
  args.hidden = workspace(Workspace::kPartialBias, p.batch * args.hidden_pitch * unit);
  const Tensor output = empty_output(input, {p.batch, channels, 1, 1}, Layout::kNCHW);
  args.output = output.mutable_data_ptr();
  const Plan& plan = plan_for<Plan>(Op::kSqueezeExcitation, Pass::kForward, p, args.squeezed,
                                    [&](const IsaKernels& isa, const Machine& here) { return plan_squeeze(p, isa, here); });
  log_plan(p, plan);
  const auto run = [&](const Plan& how) {
    run_tiles(how, [&](void* scratch, Tiles tiles) { plan.row->squeeze(args, scratch, tiles); });
  };
  args.wants_mean = true;
  run(plan);
  args.wants_mean = false;
  Plan images;  // a tile each
  images.tiles = p.batch;
  images.workers = std::min<int64_t>(plan.workers, p.batch);
  run(images);
  return output;
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("squeeze_excitation", TORCH_BOX(&dwconv::squeeze_excitation)); }
