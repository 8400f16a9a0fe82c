// The ops, on one screen. Kernels register themselves beside their code (csrc/cpu, csrc/cuda); shapes without data,
// autograd and autocast are registered from Python (dwconv_ext/ops/).
#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10's stable ABI: one binary serves every later release

#include <torch/csrc/stable/library.h>

#ifndef DWCONV_LIBRARY
#define DWCONV_LIBRARY dwconv_ext  // tools/cuda_emulator compiles this file for a namespace of its own
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(DWCONV_LIBRARY, m) {
  // act(conv2d(input, weight, bias, groups=C)) for weight of shape (C * multiplier, 1, kH, kW). padding, here and in the fused
  // ops: of height and width, or of four ends, top, bottom, left and right.
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, str act=\"identity\", float slope=0.01) -> Tensor");
  // act(conv1d(cat((state, input[..., None]), -1), weight, bias, 1, 0, dilation, groups=C))[..., 0] for input (N, C), weight
  // (C, 1, k) and state (N, C, (k - 1) * dilation), which then holds the last samples. Without derivatives.
  m.def(
      "depthwise_conv1d_step(Tensor input, Tensor(a!) state, Tensor weight, Tensor? bias, int dilation=1, str act=\"identity\", "
      "float slope=0.01) -> Tensor");
  // act(conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups=C, dilation)) for weight of shape
  // (C, multiplier, kH, kW).
  m.def(
      "depthwise_conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] output_padding, SymInt[2] dilation, str act=\"identity\", float slope=0.01) -> Tensor");
  // (grad_input, grad_weight, grad_bias), each only where output_mask asks; the others are empty tensors of shape (0,).
  m.def(
      "depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  // depthwise_conv2d's output and its mean over the pixels, (N, C * multiplier, 1, 1), in one pass on CUDA; without derivatives.
  m.def(
      "depthwise_conv2d_pooled(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, str act=\"identity\", float slope=0.01) -> (Tensor, Tensor)");
  // pw_act(conv2d(dw_act(conv2d(input, dw_weight, dw_bias, groups=C)), pw_weight, pw_bias)) + residual
  // allow_tf32: CUDA's tensor cores may round float32 operands of the pointwise convolution, as torch.backends.cudnn.allow_tf32.
  m.def(
      "separable_conv2d(Tensor input, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str dw_act, str pw_act, Tensor? residual=None, "
      "float dw_slope=0.01, float pw_slope=0.01, bool allow_tf32=False) -> Tensor");
  // The same without derivatives, for many calls with the same weights: their packed bytes, and the rest of the arguments as
  // numbers, which take less of a short call's time (block: out_channels, kernel_h, kernel_w, stride, the four paddings,
  // dilation, dw_act, pw_act; slopes: dw_slope, pw_slope). isa is the CPU's selected instruction set, whose kernels read them:
  // named so that compiled graphs kept for one CPU aren't taken for another's; on CUDA, where all kernels read the same, nothing
  // looks at it. input_dtype: of the inputs where it is not the weights': folded weights are float32 also where inputs are
  // bfloat16 or float16, whose range they may leave.
  m.def(
      "separable_conv2d_pack(Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias, str isa, "
      "str input_dtype=\"\") -> Tensor");
  m.def(
      "separable_conv2d_packed(Tensor input, Tensor packed, int[] block, float[] slopes, Tensor? residual=None, "
      "bool allow_tf32=False) -> Tensor");
  // act(conv2d(input, weight, bias, groups=C)) in the same way, on the CPU. filter: out_channels, kernel_h, kernel_w, stride,
  // the four paddings, dilation; act: an activation's number (_C.activations).
  m.def("depthwise_conv2d_pack(Tensor weight, Tensor? bias, str isa, str input_dtype=\"\") -> Tensor");
  m.def("depthwise_conv2d_packed(Tensor input, Tensor packed, int[] filter, int act, float slope=0.01) -> Tensor");
  // act(conv2d(input * gate, weight, bias, stride)) + residual for a 1x1 convolution, without derivatives. gate is (N, C, 1, 1).
  m.def("pointwise_conv2d_pack(Tensor weight, Tensor? bias, str isa, str input_dtype=\"\") -> Tensor");
  m.def(
      "pointwise_conv2d(Tensor input, Tensor packed, int out_channels, int stride, int act, float slope=0.01, "
      "Tensor? residual=None, Tensor? gate=None, bool allow_tf32=False) -> Tensor");
  // act(conv2d(input, weight, bias)) for an input of few channels, which is read a filter's patch at a time, with what
  // pointwise_conv2d_pack makes of weight.permute(0, 2, 3, 1).reshape(out_channels, -1, 1, 1). filter: as
  // depthwise_conv2d_packed's. channels_last: of the output; it is too where the input is.
  m.def("patch_conv2d(Tensor input, Tensor packed, int[] filter, int act, float slope=0.01, bool channels_last=False) -> Tensor");
  // act(linear(input, weight, bias)) of (..., features), with what pointwise_conv2d_pack makes of the weight as 1x1 filters.
  m.def("linear(Tensor input, Tensor packed, int out_features, int act, float slope=0.01) -> Tensor");
  // separable_conv2d_packed(pointwise_conv2d(input, expand, hidden, 1, expand_act, expand_slope), packed, block, slopes,
  // residual), in one pass where that is expected to be faster: on the CPU where the expanded image would not stay in L2.
  m.def(
      "inverted_residual(Tensor input, Tensor expand, int hidden, int expand_act, float expand_slope, Tensor packed, int[] "
      "block, "
      "float[] slopes, Tensor? residual=None, bool allow_tf32=False) -> Tensor");
  // gate(conv2d(act(conv2d(input.mean((2, 3)), reduce_weight) + reduce_bias), expand_weight.t()) + expand_bias), (N, C, 1, 1),
  // for 1x1 convolutions without their last two dimensions; weights (S, C). gate: sigmoid or hardsigmoid.
  // On the CPU, without derivatives.
  m.def(
      "squeeze_excitation(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, "
      "str act, str gate, float slope=0.01) -> Tensor");
  // layer_norm(input.permute(0, 2, 3, 1), (C,), weight, bias, eps).permute(0, 3, 1, 2): over the channels of each pixel, with a
  // channels_last result. weight and bias are in the accumulation type. On the CPU, without derivatives.
  m.def("layer_norm2d(Tensor input, Tensor? weight, Tensor? bias, float eps=1e-05) -> Tensor");
  // nn.functional.max_pool2d, with input's layout. On the CPU, without derivatives.
  m.def("max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor");
  // torch.stack((first, second), 2).flatten(1, 2): channels by turns. On the CPU, without derivatives.
  m.def("interleave_channels(Tensor first, Tensor second) -> Tensor");
  // input.mean((2, 3), keepdim), on the CPU, without derivatives.
  m.def("global_average_pool(Tensor input, bool keepdim) -> Tensor");
  // Several of the ops above one after the other: dwconv_ext/nn/steps.py writes what they are. On the CPU, without derivatives.
  m.def("run_steps(Tensor[] inputs, Tensor[] weights, Tensor steps, Tensor numbers, str[] words, int[] outputs) -> Tensor[]");
  // act((input - mean) / sqrt(variance + eps) * weight + bias) by the batch's own mean and (biased) variance, which it returns;
  // these two, weight and bias have the accumulation type: float64 where input has, else float32.
  m.def(
      "batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, float eps, str act, float slope=0.01) -> "
      "(Tensor, Tensor, Tensor)");
  // (grad_input, grad_weight, grad_bias)
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
      "float eps, str act, float slope=0.01) -> (Tensor, Tensor, Tensor)");
  // The stages of the two, on CUDA, without derivatives: for statistics and sums over the batches of several processes, and for
  // statistics that a depthwise convolution has taken of its output. Backward's sums are the gradients of weight and bias; what
  // it applies are these over the number of values of a channel.
  m.def("batch_norm_statistics(Tensor input) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_act_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps, str act, "
      "float slope=0.01) -> Tensor");
  m.def(
      "batch_norm_act_backward_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor "
      "variance, "
      "float eps, str act, float slope=0.01) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_act_backward_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor variance, Tensor mean_grad_weight, Tensor mean_grad_bias, float eps, str act, float slope=0.01) -> Tensor");
  // act(batch_norm(middle)), middle = depthwise_conv2d(input, weight, None, stride, padding, dilation), middle, and the
  // statistics as batch_norm_act's; without derivatives.
  m.def(
      "depthwise_norm_act(Tensor input, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, float eps, str act, float slope) -> (Tensor, Tensor, Tensor, Tensor)");
  // Backward of act(batch_norm(middle)), middle = depthwise_conv2d(input, weight, None, stride, padding, dilation): the gradients
  // of input and weight, each only where output_mask asks, and of norm_weight and norm_bias.
  m.def(
      "depthwise_norm_act_backward(Tensor grad_output, Tensor middle, Tensor input, Tensor weight, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor mean, Tensor variance, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, float eps, "
      "str act, float slope, bool[2] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}
