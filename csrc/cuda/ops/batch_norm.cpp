// batch_norm_act, its backward and their stages on CUDA: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/batch_norm_checks.h"
#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// One call of one of the ops: its operands, dense and of one layout, and what its launches share.
class Call {
 public:
  Call(const char* op, const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
       const std::string& act, double slope)
      : op_(op), like_(input), dtype_(check_batch_norm(op, input, weight, bias, eps, act)), device_(op, input) {
    activation_ = check_activation(op, "act", act, slope);
    eps_ = eps;
    layout_ = layout_of(input);
    input_ = dense(input, layout_);
    if (weight) weight_ = dense(*weight);
    if (bias) bias_ = dense(*bias);
  }

  void set_statistics(const Tensor& mean, const Tensor& variance) {
    check_wide(op_, "mean", mean, {like_.size(1)}, like_, dtype_);
    check_wide(op_, "variance", variance, {like_.size(1)}, like_, dtype_);
    mean_ = dense(mean), variance_ = dense(variance);
  }
  void set_grad_output(const Tensor& grad) {
    check_norm_grad(op_, grad, like_);
    grad_ = dense(grad, layout_);
  }
  void set_mean_grads(const Tensor& weight, const Tensor& bias) {
    check_wide(op_, "mean_grad_weight", weight, {like_.size(1)}, like_, dtype_);
    check_wide(op_, "mean_grad_bias", bias, {like_.size(1)}, like_, dtype_);
    grad_weight_ = dense(weight), grad_bias_ = dense(bias);
  }
  // Mean and variance, which later stages use.
  Pair statistics() {
    std::tie(mean_, variance_) = sums(Pass::kForward);
    return {*mean_, *variance_};
  }
  // The gradients of weight and bias, the same.
  Pair grad_sums() {
    std::tie(grad_weight_, grad_bias_) = sums(Pass::kBackward);
    return {*grad_weight_, *grad_bias_};
  }

  // The result.
  Tensor values() const { return sweep(Pass::kForward, 1); }
  // grad_input, of the gradients of weight and bias summed over so many values of a channel.
  Tensor grad_input(double count) const { return sweep(Pass::kBackward, count); }
  Tensor grad_input() const { return grad_input(static_cast<double>(like_.numel() / like_.size(1))); }

 private:
  Tensor sweep(Pass pass, double count) const {
    const BatchNormPlan& plan = plan_for(pass);
    const Tensor output = device_.empty(like_, {like_.size(0), like_.size(1), like_.size(2), like_.size(3)}, layout_);
    BatchNormArgs args = plan.values_args;
    set(&args);
    args.output = output.mutable_data_ptr();
    args.grad_weight = pointer(grad_weight_), args.grad_bias = pointer(grad_bias_);
    args.count = count;
    device_.launch(plan.values.launch, &args);
    return output;
  }

