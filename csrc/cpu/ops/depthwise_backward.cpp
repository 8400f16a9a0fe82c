// depthwise_conv2d_backward on the CPU, and depthwise_conv_transpose2d, which its kernels of the input gradient compute: checks,
// output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops/depthwise_parts.h"
#include "cpu/ops/tune.h"
#include "cpu/runtime/input_phase.h"

namespace dwconv {
namespace {

constexpr const char* kBackward = "depthwise_conv2d_backward";
constexpr const char* kTransposed = "depthwise_conv_transpose2d";

Tensor split_multiplier(const Tensor& t, int64_t multiplier) {  // (N, C * M, H, W) -> (M, N, C, H, W), a view
  const Tensor grouped = torch::stable::reshape(t, Ints{t.size(0), t.size(1) / multiplier, multiplier, t.size(2), t.size(3)});
  // No permute: the headers have it from torch 2.14 on.
  return torch::stable::transpose(torch::stable::transpose(grouped, 1, 2), 0, 1);
}

// Its row is null where the phases run one by one, each a forward problem.
const Plan& backward_input_plan(const CpuProblem& p) {
  return plan_for<Plan>(Op::kDepthwise, Pass::kBackwardInput, p, 0,
                        [&](const IsaKernels& isa, const Machine& here) { return plan_backward_input(p, isa, here); });
}

// Channels-last tensor number m of a contiguous (M, N, H, W, C) buffer.
Tensor channels_last_stack(const Tensor& like, int64_t multiplier, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Tensor stack = empty_buffer(kBackward, like, {multiplier, n, h, w, c}, like.scalar_type());
  return torch::stable::transpose(torch::stable::transpose(stack, 2, 4), 3, 4);
}

// (N, C, H, W) -> (N, C * M, H, W), both channels_last.
Tensor repeat_channels(const Tensor& x, int64_t multiplier) {
  const Tensor repeated = fresh_output(kBackward, x, {x.size(0), x.size(1) * multiplier, x.size(2), x.size(3)}, Layout::kNHWC);
  char* const to = static_cast<char*>(repeated.mutable_data_ptr());
  const int64_t height = x.size(2), row_bytes = repeated.stride(2) * x.element_size();
  parallel_for(0, x.size(0) * height, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(row_bytes, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t n = row / height, y = row % height;
                   repeated_rows(x, n, multiplier).write(y, y + 1, to + row * row_bytes);
                 }
               });
  return repeated;
}

struct PhasePair {
  Phase h, w;
  int64_t first_h, first_w;
};

std::vector<PhasePair> input_phases(const ConvolutionShape& s) {
  std::vector<PhasePair> phases;
  for (int64_t a = 0; a < std::min(s.stride_h, s.in_h); ++a) {
    const Phase h = input_phase(a, s.in_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
    for (int64_t b = 0; b < std::min(s.stride_w, s.in_w); ++b) {
      phases.push_back({h, input_phase(b, s.in_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w), a, b});
    }
  }
  return phases;
}

// Problem of the whole gradient: grad_output in, grad_input out, the forward pass's filter.
CpuProblem gradient_problem(const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& grad_input) {
  CpuProblem p = forward_problem(s, layout);
  p.depth = s.multiplier;
  std::swap(p.in_h, p.out_h);
  std::swap(p.in_w, p.out_w);
  p.in_stride_m = grad.stride(0), p.in_stride_n = grad.stride(1), p.in_stride_c = grad.stride(2);
  p.in_stride_h = grad.stride(3), p.in_stride_w = grad.stride(4);
  set_output(p, grad_input);
  return p;
}

CpuProblem with_activation(CpuProblem p, const Activation& activation) {
  p.activation = activation;
  return p;
}

// What a transposed convolution does to its sums: an input gradient has neither.
struct Epilogue {
  const void* bias = nullptr;  // one value a channel, of the tensors' type
  Activation activation;
};

const void* packed_bias(const Epilogue& epilogue, const ConvolutionShape& s, int64_t pitch) {
  if (epilogue.bias == nullptr) return nullptr;
  void* const packed = workspace(Workspace::kDepthwiseBias, pitch * accumulate_size(s.dtype));
  pack_bias(s.dtype, epilogue.bias, s.channels, 1, 0, pitch, packed);
  return packed;
}

// One phase as a forward problem over the whole gradient.
void run_phase_alone(const ConvolutionShape& s, const CpuProblem& whole, const PhasePair& phase, const Tensor& grad,
                     const Tensor& weight, const Tensor& grad_input, const Epilogue& epilogue) {
  const DType dtype = whole.dtype;
  DepthwiseArgs args;
  CpuProblem& p = args.problem;
  p = whole;
  p.stride_h = p.stride_w = 1;
  p.out_h = phase.h.size, p.out_w = phase.w.size;
  p.kernel_h = phase.h.taps.count, p.kernel_w = phase.w.taps.count;
  p.dilation_h = phase.h.dilation, p.dilation_w = phase.w.dilation;
  p.pad_h = phase.h.pad, p.pad_w = phase.w.pad;
  const int64_t first = phase.first_h * p.out_stride_h + phase.first_w * p.out_stride_w;
  p.out_stride_h *= s.stride_h;
  p.out_stride_w *= s.stride_w;
  for (const Piece& piece : pieces_of(CpuProblem(p))) {
    p = piece.problem;
    args.input = offset(static_cast<const char*>(grad.const_data_ptr()), piece.first_in * p.in_stride_w, dtype);
    args.output = offset(static_cast<char*>(grad_input.mutable_data_ptr()), first + piece.first_out * p.out_stride_w, dtype);
    const Plan& plan = forward_plan(p);
    log_plan(p, plan);
    const int64_t weights = s.multiplier * p.kernel_h * p.kernel_w * plan.weight_pitch;
    void* const packed = workspace(Workspace::kDepthwiseWeight, weights * accumulate_size(dtype));
    pack_depthwise(dtype, weight.const_data_ptr(), packing_for(s, plan, phase.h.taps, phase.w.taps), 0, s.multiplier, packed);
    args.weight = packed;
    args.bias = packed_bias(epilogue, s, plan.weight_pitch);
    args.weight_pitch = plan.weight_pitch;
    args.rows_per_tile = plan.rows_per_tile;
    set_prefetch(plan, &p);
    run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->depthwise(args, scratch, tiles); });
  }
}

