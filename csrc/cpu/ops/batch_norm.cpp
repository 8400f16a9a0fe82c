// batch_norm_act and its backward on the CPU: checks, output allocation, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/batch_norm_checks.h"
#include "cpu/kernels/batch_norm/batch_norm_channel.h"
#include "cpu/ops/launch.h"

namespace dwconv {
namespace {

constexpr const char* kForward = "batch_norm_act";
constexpr const char* kBackward = "batch_norm_act_backward";
constexpr int64_t kConstants = 5, kVector = 16;  // values of a channel; elements readable past the last channel

// The arguments that both passes have, checked; the tensors in `kept` outlive the call.
BatchNormArgs common_args(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias, double eps, const std::string& act, double slope,
                          std::vector<Tensor>* kept) {
  BatchNormArgs args;
  CpuProblem& p = args.problem;
  check_batch_norm(op, input, weight, bias, eps, act);
  p = pixelwise_problem(op, input);
  args.eps = eps;
  p.activation = check_activation(op, "act", act, slope);
  const auto values = [&](const Tensor& t) -> const void* {
    kept->push_back(dense(t));
    return kept->back().const_data_ptr();
  };
  if (weight) args.weight = values(*weight);
  if (bias) args.bias = values(*bias);
  kept->push_back(dense(input, p.layout));
  args.input = kept->back().const_data_ptr();
  return args;
}

template <class A>
void set_constants(A* constants, int64_t pitch, int64_t c, const ChannelConstants<A>& k) {
  const A values[kConstants] = {k.mean, k.scale, k.bias, k.slope, k.offset};
  for (int64_t i = 0; i < kConstants; ++i) constants[i * pitch + c] = values[i];
}

template <class A>
A* new_constants(BatchNormArgs* args) {
  args->constants_pitch = args->problem.channels + kVector;
  const int64_t bytes = kConstants * args->constants_pitch * static_cast<int64_t>(sizeof(A));
  A* const constants = static_cast<A*>(workspace(Workspace::kChannelConstants, bytes));
  memset(constants, 0, bytes);
  args->constants = constants;
  return constants;
}

void run_kernel(const Plan& plan, const BatchNormArgs& args) {
  run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->batch_norm(args, scratch, tiles); });
}

// channels_last: the sums of all parts, then the constants of each channel.
void run_sums(const Plan& plan, BatchNormArgs* args) {
  const int64_t bytes = plan.parts * 2 * args->problem.channels * static_cast<int64_t>(sizeof(double));
  args->partial = static_cast<double*>(workspace(Workspace::kPartial, bytes));
  args->parts = plan.parts;
  args->wants_sums = true;
  run_kernel(plan, *args);
  args->wants_sums = false;
}

template <class A>
void join_moments(BatchNormArgs* args) {
  A* const constants = new_constants<A>(args);
  const CpuProblem& p = args->problem;
  double* const mean = args->partial;
  double* const squares = mean + p.channels;
  for (int64_t part = 1; part < args->parts; ++part) {
    const PartOfPixels range = pixels_of_part(*args, part);
    const JoinWeights weights = join_weights(range.begin, range.end - range.begin);
    const double* const its_mean = args->partial + part * 2 * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) join(weights, its_mean[c], its_mean[p.channels + c], &mean[c], &squares[c]);
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    Moments moments;
    moments.count = p.batch * p.in_h * p.in_w, moments.mean = mean[c], moments.squares = squares[c];
    set_constants(constants, args->constants_pitch, c, forward_constants<A>(*args, c, moments));
  }
}

template <class A>
void run_backward(const Plan& plan, BatchNormArgs* args) {
  A* const constants = new_constants<A>(args);
  const int64_t channels = args->problem.channels;
  for (int64_t c = 0; c < channels; ++c) set_constants(constants, args->constants_pitch, c, saved_constants<A>(*args, c));
  run_sums(plan, args);
  for (int64_t c = 0; c < channels; ++c) {
    GradSums sums;
    for (int64_t part = 0; part < args->parts; ++part) {
      const double* const its = args->partial + part * 2 * channels;
      sums.grad += its[c];
      sums.product += its[channels + c];
    }
    ChannelConstants<A> k = saved_constants<A>(*args, c);
    backward_constants<A>(*args, c, sums, &k);
    set_constants(constants, args->constants_pitch, c, k);
  }
  run_kernel(plan, *args);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, double eps, const std::string act,
                                                  double slope) {
  std::vector<Tensor> kept;
  BatchNormArgs args = common_args(kForward, input, weight, bias, eps, act, slope, &kept);
  const CpuProblem& p = args.problem;
  const auto values = [&] { return empty_buffer(kForward, input, {p.channels}, accumulate_scalar(p.dtype)); };
  const Tensor mean = values(), variance = values();
  args.mean = mean.mutable_data_ptr();
  args.variance = variance.mutable_data_ptr();
  const Plan& plan = plan_for<Plan>(Op::kBatchNorm, Pass::kForward, p, 0, [&](const IsaKernels& isa, const Machine& here) {
    return plan_batch_norm(p, false, isa, here);
  });
  log_plan(p, plan);
  const bool wide = p.dtype == DType::kFloat64;
  if (p.layout == Layout::kNHWC) {
    run_sums(plan, &args);
    wide ? join_moments<double>(&args) : join_moments<float>(&args);
  }
  const Tensor output = fresh_output(kForward, input, {p.batch, p.channels, p.in_h, p.in_w}, p.layout);
  args.output = output.mutable_data_ptr();
  run_kernel(plan, args);
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                           const Tensor& mean, const Tensor& variance, double eps,
                                                           const std::string act, double slope) {
  std::vector<Tensor> kept;
  BatchNormArgs args = common_args(kBackward, input, weight, bias, eps, act, slope, &kept);
  const CpuProblem& p = args.problem;
  check_norm_grad(kBackward, grad_output, input);
  check_wide(kBackward, "mean", mean, {p.channels}, input, p.dtype);
  check_wide(kBackward, "variance", variance, {p.channels}, input, p.dtype);
  const Tensor dense_mean = dense(mean), dense_variance = dense(variance);
  args.mean = dense_mean.mutable_data_ptr();
  args.variance = dense_variance.mutable_data_ptr();
  const Tensor grad = dense(grad_output, p.layout);
  args.grad_output = grad.const_data_ptr();
  const auto values = [&] { return empty_buffer(kBackward, input, {p.channels}, accumulate_scalar(p.dtype)); };
  const Tensor grad_weight = values(), grad_bias = values();
  args.grad_weight = grad_weight.mutable_data_ptr();
  args.grad_bias = grad_bias.mutable_data_ptr();
  const Plan& plan = plan_for<Plan>(Op::kBatchNorm, Pass::kBackward, p, 0, [&](const IsaKernels& isa, const Machine& here) {
    return plan_batch_norm(p, true, isa, here);
  });
  log_plan(p, plan);
  const Tensor grad_input = fresh_output(kBackward, input, {p.batch, p.channels, p.in_h, p.in_w}, p.layout);
  args.output = grad_input.mutable_data_ptr();
  if (p.layout == Layout::kNCHW) {
    run_kernel(plan, args);
  } else if (p.dtype == DType::kFloat64) {
    run_backward<double>(plan, &args);
  } else {
    run_backward<float>(plan, &args);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&dwconv::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&dwconv::batch_norm_act_backward));
}
