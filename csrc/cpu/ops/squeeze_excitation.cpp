// squeeze_excitation and global_average_pool on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/launch.h"
#include "cpu/runtime/with_type.h"

namespace dwconv {
namespace {

constexpr const char* kOp = "squeeze_excitation";
constexpr const char* kPool = "global_average_pool";

// A problem over the input's pixels, which `x` holds.
CpuProblem pixels(const char* op, const Tensor& input, Tensor* x) {
  CpuProblem p = pixelwise_problem(op, input);
  *x = as_layout(input, p.layout);
  set_input(p, *x);
  return p;
}

const SqueezePlan& plan_of(const CpuProblem& p, int64_t squeezed) {
  return plan_for<SqueezePlan>(Op::kSqueezeExcitation, Pass::kForward, p, squeezed,
                               [&](const IsaKernels& isa, const Machine& here) { return plan_squeeze(p, squeezed, isa, here); });
}

}  // namespace

Tensor squeeze_excitation(const Tensor& input, const Tensor& reduce_weight, const std::optional<Tensor>& reduce_bias,
                          const Tensor& expand_weight, const std::optional<Tensor>& expand_bias, const std::string act,
                          const std::string gate, double slope) {
  SqueezeArgs args;
  Tensor x;
  CpuProblem& p = args.problem;
  p = pixels(kOp, input, &x);
  const DType dtype = p.dtype;
  DWCONV_CHECK(gate == "sigmoid" || gate == "hardsigmoid", kOp, ": gate must be sigmoid or hardsigmoid, but got '", gate, "'");
  const int64_t channels = input.size(1);
  DWCONV_CHECK(reduce_weight.dim() == 2 && reduce_weight.size(0) > 0, kOp, ": reduce_weight must have shape (S, ", channels,
               "), but got ", to_string(reduce_weight));
  args.squeezed = reduce_weight.size(0);
  check_shaped(kOp, "reduce_weight", reduce_weight, {args.squeezed, channels}, input);
  if (reduce_bias) check_shaped(kOp, "reduce_bias", *reduce_bias, {args.squeezed}, input);
  check_shaped(kOp, "expand_weight", expand_weight, {args.squeezed, channels}, input);
  if (expand_bias) check_shaped(kOp, "expand_bias", *expand_bias, {channels}, input);
  p.activation = check_activation(kOp, "act", act, slope);
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
  const SqueezePlan& plan = plan_of(p, args.squeezed);
  log_plan(p, plan.means);
  const Tensor output = fresh_output(kOp, input, {p.batch, channels, 1, 1}, Layout::kNCHW);
  args.output = output.mutable_data_ptr();
  run_stages({&plan.means, &plan.hidden, &plan.gates}, [&](int64_t stage, Tiles& tiles) {
    SqueezeArgs now = args;
    now.stage = static_cast<SqueezeStage>(stage);
    plan.means.row->squeeze(now, nullptr, tiles);
  });
  return output;
}

Tensor global_average_pool(const Tensor& input, bool keepdim) {
  SqueezeArgs args;
  Tensor x;
  args.problem = pixels(kPool, input, &x);
  const CpuProblem& p = args.problem;
  const int64_t count = p.batch * p.channels;
  args.input = x.const_data_ptr();
  const SqueezePlan& plan = plan_of(p, 0);
  log_plan(p, plan.means);
  const Tensor output = fresh_output(kPool, input, {p.batch, p.channels, 1, 1}, Layout::kNCHW);
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename AccumulateType<T>::type;
    T* const to = static_cast<T*>(output.mutable_data_ptr());
    args.mean = sizeof(T) == sizeof(A) ? to : workspace(Workspace::kPartial, count * static_cast<int64_t>(sizeof(A)));
    run_tiles(plan.means, [&](void* scratch, Tiles tiles) { plan.means.row->squeeze(args, scratch, tiles); });
    if (sizeof(T) == sizeof(A)) return;
    for (int64_t i = 0; i < count; ++i) from_accumulate(static_cast<const A*>(args.mean)[i], to + i);
  });
  return keepdim ? output : reinterpreted(output, {p.batch, p.channels}, {p.channels, 1});
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("squeeze_excitation", TORCH_BOX(&dwconv::squeeze_excitation));
  m.impl("global_average_pool", TORCH_BOX(&dwconv::global_average_pool));
}
