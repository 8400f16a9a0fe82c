// The depthwise kernels' three passes, as csrc/cpu/ops/depthwise.cpp and depthwise_backward.cpp run them.
#pragma once

#include "cpu/runtime/input_phase.h"
#include "problems.h"

namespace dwconv {
namespace {

// Each function: false where the plan has another kernel for the problem than the row that is forced.
struct Case {
  const KernelRow& row;
  const IsaKernels& isa;
  Shape shape;
  Activation activation;
  std::string name;
};

bool check_forward(const Case& on, Check* check) {
  DepthwiseArgs args;
  CpuProblem& p = args.problem;
  p = problem_of(on.shape, on.row.dtype, on.row.layout);
  p.activation = on.activation;
  const Machine here = machine(1);
  const Plan plan = plan_forward(p, on.isa, here);
  if (plan.row != &on.row) return false;
  const int64_t taps = p.kernel_h * p.kernel_w, unit = accumulate_size(p.dtype);
  const Input x(p.dtype, inputs_of(p)), weight(p.dtype, p.channels * taps), bias(p.dtype, p.channels);
  const Memory packed(taps * plan.weight_pitch * unit), packed_bias(plan.weight_pitch * unit);
  const Memory output(outputs_of(p) * element_size(p.dtype));
  const FilterSlice rows = {0, 1, p.kernel_h}, columns = {0, 1, p.kernel_w};
  pack_depthwise(p.dtype, weight.data(),
                 {p.channels, 1, p.kernel_h, p.kernel_w, rows, columns, plan.row->weight_order, plan.weight_pitch}, 0, 1,
                 packed.data());
  pack_bias(p.dtype, bias.data(), p.channels, 1, 0, plan.weight_pitch, packed_bias.data());
  args.input = x.data(), args.weight = packed.data(), args.bias = packed_bias.data(), args.output = output.data();
  args.weight_pitch = plan.weight_pitch, args.rows_per_tile = plan.rows_per_tile;
  set_prefetch(plan, &p);
  run(plan, [&](void* scratch, Tiles tiles) { plan.row->depthwise(args, scratch, tiles); });
  const auto [values, bounds] = expected(correlation(p, x, weight, bias), p.activation, p.dtype);
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  return true;
}

bool check_backward_input(const Case& on, Check* check) {
  const CpuProblem forward = problem_of(on.shape, on.row.dtype, on.row.layout);
  BackwardInputArgs args;
  CpuProblem& p = args.problem;
  p = forward;
  std::swap(p.in_h, p.out_h), std::swap(p.in_w, p.out_w);
  set_strides(&p);
  const Plan plan = plan_backward_input(p, on.isa, machine(1));
  if (plan.row != &on.row) return false;
  const int64_t taps = p.kernel_h * p.kernel_w, unit = accumulate_size(p.dtype);
  const Input grad(p.dtype, inputs_of(p)), weight(p.dtype, p.channels * taps);
  const Memory packed(taps * plan.weight_pitch * unit), output(outputs_of(p) * element_size(p.dtype));
  char* at = static_cast<char*>(packed.data());
  std::vector<InputPhase> phases;
  for (int64_t a = 0; a < std::min(p.stride_h, p.out_h); ++a) {
    for (int64_t b = 0; b < std::min(p.stride_w, p.out_w); ++b) {
      const Phase h = input_phase(a, p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
      const Phase w = input_phase(b, p.out_w, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
      pack_depthwise(p.dtype, weight.data(),
                     {p.channels, 1, p.kernel_h, p.kernel_w, h.taps, w.taps, plan.row->weight_order, plan.weight_pitch}, 0, 1,
                     at);
      phases.push_back({a, b, h.size, w.size, h.taps.count, w.taps.count, h.dilation, w.dilation, h.pad, w.pad, at});
      at += h.taps.count * w.taps.count * plan.weight_pitch * unit;
    }
  }
  args.input = grad.data(), args.output = output.data();
  args.phases = phases.data(), args.phase_count = static_cast<int64_t>(phases.size());
  args.weight_pitch = plan.weight_pitch, args.rows_per_tile = plan.rows_per_tile;
  set_prefetch(plan, &p);
  run(plan, [&](void* scratch, Tiles tiles) { plan.row->backward_input(args, scratch, tiles); });
  std::vector<Sum> sums(outputs_of(p));
  for_outputs(forward, [&](int64_t out, int64_t n, int64_t c, int64_t y, int64_t x) {
    for_taps(forward, n, c, y, x, [&](int64_t in, int64_t tap) { sums[in].add(grad[out], weight[c * taps + tap]); });
  });
  const auto [values, bounds] = expected(sums, {}, p.dtype);
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  return true;
}

bool check_backward_weight(const Case& on, Check* check) {
  BackwardWeightArgs args;
  CpuProblem& p = args.problem;
  p = problem_of(on.shape, on.row.dtype, on.row.layout);
  const Plan plan = plan_backward_weight(p, on.isa, machine(1));
  if (plan.row != &on.row) return false;
  const int64_t taps = p.kernel_h * p.kernel_w, sums_bytes = p.channels * accumulate_size(p.dtype);
  const Input x(p.dtype, inputs_of(p)), grad(p.dtype, outputs_of(p));
  const Memory partial(plan.parts * taps * sums_bytes), partial_bias(plan.parts * sums_bytes);
  const int64_t unit = element_size(p.dtype);
  const Memory grad_weight(p.channels * taps * unit), grad_bias(p.channels * unit);
  args.input = x.data(), args.grad_output = grad.data();
  args.partial = partial.data(), args.partial_bias = partial_bias.data();
  args.parts = plan.parts, args.rows_per_tile = plan.rows_per_tile;
  set_prefetch(plan, &p);
  run(plan, [&](void* scratch, Tiles tiles) { plan.row->backward_weight(args, scratch, tiles); });
  reduce_parts(p.dtype, partial.data(), plan.parts, p.channels, taps, grad_weight.data(), taps);
  reduce_parts(p.dtype, partial_bias.data(), plan.parts, p.channels, 1, grad_bias.data(), 1);
  std::vector<Sum> sums(p.channels * taps), bias_sums(p.channels);
  for_outputs(p, [&](int64_t out, int64_t n, int64_t c, int64_t y, int64_t column) {
    bias_sums[c].add(grad[out], 1);
    for_taps(p, n, c, y, column, [&](int64_t in, int64_t tap) { sums[c * taps + tap].add(grad[out], x[in]); });
  });
  const auto [values, bounds] = expected(sums, {}, p.dtype);
  check->compare(on.name, p.dtype, grad_weight.data(), values, bounds);
  const auto [bias_values, bias_bounds] = expected(bias_sums, {}, p.dtype);
  check->compare(on.name + " bias", p.dtype, grad_bias.data(), bias_values, bias_bounds);
  return true;
}

}  // namespace
}  // namespace dwconv
