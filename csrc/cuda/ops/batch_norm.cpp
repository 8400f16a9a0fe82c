// batch_norm_act, its backward and their stages on CUDA: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#ifndef USE_CUDA
#define USE_CUDA  // the stable ABI declares the current stream only then
#endif
#include "cuda/ops/batch_norm.h"

#include <torch/csrc/stable/library.h>

namespace dwconv::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                                                  double eps, const std::string act, double slope) {
  NormCall call("batch_norm_act", input, weight, bias, eps, act, slope);
  const auto [mean, variance] = call.statistics();
  return {call.values(), mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                                           const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                                                           const Tensor& variance, double eps, const std::string act,
                                                           double slope) {
  NormCall call("batch_norm_act_backward", input, weight, bias, eps, act, slope);
  call.set_grad_output(grad_output);
  call.set_statistics(mean, variance);
  const auto [grad_weight, grad_bias] = call.grad_sums();
  return {call.grad_input(), grad_weight, grad_bias};
}

Pair batch_norm_statistics(const Tensor& input) {
  return NormCall("batch_norm_statistics", input, std::nullopt, std::nullopt, 0, "identity", 0).statistics();
}

Tensor batch_norm_act_apply(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                            const Tensor& variance, double eps, const std::string act, double slope) {
  NormCall call("batch_norm_act_apply", input, weight, bias, eps, act, slope);
  call.set_statistics(mean, variance);
  return call.values();
}

Pair batch_norm_act_backward_sums(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                  const MaybeTensor& bias, const Tensor& mean, const Tensor& variance, double eps,
                                  const std::string act, double slope) {
  NormCall call("batch_norm_act_backward_sums", input, weight, bias, eps, act, slope);
  call.set_grad_output(grad_output);
  call.set_statistics(mean, variance);
  return call.grad_sums();
}

Tensor batch_norm_act_backward_apply(const Tensor& grad_output, const Tensor& input, const MaybeTensor& weight,
                                     const MaybeTensor& bias, const Tensor& mean, const Tensor& variance,
                                     const Tensor& mean_grad_weight, const Tensor& mean_grad_bias, double eps,
                                     const std::string act, double slope) {
  NormCall call("batch_norm_act_backward_apply", input, weight, bias, eps, act, slope);
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
