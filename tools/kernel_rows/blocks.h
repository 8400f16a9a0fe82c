// The other kernels, as csrc/cpu/ops/{separable,pointwise,batch_norm,squeeze_excitation,layer_norm,depthwise_step}.cpp run them.
#pragma once

#include "cpu/kernels/batch_norm/batch_norm_channel.h"
#include "depthwise.h"

namespace dwconv {
namespace {

// A fused block, or where `pointwise` its second stage alone.
bool check_separable(const Case& on, int64_t out_channels, bool pointwise, Check* check) {
  SeparableArgs args;
  CpuProblem& p = args.depthwise.problem;
  Shape shape = on.shape;
  if (pointwise) shape = {shape.batch, shape.channels, shape.h, shape.w, 1, 1, 1, 1, 1, 1, 0, 0};
  p = problem_of(shape, on.row.dtype, on.row.layout);
  if (!pointwise) p.activation = on.activation;
  const Machine here = machine(1);
  const SeparablePlan plan =
      pointwise ? plan_pointwise(p, out_channels, on.isa, here) : plan_separable(p, out_channels, on.isa, here);
  if (plan.whole.row != &on.row) return false;
  const int64_t taps = p.kernel_h * p.kernel_w, channels = p.channels, pixels = outputs_of(p) / channels;
  const PointwiseFormat& product = plan.whole.row->pointwise;
  const BlockFormat format =
      block_format(on.isa, p.dtype, product, channels, out_channels, pointwise ? 0 : p.kernel_h, pointwise ? 0 : p.kernel_w);
  const Input x(p.dtype, inputs_of(p)), dw(p.dtype, channels * taps), dw_bias(p.dtype, channels);
  const Input pw(p.dtype, out_channels * channels), pw_bias(p.dtype, out_channels), residual(p.dtype, pixels * out_channels);
  const Memory packed(round_up(block_bytes(format), 64)), output(pixels * out_channels * element_size(p.dtype));
  pack_block(format, p.dtype,
             {pointwise ? nullptr : dw.data(), pointwise ? nullptr : dw_bias.data(), pw.data(), pw_bias.data(), nullptr},
             packed.data());
  const BlockWeights w = packed_weights(format, packed.data());
  args.depthwise.input = x.data();
  if (!pointwise) {
    args.depthwise.weight = plan.depthwise.row->weight_order == Layout::kNHWC ? w.dw_weight : w.dw_weight_planes;
    args.depthwise.bias = w.dw_bias;
    args.depthwise.weight_pitch = plan.depthwise.weight_pitch;
    args.depthwise_kernel = plan.depthwise.row->depthwise;
  }
  args.out_channels = out_channels, args.pw_weight = w.pw_weight, args.pw_bias = w.pw_bias;
  args.residual = residual.data(), args.output = output.data();
  args.activation = {ActivationKind::kRelu6, 0};
  args.rows_per_tile = plan.whole.rows_per_tile, args.splits = plan.splits;
  set_prefetch(plan.whole, &p);
  run(plan.whole, [&](void* scratch, Tiles tiles) { plan.whole.row->separable(args, scratch, tiles); });

  Values middle = x.values, middle_bounds(x.values.size(), 0);
  if (!pointwise) {
    std::tie(middle, middle_bounds) = expected(correlation(p, x, dw, dw_bias), p.activation, p.dtype);
    for (size_t i = 0; i < middle.size(); ++i) {
      if (element_size(product.dtype) == 2) middle_bounds[i] += roundoff(product.dtype) * fabs(middle[i]);
    }
  }
  CpuProblem q = p;
  q.channels = out_channels;
  set_strides(&q);
  Values values(outputs_of(q)), bounds(outputs_of(q));
  for_outputs(q, [&](int64_t at, int64_t n, int64_t c, int64_t y, int64_t column) {
    Sum sum;
    sum.add(pw_bias[c], 1);
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t from = n * p.out_stride_n + k * p.out_stride_c + y * p.out_stride_h + column * p.out_stride_w;
      sum.add(middle[from], pw[c * channels + k], middle_bounds[from]);
    }
    values[at] = activated(sum.value, args.activation) + residual[at];
    bounds[at] = sum.bound(p.dtype) + sums_roundoff(p.dtype) * fabs(values[at]);
  });
  check->compare(on.name + (pointwise ? " pointwise" : ""), p.dtype, output.data(), values, bounds);
  return true;
}

// The kernels' calls, with constants of the reference's sums: the ops' own joining is not the kernels'.
template <class A>
bool check_batch_norm(const Case& on, Check* check) {
  BatchNormArgs args;
  CpuProblem& p = args.problem;
  p = problem_of({on.shape.batch, on.shape.channels, on.shape.h, on.shape.w, 1, 1, 1, 1, 1, 1, 0, 0}, on.row.dtype,
                 on.row.layout);
  p.activation = {ActivationKind::kRelu, 0};
  const bool backward = on.row.pass == Pass::kBackward, last = p.layout == Layout::kNHWC;
  const Plan plan = plan_batch_norm(p, backward, on.isa, machine(1));
  if (plan.row != &on.row) return false;
  const DType wide = accumulate_dtype(p.dtype);
  const int64_t channels = p.channels, unit = sizeof(A), count = outputs_of(p) / channels, pitch = channels + 16;
  const Input x(p.dtype, outputs_of(p)), grad(p.dtype, outputs_of(p)), weight(wide, channels), bias(wide, channels);
  const Memory output(outputs_of(p) * element_size(p.dtype)), mean(channels * unit), variance(channels * unit);
  const Memory grad_weight(channels * unit), grad_bias(channels * unit), constants(5 * pitch * unit);
  const Memory partial(plan.parts * 2 * channels * static_cast<int64_t>(sizeof(double)));
  args.eps = 1e-5, args.input = x.data(), args.grad_output = backward ? grad.data() : nullptr, args.output = output.data();
  args.weight = weight.data(), args.bias = bias.data(), args.mean = mean.data(), args.variance = variance.data();
  args.grad_weight = grad_weight.data(), args.grad_bias = grad_bias.data();
  args.parts = plan.parts, args.partial = static_cast<double*>(partial.data()), args.constants_pitch = pitch;
  std::vector<Moments> moments(channels);
  for_outputs(p,
              [&](int64_t at, int64_t, int64_t c, int64_t, int64_t) { moments[c].mean += x[at] / static_cast<double>(count); });
  for_outputs(p,
              [&](int64_t at, int64_t, int64_t c, int64_t, int64_t) { moments[c].squares += pow(x[at] - moments[c].mean, 2); });
  std::vector<ChannelConstants<A>> known(channels);
  for (int64_t c = 0; c < channels; ++c) {
    moments[c].count = count;
    known[c] = forward_constants<A>(args, c, moments[c]);
  }
  const auto set_constants = [&] {
    memset(constants.data(), 0, 5 * pitch * unit);
    for (int64_t c = 0; c < channels; ++c) {
      const A values[] = {known[c].mean, known[c].scale, known[c].bias, known[c].slope, known[c].offset};
      for (int64_t i = 0; i < 5; ++i) static_cast<A*>(constants.data())[i * pitch + c] = values[i];
    }
    args.constants = constants.data();
  };
  const auto call = [&] { run(plan, [&](void* scratch, Tiles tiles) { plan.row->batch_norm(args, scratch, tiles); }); };
  const double u = sums_roundoff(p.dtype);
  std::vector<Sum> sums(channels), products(channels);
  Values values(outputs_of(p)), bounds(outputs_of(p));
  const auto normalized = [&](int64_t at, int64_t c) { return (x[at] - known[c].mean) * known[c].scale + known[c].bias; };
  for_outputs(p, [&](int64_t at, int64_t, int64_t c, int64_t, int64_t) {
    const double z = normalized(at, c), g = z > 0 ? grad[at] : 0;
    sums[c].add(g, 1), products[c].add(g, x[at] - static_cast<double>(known[c].mean), u * fabs(x[at]));
    values[at] = fmax(z, 0), bounds[at] = 4 * u * static_cast<double>(count) * (1 + fabs(z) + fabs(known[c].scale));
  });
  const auto compare_sums = [&](const Values& first, const Values& second) {  // what the parts add up to
    Values got(2 * channels);
    for (int64_t part = 0; part < plan.parts; ++part) {
      for (int64_t i = 0; i < 2 * channels; ++i) got[i] += args.partial[part * 2 * channels + i];
    }
    Values wanted = first, near;
    wanted.insert(wanted.end(), second.begin(), second.end());
    for (double value : wanted) near.push_back(8 * u * static_cast<double>(count) * (1 + fabs(value)));
    check->compare(on.name + " sums", DType::kFloat64, got.data(), wanted, near);
  };
  if (last) {
    set_constants();
    args.wants_sums = true;
    call();
    args.wants_sums = false;
    Values first, second;
    for (int64_t c = 0; c < channels; ++c) {
      first.push_back(backward ? sums[c].value : moments[c].mean);
      second.push_back(backward ? products[c].value : moments[c].squares);
    }
    if (plan.parts == 1 || backward) compare_sums(first, second);
  }
  for (int64_t c = 0; backward && c < channels; ++c) {
    GradSums all;
    all.grad = sums[c].value, all.product = products[c].value;
    backward_constants<A>(args, c, all, &known[c]);
  }
  if (last) set_constants();
  call();
  if (backward) {
    for_outputs(p, [&](int64_t at, int64_t, int64_t c, int64_t, int64_t) {
      const double g = normalized(at, c) > 0 ? grad[at] : 0, scale = known[c].scale;
      values[at] = scale * g + known[c].slope * (x[at] - static_cast<double>(known[c].mean)) + known[c].offset;
      bounds[at] = 16 * u * static_cast<double>(count) * (1 + fabs(scale) * (1 + fabs(x[at])));
    });
  }
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  return true;
}

bool check_squeeze(const Case& on, Check* check) {
  SqueezeArgs args;
  CpuProblem& p = args.problem;
  p = problem_of({on.shape.batch, on.shape.channels, on.shape.h, on.shape.w, 1, 1, 1, 1, 1, 1, 0, 0}, on.row.dtype,
                 on.row.layout);
  p.activation = on.activation;
  args.squeezed = 7;
  const SqueezePlan plan = plan_squeeze(p, args.squeezed, on.isa, machine(1));
  if (plan.means.row != &on.row) return false;
  const int64_t channels = p.channels, unit = accumulate_size(p.dtype), count = p.in_h * p.in_w;
  const Input x(p.dtype, inputs_of(p)), reduce(p.dtype, args.squeezed * channels), expand(p.dtype, args.squeezed * channels);
  const Input reduce_bias(p.dtype, args.squeezed), expand_bias(p.dtype, channels);
  args.hidden_pitch = round_up(args.squeezed, kMostLanes);
  const Memory mean(p.batch * channels * unit), hidden(p.batch * args.hidden_pitch * unit);
  const Memory output(p.batch * channels * element_size(p.dtype));
  args.input = x.data(), args.reduce_weight = reduce.data(), args.reduce_bias = reduce_bias.data();
  args.expand_weight = expand.data(), args.expand_bias = expand_bias.data();
  args.mean = mean.data(), args.hidden = hidden.data(), args.output = output.data();
  const Plan* const stages[] = {&plan.means, &plan.hidden, &plan.gates};
  for (int32_t stage = 0; stage < 3; ++stage) {
    args.stage = static_cast<SqueezeStage>(stage);
    run(*stages[stage], [&](void* scratch, Tiles tiles) { plan.means.row->squeeze(args, scratch, tiles); });
  }
  std::vector<Sum> means(p.batch * channels);
  for_outputs(p, [&](int64_t at, int64_t n, int64_t c, int64_t, int64_t) {
    means[n * channels + c].add(x[at], 1.0 / static_cast<double>(count));
  });
  Values values, bounds;
  for (int64_t n = 0; n < p.batch; ++n) {
    Values layer(args.squeezed), layer_bounds(args.squeezed);
    for (int64_t s = 0; s < args.squeezed; ++s) {
      Sum sum;
      sum.add(reduce_bias[s], 1);
      for (int64_t c = 0; c < channels; ++c) {
        const Sum& its = means[n * channels + c];
        sum.add(its.value, reduce[s * channels + c], its.bound(p.dtype));
      }
      layer[s] = activated(sum.value, p.activation), layer_bounds[s] = activated_bound(sum.value, sum.bound(p.dtype), p.dtype);
    }
    for (int64_t c = 0; c < channels; ++c) {
      Sum sum;
      sum.add(expand_bias[c], 1);
      for (int64_t s = 0; s < args.squeezed; ++s) sum.add(layer[s], expand[s * channels + c], layer_bounds[s]);
      values.push_back(1 / (1 + exp(-sum.value))), bounds.push_back(activated_bound(0, sum.bound(p.dtype), p.dtype));
    }
  }
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  return true;
}

bool check_layer_norm(const Case& on, Check* check) {
  LayerNormArgs args;
  CpuProblem& p = args.problem;
  p = problem_of({on.shape.batch, on.shape.channels, on.shape.h, on.shape.w, 1, 1, 1, 1, 1, 1, 0, 0}, on.row.dtype,
                 on.row.layout);
  const Plan plan = plan_layer_norm(p, on.isa, machine(1));
  if (plan.row != &on.row) return false;
  const DType wide = accumulate_dtype(p.dtype);
  const Input x(p.dtype, inputs_of(p)), weight(wide, p.channels), bias(wide, p.channels);
  const Memory output(outputs_of(p) * element_size(p.dtype));
  args.eps = 1e-2, args.input = x.data(), args.weight = weight.data(), args.bias = bias.data(), args.output = output.data();
  args.rows_per_tile = plan.rows_per_tile;
  run(plan, [&](void* scratch, Tiles tiles) { plan.row->layer_norm(args, scratch, tiles); });
  Values values(outputs_of(p)), bounds(outputs_of(p));
  const double channels = static_cast<double>(p.channels);
  for (int64_t pixel = 0; pixel < outputs_of(p); pixel += p.channels) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < p.channels; ++c) mean += x[pixel + c] / channels;
    for (int64_t c = 0; c < p.channels; ++c) variance += pow(x[pixel + c] - mean, 2) / channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      values[pixel + c] = (x[pixel + c] - mean) / sqrt(variance + args.eps) * weight[c] + bias[c];
      bounds[pixel + c] = (channels + 8) * sums_roundoff(p.dtype) * 20;
    }
  }
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  return true;
}

