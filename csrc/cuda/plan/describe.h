// CUDA's kernel table and plans as Python objects.
#pragma once

#include "common/describe.h"
#include "cuda/plan/inverted.h"
#include "cuda/plan/packed.h"

namespace dwconv::cuda {

inline py::dict row_dict(const KernelRow& row) {
  py::dict d = row_facts(row);
  d["tensor"] = static_cast<int>(row.cores);
  d["aligned"] = row.aligned;
  d["arch"] = std::make_pair(row.first_arch, row.last_arch);
  return d;
}

inline py::list table_list() {
  py::list rows;
  for (const KernelRow* row : kernel_table()) rows.append(row_dict(*row));
  return rows;
}

inline Gpu gpu_from(const py::dict& facts) {
  Gpu m;
  for (const auto& [key, value] : facts) {
    const std::string name = py::cast<std::string>(key);
    if (name == "arch")
      m.arch = py::cast<int32_t>(value);
    else if (name == "sm_count")
      m.sm_count = py::cast<int32_t>(value);
    else if (name == "shared_per_block")
      m.shared_per_block = py::cast<int64_t>(value);
    else if (name == "shared_per_sm")
      m.shared_per_sm = py::cast<int64_t>(value);
    else if (name == "l2_bytes")
      m.l2_bytes = py::cast<int64_t>(value);
    else if (name == "bytes_per_second")
      m.bytes_per_second = py::cast<double>(value);
    else if (name == "clock")
      m.clock = py::cast<double>(value);
    else
      throw py::key_error("gpu: unknown fact '" + name + "'");
  }
  return m;
}

inline void add_plan(py::dict& d, const LaunchPlan& plan) {
  for (const auto& item : row_dict(*plan.launch.row)) d[item.first] = item.second;
  d["blocks"] = plan.launch.blocks;
  d["threads"] = plan.launch.threads;
  d["shared_bytes"] = plan.launch.shared_bytes;
  d["bytes"] = plan.bytes;
  d["flops"] = plan.flops;
  d["expected_seconds"] = plan.seconds;
  d["reason"] = plan.reason;
}

// What the tuner has found for the work, or heuristics; true where it is torch's convolution.
inline bool choose(Work* work, const Gpu& gpu, std::string* why) {
  Forced& forced = work->request.forced;
  if (forced == Forced{} && tuner().settings() != 0) {
    const std::optional<Choice> choice = tuner().find(subject(*work, gpu));
    for (const auto& way : choice ? ways(*work, gpu) : std::vector<NamedWay<Forced>>()) {
      if (way.name == choice->way) forced = way.way, *why = "; timed: " + choice->times;
    }
  }
  if (work->torch && forced.source == Source::kTorch) {
    *why = kTorchWay + *why;
    return true;
  }
  if (forced != Forced{}) return false;
  const FasterInTorch* range = faster_in_torch(*work, gpu);
  if (range != nullptr) *why = describe(*range);
  return range != nullptr;
}

// The plan of one op on contiguous, aligned tensors, for a GPU of the given facts (an H100 by default).
inline py::dict plan_dict(const std::string& op, const std::string& pass, const std::string& dtype, const std::string& layout,
                          int64_t batch, int64_t channels, Pair in_size, Pair kernel, Pair stride, const Paddings& padding,
                          Pair dilation, int64_t out_channels, int64_t multiplier, bool allow_tf32, const py::dict& facts,
                          bool bias, const std::string& act) {
  Work work = {Op::kDepthwise, parse_pass(pass, {Pass::kForward, Pass::kBackwardInput, Pass::kBackwardWeight}), Pass::kForward};
  work.kernel_pass = work.pass;
  for (const Op each : {Op::kSeparable, Op::kInvertedResidual}) work.op = op == op_name(each) ? each : work.op;
  if (op != op_name(work.op))
    throw py::value_error("op: expected depthwise_conv2d, separable_conv2d or inverted_residual, got '" + op + "'");
  Request& request = work.request;
  DepthwiseProblem& p = request.problem;
  describe_problem(p, dtype, layout, batch, channels, in_size, kernel, stride, padding, dilation);
  const bool nhwc = p.layout == Layout::kNHWC, to_input = work.pass == Pass::kBackwardInput;
  request.multiplier = multiplier;
  request.allow_tf32 = allow_tf32;
  const int64_t values = 16 / element_size(p.dtype);
  const int64_t unit = element_size(p.dtype);
  const int32_t aligned = nhwc ? whole_runs({channels * unit}) : whole_runs({p.in_w * unit, p.out_w * unit});
  request.aligned = !nhwc || aligned == 16 ? aligned : 0;
  work.torch = work.op != Op::kInvertedResidual;
  if (!parse_activation(act.c_str(), &work.extras.activation.kind))
    throw py::value_error("act: unknown activation '" + act + "'");
  work.extras.bias = bias && !to_input;
  Work both = work;  // of the backward pass
  both.pass = Pass::kBackward;
  if (to_input) turn_to_input(&work);
  const auto strides = [&](int64_t c, int64_t h, int64_t w, int64_t& n_, int64_t& c_, int64_t& h_, int64_t& w_) {
    n_ = c * h * w, c_ = nhwc ? 1 : h * w, h_ = nhwc ? c * w : w, w_ = nhwc ? c : 1;
  };
  strides(!to_input ? channels : channels * multiplier, p.in_h, p.in_w, p.in_stride_n, p.in_stride_c, p.in_stride_h,
          p.in_stride_w);
  strides(to_input ? channels : channels * multiplier, p.out_h, p.out_w, p.out_stride_n, p.out_stride_c, p.out_stride_h,
          p.out_stride_w);
  if (work.op == Op::kSeparable) {
    work.out_channels = out_channels;
    work.alignment = {nhwc && channels % values == 0, channels % values == 0, nhwc && out_channels % values == 0,
                      channels % values == 0, nhwc ? 0 : request.aligned};
    request.aligned = 0;
    work.extras.last_activation = work.extras.activation, work.extras.last_bias = bias;
    p.activation = work.extras.activation;
  }
  const Gpu gpu = gpu_from(facts);
  std::string why;
  bool torch = choose(&work, gpu, &why);
  if (!torch && work.pass != Pass::kForward && request.forced == Forced{}) {
    torch = choose(&both, gpu, &why);
    if (torch) why += "; where both gradients are wanted";
  }
  py::dict d;
  if (work.op == Op::kSeparable) {
    const SeparablePlan plan = plan_separable(request, out_channels, work.alignment, gpu);
    add_plan(d, plan.block);
    d["fused"] = plan.fused;
    d["tile"] = std::make_pair(plan.block_args.tile_rows, plan.block_args.tile_w);
    d["splits"] = plan.block_args.splits;
    d["bytes"] = plan.bytes;
    d["flops"] = plan.flops;
    d["reason"] = plan.reason;
  } else if (work.op == Op::kInvertedResidual) {  // multiplier: how many times wider the expanded image is
    p.channels *= multiplier;
    request.multiplier = 1;
    const SeparableAlignment alignment = {nhwc && channels % values == 0, false, nhwc && out_channels % values == 0,
                                          channels * multiplier % values == 0};
    const InvertedPlan plan = plan_inverted_residual(request, channels, out_channels, alignment, gpu);
    if (plan.block.launch.row != nullptr) add_plan(d, plan.block);
    d["fused"] = plan.fused;
    d["tile"] = std::make_pair(plan.args.block.tile_rows, plan.args.block.tile_w);
    d["bytes"] = plan.bytes;
    d["flops"] = plan.flops;
    d["reason"] = plan.reason;
  } else if (work.pass == Pass::kBackwardWeight) {
    BackwardWeightTileArgs args;
    add_plan(d, plan_backward_weight(request, gpu, &args));
    d["tile"] = std::make_pair(args.tiling.tile_h, args.tiling.tile_w);
    d["slab"] = args.tiling.slab;
    d["parts"] = args.parts;
  } else {
    DepthwiseTileArgs args;
    add_plan(d, plan_depthwise(work.kernel_pass, request, gpu, &args));
    d["tile"] = std::make_pair(args.tiling.tile_h, args.tiling.tile_w);
    d["slab"] = args.tiling.slab;
  }
  if (torch) {
    set_torch(d, why);
  } else if (!why.empty()) {
    d["reason"] = py::cast<std::string>(d["reason"]) + why;
  }
  return d;
}

// Uses row number `index` of the table wherever it fits; -1: none.
inline void force_row(int64_t index) {
  if (index >= static_cast<int64_t>(kernel_table().size())) throw py::index_error("row: the table has fewer rows");
  forced().row = index < 0 ? nullptr : kernel_table()[index];
}

inline void force_fusion(const std::string& how) {
  if (how != "by_cost" && how != "always" && how != "never")
    throw py::value_error("fusion: expected by_cost, always or never, got '" + how + "'");
  forced().fusion = how == "by_cost" ? Fusion::kByCost : how == "always" ? Fusion::kAlways : Fusion::kNever;
}

inline void define_plans(py::module_& m) {
  m.def("kernel_table", &table_list, "Every CUDA kernel, one dict a row of csrc/cuda/kernels.inc.");
  m.def(
      "plan", &plan_dict, py::arg("op"), py::arg("pass_"), py::arg("dtype"), py::arg("layout"), py::arg("batch"),
      py::arg("channels"), py::arg("in_size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("out_channels") = 0, py::arg("multiplier") = 1, py::arg("allow_tf32") = false, py::arg("gpu") = py::dict(),
      py::arg("bias") = false, py::arg("act") = "identity",
      "The plan of one op on contiguous tensors; gpu: facts that differ from an H100's; bias and act: of a block both. Its name "
      "is \"torch\" where torch's own convolution runs.");
  define_tuner(m);
  m.def(
      "force_source",
      [](const std::string& source) {
        if (source != "heuristics" && source != "ours" && source != "torch")
          throw py::value_error("source: expected heuristics, ours or torch, got '" + source + "'");
        forced().source = source == "ours" ? Source::kOurs : source == "torch" ? Source::kTorch : Source::kHeuristics;
      },
      "heuristics; ours: never torch's own convolution; torch: it wherever it can be; for tests and measurements.");
  m.def(
      "block_bytes",
      [](const std::string& dtype, int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w) {
        return PackedPlaces(parse_dtype(dtype), channels, out_channels, kernel_h, kernel_w).end;
      },
      "Of the packed weights of a fused block; of a pointwise convolution with a filter of 0x0.");
  m.def("force_row", &force_row, "Uses this row of the table wherever it fits, until called with -1; for tests.");
  m.def(
      "force_rank", [](int32_t rank) { forced().rank = std::max(rank, 0); },
      "Uses the tile of this rank by the cost model, cheapest first, until called with 0; for tests and for measuring the "
      "model.");
  m.def("force_fusion", &force_fusion, "by_cost, always or never; for tests.");
}

}  // namespace dwconv::cuda
