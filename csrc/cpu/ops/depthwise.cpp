// depthwise_conv2d on the CPU, with weights as the modules keep them and packed: checks, output allocation, problem, plan,
// launch.
#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/stable/library.h>

#include "cpu/ops/calls.h"
#include "cpu/ops/depthwise_parts.h"
#include "cpu/ops/packed.h"
#include "cpu/ops/tune.h"

namespace dwconv {
namespace {

constexpr const char* kForward = "depthwise_conv2d";
constexpr const char* kPack = "depthwise_conv2d_pack";
constexpr const char* kPacked = "depthwise_conv2d_packed";

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

struct Filters {
  const void *weight, *bias;
};

// The convolution of an image with weights(problem, plan, m), number m of each channel's filters in the order of the plan's
// kernel; row and timed: the tuner's.
template <class Weights>
Tensor convolve(const Tensor& input, ConvolutionShape s, const Activation& activation, Weights weights, const ForcedRow& row = {},
                const std::string& timed = {}) {
  const Layout layout = layout_of(input);
  const Ints size = {s.batch, s.channels * s.multiplier, s.out_h, s.out_w};
  if (s.batch == 0) return fresh_output(kForward, input, size, layout);

  const Tensor x = as_layout(input, layout);
  const int64_t repeats = layout == Layout::kNHWC ? s.multiplier : 1;
  if (repeats > 1) s = without_multiplier(s);
  DepthwiseArgs args;
  args.problem = forward_problem(s, layout);
  args.problem.activation = activation;
  set_input(args.problem, x);
  if (repeats > 1) args.problem.in_stride_w = s.channels, args.problem.in_stride_h = s.in_w * s.channels;  // as run_repeated's
  const std::vector<Piece> pieces = repeats > 1 ? std::vector<Piece>{{args.problem}} : pieces_of(args.problem);
  const Plan* plan = &forward_plan(pieces[0].problem, repeats, row);
  Filters filters = weights(s, *plan, 0);
  // Allocated last: what is allocated after it and lives on can make the allocator put the next output elsewhere (workspace.h).
  const Tensor output = fresh_output(kForward, input, size, layout);
  for (const Piece& piece : pieces) {
    const bool first = &piece == pieces.data();
    if (!first) plan = &forward_plan(piece.problem, repeats, row);
    log_plan(piece.problem, *plan, 0, timed);
    args.problem = piece.problem;
    args.weight_pitch = plan->weight_pitch;
    args.rows_per_tile = plan->rows_per_tile;
    set_prefetch(*plan, &args.problem);
    set_output(args.problem, output);
    // Segments, which may be the whole row.
    if (piece.problem.out_w != s.out_w) args.problem.out_stride_h = piece.problem.out_w * output.stride(3);
    args.problem.out_stride_c *= s.multiplier;
    args.input = offset(static_cast<const char*>(x.const_data_ptr()), piece.first_in * args.problem.in_stride_w, s.dtype);
    for (int64_t m = 0; m < s.multiplier; ++m) {
      if (!first || m > 0) filters = weights(s, *plan, m);
      args.weight = filters.weight, args.bias = filters.bias;
      args.output = offset(static_cast<char*>(output.mutable_data_ptr()),
                           m * output.stride(1) + piece.first_out * output.stride(3), s.dtype);
      if (repeats > 1) {
        run_repeated(*plan, args, x, repeats);
      } else {
        run_tiles(*plan, [&](void* scratch, Tiles tiles) { plan->row->depthwise(args, scratch, tiles); });
      }
    }
  }
  return output;
}

// Number m of each channel's filters, of contiguous ones of `dtype` as depthwise_conv2d's; bias: null where there is none.
Filters packed_now(const ConvolutionShape& s, const Plan& plan, DType dtype, const void* weight, const void* bias, int64_t m) {
  const int64_t unit = accumulate_size(s.dtype);
  void* const packed = workspace(Workspace::kDepthwiseWeight, s.kernel_h * s.kernel_w * plan.weight_pitch * unit);
  void* const packed_bias = bias != nullptr ? workspace(Workspace::kDepthwiseBias, plan.weight_pitch * unit) : nullptr;
  const DepthwisePacking packing = packing_for(s, plan, {0, 1, s.kernel_h}, {0, 1, s.kernel_w});
  pack_depthwise(dtype, weight, packing, m, 1, packed);
  if (bias != nullptr) pack_bias(dtype, bias, s.channels, s.multiplier, m, plan.weight_pitch, packed_bias);
  return {packed, packed_bias};
}

// Number m of each channel's filters, of those that depthwise_conv2d_pack has packed; in NCHW with a multiplier a copy.
Filters packed_before(const ConvolutionShape& s, const Plan& plan, const BlockWeights& w, int64_t m) {
  if (plan.row->weight_order == Layout::kNHWC && s.multiplier == 1) return {w.dw_weight, w.dw_bias};
  if (s.multiplier == 1) return {w.dw_weight_planes, w.dw_bias};
  const DType wide = s.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return packed_now(s, plan, wide, w.dw_weight_planes, w.dw_bias, m);
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints stride,
                        const Ints padding, const Ints dilation, const std::string act, double slope) {
  const ConvolutionShape s = check_forward(kForward, input, weight, bias, stride, padding, dilation);
  const Activation activation = check_activation(kForward, "act", act, slope);
  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  const auto by_us = [&](const ForcedRow& row, const std::string& timed) {
    const auto weights = [&](const ConvolutionShape& shape, const Plan& plan, int64_t m) {
      return packed_now(shape, plan, shape.dtype, w.const_data_ptr(), bias ? b.const_data_ptr() : nullptr, m);
    };
    return convolve(input, s, activation, weights, row, timed);
  };
  if (tuner().settings() == 0 || s.batch == 0) return by_us({}, {});

  const Layout layout = layout_of(input);
  const Ints size = {s.batch, s.channels * s.multiplier, s.out_h, s.out_w};
  const auto by_torch = [&] { return in_torch_forward(input, w, bias, TorchConvolution(s), activation, size, layout); };
  const Extras extras = {.activation = activation, .bias = bias.has_value(), .view = !is_dense(input, layout)};
  const auto planned_row = [&] {
    const bool repeated = s.multiplier > 1 && layout == Layout::kNHWC;
    return forward_plan(forward_problem(repeated ? without_multiplier(s) : s, layout), repeated ? s.multiplier : 1).row;
  };
  const CpuProblem p = forward_problem(s, layout);
  const FoundWay<Way> found = tune(Pass::kForward, p, s.multiplier, extras, torch_has(s) && torch_has(activation), planned_row,
                                   [&](const Way& way) { way.torch ? by_torch() : by_us(way.row, {}); });
  if (!found.way.torch) return by_us(found.way.row, found.times);
  log_plan("", Op::kDepthwise, Pass::kForward, p, 0, kTorchWay + found.times);
  return by_torch();
}

// A block's first half.
BlockFormat format_of(DType dtype, int64_t filters, int64_t kernel_h, int64_t kernel_w) {
  const IsaKernels& isa = selected_isa();
  return block_format(isa, dtype, pointwise_format(isa, dtype), filters, 0, kernel_h, kernel_w);
}

Tensor depthwise_conv2d_pack(const Tensor& weight, const std::optional<Tensor>& bias, const std::string isa,
                             const std::string input_dtype) {
  check_isa(kPack, isa);
  DWCONV_CHECK(weight.dim() == 4 && weight.numel() > 0 && weight.size(1) == 1, kPack,
               ": weight must have shape (out_channels, 1, kH, kW), but got ", to_string(weight));
  const DType weights = check_dtype(kPack, "weight", weight);
  const DType dtype = packed_dtype(kPack, weights, input_dtype);
  if (bias) check_vector(kPack, "bias", *bias, weight.size(0), weight);
  const BlockFormat format = format_of(dtype, weight.size(0), weight.size(2), weight.size(3));
  return packed_tensor(format, weight,
                       [&](void* packed) { pack(format, weights, weight, bias, std::nullopt, std::nullopt, packed); });
}

}  // namespace

Tensor depthwise_conv2d_packed(const Tensor& input, const Tensor& packed, const Ints filter, int64_t act, double slope) {
  DWCONV_CHECK(input.dim() == 4, kPacked, ": input must be 4-dimensional (N, C, H, W), but got shape ", to_string(input));
  const DType dtype = check_dtype(kPacked, "input", input);
  DWCONV_CHECK(is_activation(act), kPacked, ": act must be an activation's number, but got ", act);
  DWCONV_CHECK(filter.size() == kFilterNumbers, kPacked, ": filter must be 11 integers, but got ", filter.size());
  const int64_t channels = input.size(1), filters = filter[0];
  DWCONV_CHECK(channels > 0 && filters > 0 && filters % channels == 0, kPacked,
               ": filter's out_channels must be a multiple of input's channels, ", channels, ", but got ", filters);
  const BlockFormat wanted =
      check_packed(kPacked, "packed", kPack, packed, dtype, filters, 0, filter[1], filter[2], filter[1] > 0 && filter[2] > 0);
  ConvolutionShape s = check_filter_numbers(kPacked, input, "packed", dtype, filter);
  s.multiplier = filters / channels;
  const BlockWeights w = packed_weights(wanted, packed.const_data_ptr());
  return convolve(input, s, {static_cast<ActivationKind>(act), slope},
                  [&](const ConvolutionShape& shape, const Plan& plan, int64_t m) { return packed_before(shape, plan, w, m); });
}

}  // namespace dwconv

STABLE_TORCH_LIBRARY_IMPL(dwconv_ext, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&dwconv::depthwise_conv2d));
  m.impl("depthwise_conv2d_pack", TORCH_BOX(&dwconv::depthwise_conv2d_pack));
  m.impl("depthwise_conv2d_packed", TORCH_BOX(&dwconv::depthwise_conv2d_packed));
}