  static const void* pointer(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

  const BatchNormPlan& plan_for(Pass pass) const {
    Request request;
    DepthwiseProblem& p = request.problem;
    p.dtype = p.out_dtype = dtype_;
    p.layout = layout_;
    p.batch = like_.size(0), p.channels = like_.size(1);
    p.in_h = p.out_h = like_.size(2), p.in_w = p.out_w = like_.size(3);
    p.kernel_h = p.kernel_w = 1;
    const int64_t run = layout_ == Layout::kNHWC ? p.channels : p.in_h * p.in_w;
    const bool starts = aligned_start(input_) && (!grad_ || aligned_start(*grad_));
    request.aligned = starts && run * element_size(dtype_) % 16 == 0 ? 16 : 0;
    const Gpu& gpu = device_.gpu();
    const BatchNormPlan& plan = planned<BatchNormPlan>(plan_key(Op::kBatchNorm, pass, request, gpu),
                                                       [&] { return plan_batch_norm(pass, p, request.aligned, gpu); });
    log_plan(Op::kBatchNorm, pass, p, 0, plan.reason, plan.values.launch);
    return plan;
  }

  void set(BatchNormArgs* args) const {
    args->input = input_.const_data_ptr();
    args->grad_output = pointer(grad_);
    args->weight = pointer(weight_), args->bias = pointer(bias_);
    args->mean = pointer(mean_), args->variance = pointer(variance_);
    args->eps = eps_;
    args->activation = activation_;
  }

  Pair sums(Pass pass) const {
    const BatchNormPlan& plan = plan_for(pass);
    const ScalarType wide = accumulate_scalar(dtype_);
    const int64_t channels = like_.size(1), kinds = pass == Pass::kForward ? 3 : 2;
    const Tensor partial = device_.empty(like_, Ints{plan.sums_args.parts, kinds, channels}, wide);
    const Tensor first = device_.empty(like_, Ints{channels}, wide), second = device_.empty(like_, Ints{channels}, wide);
    BatchNormArgs args = plan.sums_args;
    set(&args);
    args.partial = partial.mutable_data_ptr();
    device_.launch(plan.sums.launch, &args);
    const JoinPartsArgs join = {
        partial.const_data_ptr(), args.variance, first.mutable_data_ptr(), second.mutable_data_ptr(), eps_, channels, args.parts};
    device_.launch(plan.join.launch, &join);
    return {first, second};
  }

  const char* op_;
  const Tensor& like_;
  DType dtype_;
  Device device_;
  Layout layout_;
  Activation activation_;
  double eps_;
  Tensor input_;
  MaybeTensor weight_, bias_, mean_, variance_, grad_, grad_weight_, grad_bias_;
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                                                  double eps, const std::string act, double slope) {
  Call call("batch_norm_act", input, weight, bias, eps, act, slope);
  const auto [mean, variance] = call.statistics();
  return {call.values(), mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                                           const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                                                           const Tensor& variance, double eps, const std::string act,
                                                           double slope) {
  Call call("batch_norm_act_backward", input, weight, bias, eps, act, slope);
  call.set_grad_output(grad_output);
  call.set_statistics(mean, variance);
  const auto [grad_weight, grad_bias] = call.grad_sums();
  return {call.grad_input(), grad_weight, grad_bias};
}

Pair batch_norm_statistics(const Tensor& input) {
  return Call("batch_norm_statistics", input, std::nullopt, std::nullopt, 0, "identity", 0).statistics();
}

Tensor batch_norm_act_apply(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                            const Tensor& variance, double eps, const std::string act, double slope) {
  Call call("batch_norm_act_apply", input, weight, bias, eps, act, slope);
  call.set_statistics(mean, variance);
  return call.values();
}

Pair batch_norm_act_backward_sums(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                  const MaybeTensor& bias, const Tensor& mean, const Tensor& variance, double eps,
                                  const std::string act, double slope) {
  Call call("batch_norm_act_backward_sums", input, weight, bias, eps, act, slope);
  call.set_grad_output(grad_output);
  call.set_statistics(mean, variance);
  return call.grad_sums();
}

Tensor batch_norm_act_backward_apply(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                     const MaybeTensor& bias, const Tensor& mean, const Tensor& variance,
                                     const Tensor& mean_grad_weight, const Tensor& mean_grad_bias, double eps,
                                     const std::string act, double slope) {
  Call call("batch_norm_act_backward_apply", input, weight, bias, eps, act, slope);
  call.set_grad_output(grad_output);
  call.set_statistics(mean, variance);
  call.set_mean_grads(mean_grad_weight, mean_grad_bias);
  return call.grad_input(1);
}

}  // namespace
}  // namespace dwconv::cuda

STABLE_TORCH_LIBRARY_IMPL(DWCONV_LIBRARY, DWCONV_DISPATCH_KEY, m) {
  m.impl("batch_norm_act", TORCH_BOX(&dwconv::cuda::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&dwconv::cuda::batch_norm_act_backward));
  m.impl("batch_norm_statistics", TORCH_BOX(&dwconv::cuda::batch_norm_statistics));
  m.impl("batch_norm_act_apply", TORCH_BOX(&dwconv::cuda::batch_norm_act_apply));
  m.impl("batch_norm_act_backward_sums", TORCH_BOX(&dwconv::cuda::batch_norm_act_backward_sums));
  m.impl("batch_norm_act_backward_apply", TORCH_BOX(&dwconv::cuda::batch_norm_act_backward_apply));
}