// One axis of the input gradient, without the outputs that padding alone reaches; the first of those left.
int64_t crop_outputs(int64_t in, int64_t kernel, int64_t* stride, int64_t* pad, int64_t dilation, int64_t* out) {
  const Axis axis = {in, kernel, *out, *stride, *pad, dilation};
  const int64_t first = outputs_of_tap(axis, kernel - 1).first, last = outputs_of_tap(axis, 0).last;
  *out = std::max<int64_t>(last - first + 1, 0);
  *pad -= first * *stride;
  if (*out <= 1) *stride = 1;
  return first;
}

void backward_input(ConvolutionShape s, Layout layout, Tensor grad, const Tensor& weight, const Tensor& grad_input,
                    const Epilogue& epilogue = {}) {
  // A stride beyond the image is a phase for each of its pixels; mostly one output is all that reads it.
  if (s.stride_h > std::max(s.in_h, kMostUnchanged)) {
    const int64_t first = crop_outputs(s.in_h, s.kernel_h, &s.stride_h, &s.pad_h, s.dilation_h, &s.out_h);
    if (s.out_h > 0) grad = torch::stable::narrow(grad, 3, first, s.out_h);
  }
  if (s.stride_w > std::max(s.in_w, kMostUnchanged)) {
    const int64_t first = crop_outputs(s.in_w, s.kernel_w, &s.stride_w, &s.pad_w, s.dilation_w, &s.out_w);
    if (s.out_w > 0) grad = torch::stable::narrow(grad, 4, first, s.out_w);
  }
  if (s.out_h == 0 || s.out_w == 0) {
    if (epilogue.bias == nullptr) {  // all activations leave zero as it is
      Tensor zeros = grad_input;
      torch::stable::zero_(zeros);
      return;
    }
    s.out_h = grad.size(3), s.out_w = grad.size(4);
    s.stride_h = s.stride_w = 1;
    const CpuProblem problem = with_activation(gradient_problem(s, layout, grad, grad_input), epilogue.activation);
    const PhasePair no_taps = {{{}, 1, 0, s.in_h}, {{}, 1, 0, s.in_w}, 0, 0};
    return run_phase_alone(s, problem, no_taps, grad, weight, grad_input, epilogue);
  }
  const std::vector<PhasePair> phases = input_phases(s);
  const CpuProblem problem = with_activation(gradient_problem(s, layout, grad, grad_input), epilogue.activation);
  const bool strided = s.stride_h * s.stride_w > 1;
  static const Plan one_phase;
  const Plan& plan = strided ? backward_input_plan(problem) : one_phase;
  if (plan.row == nullptr) {
    for (const PhasePair& phase : phases) run_phase_alone(s, problem, phase, grad, weight, grad_input, epilogue);
    return;
  }
  log_plan(problem, plan);
  BackwardInputArgs args;
  args.problem = problem;
  args.input = grad.const_data_ptr();
  args.output = grad_input.mutable_data_ptr();
  args.weight_pitch = plan.weight_pitch;
  args.rows_per_tile = plan.rows_per_tile;
  set_prefetch(plan, &args.problem);
  // Each tap belongs to one phase: together the phases' weights are as many as the filter's.
  const int64_t unit = accumulate_size(s.dtype);
  char* packed = static_cast<char*>(
      workspace(Workspace::kDepthwiseWeight, s.multiplier * s.kernel_h * s.kernel_w * plan.weight_pitch * unit));
  std::vector<InputPhase> list;
  for (const PhasePair& phase : phases) {
    pack_depthwise(s.dtype, weight.const_data_ptr(), packing_for(s, plan, phase.h.taps, phase.w.taps), 0, s.multiplier, packed);
    list.push_back({phase.first_h, phase.first_w, phase.h.size, phase.w.size, phase.h.taps.count, phase.w.taps.count,
                    phase.h.dilation, phase.w.dilation, phase.h.pad, phase.w.pad, packed});
    packed += s.multiplier * phase.h.taps.count * phase.w.taps.count * plan.weight_pitch * unit;
  }
  args.bias = packed_bias(epilogue, s, plan.weight_pitch);
  args.phases = list.data();
  args.phase_count = static_cast<int64_t>(list.size());
  run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->backward_input(args, scratch, tiles); });
}

