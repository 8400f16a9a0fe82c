// depthwise_conv2d on the CPU: checks, output allocation, problem, plan, launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/depthwise_parts.h"

namespace dwconv {
namespace {

constexpr const char* kForward = "depthwise_conv2d";

// The forward pass over repeated channels (plan_forward_repeated).
void run_repeated(const Plan& plan, const DepthwiseArgs& args, const Tensor& x, int64_t multiplier) {
  const CpuProblem& p = args.problem;
  const int64_t reach = (p.kernel_h - 1) * p.dilation_h + 1;
  const int64_t row_tiles = ceil_div(p.out_h, plan.rows_per_tile);
  run_tiles(plan, [&](void* scratch, Tiles tiles) {
    for (int64_t tile; next_tile(tiles, &tile);) {
      const int64_t n = tile / row_tiles, y = tile % row_tiles * plan.rows_per_tile;
      DepthwiseArgs piece = args;
      CpuProblem& q = piece.problem;
      q.batch = 1;
      q.out_h = std::min(plan.rows_per_tile, p.out_h - y);
      const int64_t top = y * p.stride_h - p.pad_h;
      const int64_t first = std::min(std::max<int64_t>(top, 0), p.in_h);
      const int64_t last = std::max(std::min(top + (q.out_h - 1) * p.stride_h + reach, p.in_h), first);
      q.in_h = last - first;
      q.pad_h = first - top;
      repeated_rows(x, n, multiplier).write(first, last, static_cast<char*>(scratch));
      piece.input = scratch;
      piece.output = offset(static_cast<char*>(args.output), n * p.out_stride_n + y * p.out_stride_h, p.dtype);
      piece.rows_per_tile = q.out_h;
      plan.row->depthwise(piece, nullptr, one_tile());
    }
  });
}

}  // namespace

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation, const std::string act, double slope) {
  ConvolutionShape s = check_convolution(kForward, input, "weight", weight, stride, padding, dilation);
  check_output(kForward, input, s, s.channels * s.multiplier, padding);
  if (bias) check_vector(kForward, "bias", *bias, s.channels * s.multiplier, input);
  const Activation activation = check_activation(kForward, "act", act, slope);
  const Layout layout = layout_of(input);
  const Ints size = {s.batch, s.channels * s.multiplier, s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(input, size, layout);

  const Tensor x = as_layout(input, layout);
  const int64_t repeats = layout == Layout::kNHWC ? s.multiplier : 1;
  if (repeats > 1) s = without_multiplier(s);
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
  DepthwiseArgs args;
  args.problem = forward_problem(s, layout);
  args.problem.activation = activation;
  set_input(args.problem, x);
  if (repeats > 1) args.problem.in_stride_w = s.channels, args.problem.in_stride_h = s.in_w * s.channels;  // as run_repeated's
  const Plan& plan = forward_plan(args.problem, repeats);
  log_plan(args.problem, plan);
  const DepthwisePacking packing = packing_for(s, plan, {0, 1, s.kernel_h}, {0, 1, s.kernel_w});
  const int64_t unit = accumulate_size(s.dtype);
  void* const packed = workspace(Workspace::kDepthwiseWeight, s.kernel_h * s.kernel_w * plan.weight_pitch * unit);
  void* const packed_bias = bias ? workspace(Workspace::kDepthwiseBias, plan.weight_pitch * unit) : nullptr;
  args.weight_pitch = plan.weight_pitch;
  args.rows_per_tile = plan.rows_per_tile;
  set_prefetch(plan, &args.problem);
  args.input = x.const_data_ptr();
  args.weight = packed;
  args.bias = packed_bias;
  // Allocated last: what is allocated after it and lives on can make the allocator put the next output elsewhere (workspace.h).
  const Tensor output = fresh_output(input, size, layout);
  set_output(args.problem, output);
  args.problem.out_stride_c *= s.multiplier;
  for (int64_t m = 0; m < s.multiplier; ++m) {
    pack_depthwise(s.dtype, w.const_data_ptr(), packing, m, 1, packed);
    if (bias) pack_bias(s.dtype, b.const_data_ptr(), s.channels, s.multiplier, m, plan.weight_pitch, packed_bias);
    args.output = offset(static_cast<char*>(output.mutable_data_ptr()), m * output.stride(1), s.dtype);
    if (repeats > 1) {
      run_repeated(plan, args, x, repeats);
    } else {
      run_tiles(plan, [&](void* scratch, Tiles tiles) { plan.row->depthwise(args, scratch, tiles); });
    }
  }
  return output;
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) { m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::depthwise_conv2d)); }
