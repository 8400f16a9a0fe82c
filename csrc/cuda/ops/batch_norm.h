// A call of BatchNorm and activation on CUDA: its operands, and the launches of its stages. Include after defining
// TORCH_TARGET_VERSION.
#pragma once

#include <tuple>

#include "common/batch_norm_checks.h"
#include "cuda/ops/launch.h"

namespace dwconv::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// One call of one of the ops: its operands, dense and of one layout, and what its launches share.
class NormCall {
 public:
  NormCall(const char* op, const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
           const std::string& act, double slope, const NormNames& names = {})
      : op_(op),
        names_(names),
        like_(input),
        dtype_(check_batch_norm(op, input, weight, bias, eps, act, names)),
        device_(op, input) {
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
    check_norm_grad(op_, grad, like_, names_);
    grad_ = dense(grad, layout_);
  }
  void set_mean_grads(const Tensor& weight, const Tensor& bias) {
    check_wide(op_, "mean_grad_weight", weight, {like_.size(1)}, like_, dtype_);
    check_wide(op_, "mean_grad_bias", bias, {like_.size(1)}, like_, dtype_);
    grad_weight_ = dense(weight), grad_bias_ = dense(bias);
  }
  // Mean and variance, which later stages use; of parts that the kernel before has left.
  Pair statistics(const Tensor& partial, int32_t parts) {
    std::tie(mean_, variance_) = joined(Pass::kForward, partial, parts);
    return {*mean_, *variance_};
  }
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
  Tensor grad_input() const { return grad_input(count()); }
  const Tensor& input() const { return input_; }
  const Tensor& grad_output() const { return *grad_; }
  double count() const { return static_cast<double>(like_.numel() / like_.size(1)); }
  // What a kernel needs of the call, of sums over so many values of a channel.
  void set(BatchNormArgs* args, double count) const {
    args->grad_weight = pointer(grad_weight_), args->grad_bias = pointer(grad_bias_);
    args->count = count;
    args->input = input_.const_data_ptr();
    args->grad_output = pointer(grad_);
    args->weight = pointer(weight_), args->bias = pointer(bias_);
    args->mean = pointer(mean_), args->variance = pointer(variance_);
    args->eps = eps_;
    args->activation = activation_;
  }

 private:
  Tensor sweep(Pass pass, double count) const {
    const BatchNormPlan& plan = plan_for(pass);
    const Tensor output = device_.empty(like_, {like_.size(0), like_.size(1), like_.size(2), like_.size(3)}, layout_);
    BatchNormArgs args = plan.values_args;
    set(&args, count);
    args.output = output.mutable_data_ptr();
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
    log_plan(Op::kBatchNorm, pass, p, 0, plan.reason, plan.values.launch, "");
    return plan;
  }

  Pair sums(Pass pass) const {
    const BatchNormPlan& plan = plan_for(pass);
    const ScalarType wide = accumulate_scalar(dtype_);
    const int64_t channels = like_.size(1), kinds = pass == Pass::kForward ? 3 : 2;
    const Tensor partial = device_.empty(like_, Ints{plan.sums_args.parts, kinds, channels}, wide);
    BatchNormArgs args = plan.sums_args;
    set(&args, 1);
    args.partial = partial.mutable_data_ptr();
    device_.launch(plan.sums.launch, &args);
    return joined(pass, partial, args.parts);
  }

  Pair joined(Pass pass, const Tensor& partial, int32_t parts) const {
    const ScalarType wide = accumulate_scalar(dtype_);
    const int64_t channels = like_.size(1);
    const Tensor first = device_.empty(like_, Ints{channels}, wide), second = device_.empty(like_, Ints{channels}, wide);
    const JoinPartsArgs args = {
        partial.const_data_ptr(), pointer(variance_), first.mutable_data_ptr(), second.mutable_data_ptr(), eps_, channels, parts};
    device_.launch(plan_for(pass).join.launch, &args);
    return {first, second};
  }

  const char* op_;
  NormNames names_;
  const Tensor& like_;
  DType dtype_;
  Device device_;
  Layout layout_;
  Activation activation_;
  double eps_;
  Tensor input_;
  MaybeTensor weight_, bias_, mean_, variance_, grad_, grad_weight_, grad_bias_;
};

}  // namespace
}  // namespace dwconv::cuda