const Plan& backward_weight_plan(const CpuProblem& p, const ForcedRow& row) {
  const auto make = [&](const IsaKernels& isa, const Machine& here) { return plan_backward_weight(p, isa, here); };
  return plan_for<Plan>(Op::kDepthwise, Pass::kBackwardWeight, p, 0, make, row);
}

// row and timed: the tuner's.
void backward_weight(const ConvolutionShape& s, Layout layout, const Tensor& grad, const Tensor& input, Tensor* grad_weight,
                     Tensor* grad_bias, const ForcedRow& row, const std::string& timed) {
  const int64_t multiplier = s.multiplier;
  const int64_t taps = s.kernel_h * s.kernel_w;
  const int64_t unit = element_size(s.dtype);
  BackwardWeightArgs args;
  args.problem = forward_problem(s, layout);
  set_input(args.problem, input);
  CpuProblem& p = args.problem;
  p.out_stride_n = grad.stride(1), p.out_stride_c = grad.stride(2), p.out_stride_h = grad.stride(3),
  p.out_stride_w = grad.stride(4);
  const std::vector<Piece> pieces = pieces_of(p);
  int64_t parts = 0;
  for (const Piece& piece : pieces) parts += backward_weight_plan(piece.problem, row).parts;
  const int64_t sums = s.channels * accumulate_size(s.dtype);  // bytes of a part's, for each tap
  char* const partial = grad_weight ? static_cast<char*>(workspace(Workspace::kPartial, parts * sums * taps)) : nullptr;
  char* const partial_bias = grad_bias ? static_cast<char*>(workspace(Workspace::kPartialBias, parts * sums)) : nullptr;
  for (int64_t m = 0; m < multiplier; ++m) {
    int64_t before = 0;
    for (const Piece& piece : pieces) {
      const Plan& plan = backward_weight_plan(piece.problem, row);
      if (m == 0) log_plan(piece.problem, plan, 0, timed);
      p = piece.problem;
      args.parts = plan.parts;
      args.rows_per_tile = plan.rows_per_tile;
      set_prefetch(plan, &p);
      args.input = offset(static_cast<const char*>(input.const_data_ptr()), piece.first_in * p.in_stride_w, s.dtype);
      args.grad_output =
          offset(static_cast<const char*>(grad.const_data_ptr()), m * grad.stride(0) + piece.first_out * p.out_stride_w, s.dtype);
      args.partial = partial != nullptr ? partial + before * sums * taps : nullptr;
      args.partial_bias = partial_bias != nullptr ? partial_bias + before * sums : nullptr;
      run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->backward_weight(args, scratch, tiles); });
      before += plan.parts;
    }
    if (grad_weight) {
      reduce_parts(s.dtype, partial, parts, s.channels, taps,
                   static_cast<char*>(grad_weight->mutable_data_ptr()) + m * taps * unit, multiplier * taps);
    }
    if (grad_bias) {
      reduce_parts(s.dtype, partial_bias, parts, s.channels, 1, static_cast<char*>(grad_bias->mutable_data_ptr()) + m * unit,
                   multiplier);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                             const Ints stride, const Ints padding, const Ints dilation,
                                                             const std::vector<bool> output_mask) {
  const ConvolutionShape s = check_convolution(kBackward, input, "weight", weight, stride, padding, dilation);
  check_output_like(kBackward, "grad_output", grad_output, input, s);
  check_mask(kBackward, output_mask);
  const int64_t out_channels = s.channels * s.multiplier;
  const Layout layout = layout_of(input);
  const auto vector = [&](int64_t size) { return empty_buffer(kBackward, input, {size}, input.scalar_type()); };
  const Ints weight_size = {out_channels, 1, s.kernel_h, s.kernel_w};
  Tensor grad_weight = output_mask[1] ? empty_output(kBackward, input, weight_size, Layout::kNCHW) : vector(0);
  Tensor grad_bias = vector(output_mask[2] ? out_channels : 0);
  // The large one is allocated last and filled at once (workspace.h).
  const auto new_grad_input = [&] {
    return output_mask[0] ? fresh_output(kBackward, input, {s.batch, s.channels, s.in_h, s.in_w}, layout) : vector(0);
  };
  if (s.batch == 0) {  // sums over nothing
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {new_grad_input(), grad_weight, grad_bias};
  }
  const Tensor dy = as_layout(grad_output, layout);
  const Tensor grad = split_multiplier(dy, s.multiplier);
  const bool repeat = s.multiplier > 1 && layout == Layout::kNHWC;
  const Tensor w = dense(weight);
  const auto weight_by_us = [&](const ForcedRow& row, const std::string& timed) {
    const Tensor x = as_layout(input, layout);
    backward_weight(repeat ? without_multiplier(s) : s, layout, repeat ? split_multiplier(dy, 1) : grad,
                    repeat ? repeat_channels(x, s.multiplier) : x, output_mask[1] ? &grad_weight : nullptr,
                    output_mask[2] ? &grad_bias : nullptr, row, timed);
  };
  const auto input_by_us = [&] {
    Tensor split = grad;
    if (repeat) {
      split = channels_last_stack(input, s.multiplier, s.batch, s.channels, s.out_h, s.out_w);
      torch::stable::copy_(split, grad);
    }
    const Tensor grad_input = new_grad_input();
    backward_input(s, layout, split, w, grad_input);
    return grad_input;
  };

  FoundWay<Way> for_input, for_weight;
  const CpuProblem p = forward_problem(s, layout);
  const auto by_torch = [&](bool to_input, bool to_weight) {
    return torch_convolution_backward(dy, input, w, TorchConvolution(s),
                                      {to_input, to_weight && output_mask[1], to_weight && output_mask[2]});
  };
  if (tuner().settings() != 0) {
    const bool dense_grad = is_dense(dy, layout);
    if (output_mask[0]) {
      for_input = tune(
          Pass::kBackwardInput, p, s.multiplier, {.view = !dense_grad}, torch_has(s),
          [] { return static_cast<const KernelRow*>(nullptr); },
          [&](const Way& way) { way.torch ? void(by_torch(true, false)) : void(input_by_us()); });
    }
    if (output_mask[1]) {
      for_weight = tune(
          Pass::kBackwardWeight, p, s.multiplier, {.bias = output_mask[2], .view = !dense_grad || !is_dense(input, layout)},
          torch_has(s), [&] { return backward_weight_plan(repeat ? forward_problem(without_multiplier(s), layout) : p, {}).row; },
          [&](const Way& way) { way.torch ? void(by_torch(false, true)) : weight_by_us(way.row, {}); });
    }
  }
  Tensor grad_input;
  if (for_input.way.torch || for_weight.way.torch) {
    const auto theirs = by_torch(for_input.way.torch, for_weight.way.torch);
    if (for_input.way.torch) {
      grad_input = as_output(std::get<0>(theirs), {s.batch, s.channels, s.in_h, s.in_w}, layout);
      log_plan("", Op::kDepthwise, Pass::kBackwardInput, p, 0, kTorchWay + for_input.times);
    }
    if (for_weight.way.torch) {
      grad_weight = as_output(std::get<1>(theirs), weight_size, Layout::kNCHW);
      if (output_mask[2]) grad_bias = std::get<2>(theirs);
      log_plan("", Op::kDepthwise, Pass::kBackwardWeight, p, 0, kTorchWay + for_weight.times);
    }
  }
  if ((output_mask[1] || output_mask[2]) && !for_weight.way.torch) weight_by_us(for_weight.way.row, for_weight.times);
  if (!for_input.way.torch) grad_input = output_mask[0] ? input_by_us() : vector(0);
  return {grad_input, grad_weight, grad_bias};
}