bool check_step(const Case& on, Check* check) {
  StepArgs args;
  CpuProblem& p = args.problem;
  p.dtype = p.out_dtype = on.row.dtype;
  p.batch = on.shape.batch, p.channels = on.shape.channels;
  p.in_h = p.in_w = p.out_h = p.out_w = p.kernel_h = 1, p.kernel_w = 4, p.dilation_w = on.shape.dilation_w;
  p.in_stride_n = p.channels, p.in_stride_c = 1;
  p.activation = on.activation;
  const Plan plan = plan_step(p, on.isa, machine(1));
  if (plan.row != &on.row) return false;
  const int64_t window = 3 * p.dilation_w, count = p.batch * p.channels;
  const Input x(p.dtype, count), state(p.dtype, count * window), weight(p.dtype, p.channels * 4), bias(p.dtype, p.channels);
  const Memory output(count * element_size(p.dtype));
  args.input = x.data(), args.state = state.memory.data(), args.weight = weight.data(), args.bias = bias.data();
  args.state_stride_w = 1, args.state_stride_c = window, args.state_stride_n = p.channels * window;
  args.output = output.data();
  run(plan, [&](void* scratch, Tiles tiles) { plan.row->step(args, scratch, tiles); });
  std::vector<Sum> sums(count);
  Values kept;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i % p.channels;
    sums[i].add(bias[c], 1);
    for (int64_t k = 0; k < 3; ++k) sums[i].add(state[i * window + k * p.dilation_w], weight[c * 4 + k]);
    sums[i].add(x[i], weight[c * 4 + 3]);
    for (int64_t k = 1; k < window; ++k) kept.push_back(state[i * window + k]);
    kept.push_back(x[i]);
  }
  const auto [values, bounds] = expected(sums, p.activation, p.dtype);
  check->compare(on.name, p.dtype, output.data(), values, bounds);
  check->compare(on.name + " state", p.dtype, state.data(), kept, Values(kept.size()));
  return true;
}

}  // namespace
}  // namespace dwconv