// torch's narrow takes no const tensor.
Tensor part(Tensor t, int64_t dim, int64_t start, int64_t length) { return torch::stable::narrow(t, dim, start, length); }

// s: of the convolution whose input gradient this is; its channels are those of the output, of which multiplier == 1 each.
Tensor transposed_by_us(const Tensor& input, const ConvolutionShape& s, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Activation& activation, int64_t multiplier, Layout layout) {
  const Tensor x = as_layout(input, layout);
  const Tensor output = fresh_output(kTransposed, input, {s.batch, s.channels * multiplier, s.in_h, s.in_w}, layout);
  const auto epilogue = [&](const Tensor* b) { return Epilogue{b != nullptr ? b->const_data_ptr() : nullptr, activation}; };
  if (multiplier == 1) {
    backward_input(s, layout, split_multiplier(x, 1), weight, output, epilogue(bias ? &*bias : nullptr));
  } else if (layout == Layout::kNCHW) {  // each of a channel's filters over a view of the output
    const Ints size = {s.batch, s.channels, s.in_h, s.in_w};
    const Ints strides = {output.stride(0), multiplier * output.stride(1), output.stride(2), output.stride(3)};
    for (int64_t m = 0; m < multiplier; ++m) {
      const Tensor w = torch::stable::contiguous(part(weight, 1, m, 1));
      Tensor b;
      if (bias) {
        b = torch::stable::contiguous(part(torch::stable::reshape(*bias, {s.channels, multiplier}), 1, m, 1));
      }
      backward_input(s, layout, split_multiplier(x, 1), w, reinterpreted(output, size, strides, m * output.stride(1)),
                     epilogue(bias ? &b : nullptr));
    }
  } else {  // over repeated channels, an image at a time
    ConvolutionShape one = s;
    one.batch = 1, one.channels *= multiplier;
    for (int64_t n = 0; n < s.batch; ++n) {
      const Tensor repeated = repeat_channels(part(x, 0, n, 1), multiplier);
      backward_input(one, layout, split_multiplier(repeated, 1), weight, part(output, 0, n, 1),
                     epilogue(bias ? &*bias : nullptr));
    }
  }
  return output;
}

Tensor depthwise_conv_transpose2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                                  const Ints padding, const Ints output_padding, const Ints dilation, const std::string act,
                                  double slope) {
  const ConvolutionShape s = check_transposed(kTransposed, input, weight, bias, stride, padding, output_padding, dilation);
  const Activation activation = check_activation(kTransposed, "act", act, slope);
  const int64_t multiplier = weight.size(1);
  const Layout layout = layout_of(input);
  const Ints size = {s.batch, s.channels * multiplier, s.in_h, s.in_w};
  if (s.batch == 0) return fresh_output(kTransposed, input, size, layout);
  const Tensor w = dense(weight);
  const std::optional<Tensor> b = bias ? std::optional(dense(*bias)) : std::nullopt;
  const auto by_us = [&] { return transposed_by_us(input, s, w, b, activation, multiplier, layout); };
  if (tuner().settings() == 0 || multiplier > 1) return by_us();

  const TorchConvolution theirs(s.channels, stride, padding, output_padding, dilation);
  const auto by_torch = [&] { return in_torch_forward(input, w, b, theirs, activation, size, layout); };
  const CpuProblem p = forward_problem(s, layout);
  const Extras extras = {.activation = activation, .bias = bias.has_value(), .view = !is_dense(input, layout)};
  const FoundWay<Way> found = tune(
      Pass::kBackwardInput, p, 1, extras, torch_has(activation), [] { return static_cast<const KernelRow*>(nullptr); },
      [&](const Way& way) { way.torch ? by_torch() : by_us(); });
  if (!found.way.torch) return by_us();
  log_plan("", Op::kDepthwise, Pass::kBackwardInput, p, 0, kTorchWay + found.times);
  return by_torch();
}

}  // namespace
}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&dwconv::depthwise_conv2d_backward));
  m.impl("depthwise_conv_transpose2d", TORCH_BOX(&dwconv::depthwise_conv_transpose2d));
}
