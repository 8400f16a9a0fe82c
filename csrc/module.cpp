// The Python module _C: what was built, what this CPU runs, the kernel table and the plans. Torch-free; loading it also
// registers the CPU ops, whose registration lives in the same library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "build_facts.h"  // which setup.py writes
#include "common/activation.h"
#include "common/describe.h"
#include "cpu/plan/long_row.h"
#include "cpu/plan/plan.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/cpu_features.h"
#include "cpu/runtime/pack_weights.h"
#include "cpu/runtime/watched_tensors.h"
#include "cpu/runtime/workspace.h"
#include "cpu/runtime/x86_features.h"

namespace dwconv {
namespace {

py::dict row_dict(const KernelRow& row) {
  py::dict d = row_facts(row);
  d["isa"] = isa_name(row.isa);
  d["vector_bytes"] = row.vector_bytes;
  return d;
}

py::list kernel_table() {
  py::list rows;
  for (const IsaKernels& isa : supported_isas()) {
    for (const KernelTable& table : isa.tables) {
      for (int32_t i = 0; i < table.count; ++i) rows.append(row_dict(table.rows[i]));
    }
  }
  return rows;
}

py::dict plan_dict(const Plan& plan) {
  py::dict d = row_dict(*plan.row);
  d["rows_per_tile"] = plan.rows_per_tile;
  d["tiles"] = plan.tiles;
  d["parts"] = plan.parts;
  d["workers"] = plan.workers;
  d["scratch_bytes"] = plan.scratch_bytes;
  d["bytes"] = plan.bytes;
  d["flops"] = plan.flops;
  d["reason"] = plan.reason;
  return d;
}

// A depthwise pass that runs once for each filter of a channel: the input, compulsory, counts once.
Plan times(Plan plan, const CpuProblem& p, int64_t multiplier) {
  const int64_t weights = p.channels * p.kernel_h * p.kernel_w;
  plan.bytes += (multiplier - 1) * (output_bytes(p) + weights * element_size(p.dtype));
  plan.flops *= multiplier;
  plan.reason += "; " + std::to_string(multiplier) + " times, once for each filter of a channel";
  return plan;
}

// As csrc/cpu/ops/depthwise.cpp runs it. No row: the input gradient runs as forward problems, one a phase.
Plan plan_depthwise(CpuProblem p, Pass pass, int64_t multiplier, const IsaKernels& isa, const Machine& here) {
  if (pass == Pass::kBackwardInput) {
    p.depth = multiplier;
    std::swap(p.in_h, p.out_h);
    std::swap(p.in_w, p.out_w);
    return plan_backward_input(p, isa, here);
  }
  const bool repeated = multiplier > 1 && p.layout == Layout::kNHWC;
  if (repeated) p.channels *= multiplier;
  if (repeated && pass == Pass::kForward) return plan_forward_repeated(p, multiplier, isa, here);
  const auto plan_of = [&](const CpuProblem& q) {
    return pass == Pass::kForward ? plan_forward(q, isa, here) : plan_backward_weight(q, isa, here);
  };
  Plan plan = plan_of(p);
  if (const std::vector<Piece> pieces = pieces_of(p); pieces[0].problem.out_w != p.out_w) {  // of most of a long row
    const auto outputs = [](const Piece& a, const Piece& b) {
      return a.problem.out_h * a.problem.out_w < b.problem.out_h * b.problem.out_w;
    };
    Plan most = plan_of(std::max_element(pieces.begin(), pieces.end(), outputs)->problem);
    most.bytes = plan.bytes, most.flops = plan.flops;
    plan = most;
  }
  return multiplier > 1 && !repeated ? times(plan, p, multiplier) : plan;
}

// As the ops run it: the way that the tuner has found, where it has.
std::optional<py::dict> depthwise_dict(const CpuProblem& p, Pass pass, int64_t multiplier, bool bias, const IsaKernels& isa,
                                       Machine here) {
  const Plan planned = plan_depthwise(p, pass, multiplier, isa, here);
  const auto described = [](const Plan& plan) { return plan.row == nullptr ? std::nullopt : std::optional(plan_dict(plan)); };
  if (tuner().settings() == 0 || here.forced.name != nullptr) return described(planned);
  const Extras extras = {.bias = bias && pass != Pass::kBackwardInput};
  const std::optional<Choice> choice = tuner().find(subject(pass, p, multiplier, extras, isa, here));
  if (!choice) return described(planned);
  const std::string timed = "timed: " + choice->times;
  for (const auto& [way, name] : ways(pass, p, pass == Pass::kBackwardInput ? nullptr : planned.row, true, isa)) {
    if (name != choice->way) continue;
    here.forced = way.row;
    std::optional<py::dict> found = described(plan_depthwise(p, pass, multiplier, isa, here));
    if (way.torch) {
      if (!found) found = plan_dict(plan_forward(p, isa, here));  // of the pass's size; its kernels are its phases'
      (*found)["pass"] = pass_name(pass);
      set_torch(*found, timed);
    } else if (found) {
      (*found)["reason"] = py::cast<std::string>((*found)["reason"]) + "; " + timed;
    }
    return found;
  }
  return described(planned);
}

// The plan of one op on contiguous tensors; `threads` as torch would be given. None where a pass has none of its own.
std::optional<py::dict> plan(const std::string& op, const std::string& pass, const std::string& dtype, const std::string& layout,
                             int64_t batch, int64_t channels, Pair in_size, Pair kernel, Pair stride, const Paddings& padding,
                             Pair dilation, int64_t out_channels, int64_t multiplier, int64_t threads, bool bias) {
  CpuProblem p;
  describe_problem(p, dtype, layout, batch, channels, in_size, kernel, stride, padding, dilation);
  const Machine here = machine(threads);
  p.l1_ways = here.l1_ways();
  const IsaKernels& isa = selected_isa();
  if (op == op_name(Op::kSeparable)) return plan_dict(plan_separable(p, out_channels, isa, here).whole);
  if (op == op_name(Op::kPointwise)) return plan_dict(plan_pointwise(p, out_channels, isa, here).whole);
  if (op == op_name(Op::kPatch)) {
    CpuProblem patches = p;
    patches.channels *= p.kernel_h * p.kernel_w;
    return plan_dict(plan_patches(patches, channels, out_channels, isa, here).product.whole);
  }
  if (op == op_name(Op::kInvertedResidual)) {  // multiplier: how many times wider the expanded image is
    CpuProblem block = p;
    block.channels *= multiplier;
    const InvertedPlan found = plan_inverted_residual(block, channels, out_channels, isa, here);
    return found.fused ? std::optional(plan_dict(found.block.whole)) : std::nullopt;
  }
  if (op == op_name(Op::kBatchNorm))
    return plan_dict(plan_batch_norm(p, parse_pass(pass, {Pass::kForward, Pass::kBackward}) == Pass::kBackward, isa, here));
  if (op == op_name(Op::kSqueezeExcitation)) return plan_dict(plan_squeeze(p, out_channels, isa, here).means);
  if (op == op_name(Op::kLayerNorm)) return plan_dict(plan_layer_norm(p, isa, here));
  if (op != op_name(Op::kDepthwise))
    throw py::value_error(
        "op: expected depthwise_conv2d, separable_conv2d, pointwise_conv2d, patch_conv2d, inverted_residual, batch_norm_act, "
        "squeeze_excitation or layer_norm2d, got '" +
        op + "'");
  const Pass which = parse_pass(pass, {Pass::kForward, Pass::kBackwardInput, Pass::kBackwardWeight});
  return depthwise_dict(p, which, multiplier, bias, isa, here);
}

}  // namespace
}  // namespace dwconv

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace dwconv;
  selected_isa();  // a bad DWCONV_EXT_ISA fails here, at import, while nothing is registered: another import may follow
  m.doc() = "dwconv_ext's compiled half: build facts, CPU features, kernel table and plans.";
  m.attr("build_torch") = DWCONV_BUILD_TORCH;
  m.attr("build_cuda") = DWCONV_BUILD_CUDA;
  m.attr("build_compiler") = "gcc-compatible " __VERSION__;
  py::dict activations;
  for (const ActivationName& activation : kActivationNames) activations[activation.name] = static_cast<int>(activation.kind);
  m.attr("activations") = activations;
  m.def("cpu_flags", &cpu_flags, "Instruction sets the kernels could use, as the CPU reports and the system allows them.");
#if defined(__x86_64__)
  m.def(
      "x86_isa",
      [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_edx, uint32_t leaf7_1_eax, uint64_t xcr0, bool tiles_permitted) {
        const X86Answers said = {leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax, xcr0};
        return py::make_tuple(isa_name(widest_x86_isa(said, [&] { return tiles_permitted; })), x86_flags(said));
      },
      "The widest set and the flags of an x86-64 CPU that says this of itself; for tests.", py::kw_only(), py::arg("leaf1_ecx"),
      py::arg("leaf7_ebx"), py::arg("leaf7_edx"), py::arg("leaf7_1_eax"), py::arg("xcr0"), py::arg("tiles_permitted"));
#endif
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const IsaKernels& isa : supported_isas()) names.push_back(isa.name);
    return names;
  });
  m.def("selected_isa", [] { return std::string(selected_isa().name); });
  m.def("select_isa", &select_isa, "Forces one of supported_isas(); for tests.");
  m.def(
      "pointwise_format",
      [](const std::string& dtype) {
        const PointwiseFormat format = pointwise_format(selected_isa(), parse_dtype(dtype));
        return py::make_tuple(format.panel, format.depth_multiple, dtype_name(format.dtype));
      },
      "Packed pointwise weights: output channels of a panel, what its channels are padded to a multiple of, and the dtype.");
  m.def(
      "block_bytes",
      [](const std::string& dtype, int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w) {
        const DType type = parse_dtype(dtype);
        return block_bytes(block_format(selected_isa(), type, pointwise_format(selected_isa(), type), channels, out_channels,
                                        kernel_h, kernel_w));
      },
      "Of the packed weights of a fused block.");
  py::class_<WatchedTensors>(m, "WatchedTensors",
                             "Whether tensors are still what they were (csrc/cpu/runtime/watched_tensors.h).")
      .def(py::init<const py::tuple&>(), py::arg("tensors"))
      .def("unchanged", &WatchedTensors::unchanged, "Whether these are the same tensors with the same content.",
           py::arg("tensors"));
  m.def("force_row", &force_row,
        "Uses the row of this name, filter and stride where it fits, until called with an empty name; for tests.",
        py::arg("name"), py::arg("filter") = 0, py::arg("stride") = 0);
  m.def("set_prefetch_threshold", &set_prefetch_threshold,
        "Plans as if only smaller inputs could be in a cache near by, until called with -1; for tests and measurements.",
        py::arg("bytes"));
  m.def(
      "clear_memory",
      [] {
        thread_arena().clear();
        clear_workspaces();
      },
      "Gives back this thread's memory of what lies between steps, and all threads' working memory.");
  m.def("cache_bytes", [] { return std::make_tuple(machine(1).l1_bytes, machine(1).l2_bytes, machine(1).l3_bytes); });
  m.def("kernel_table", &kernel_table, "Every kernel this CPU can run, one dict a row of csrc/cpu/kernels.inc.");
  m.def("plan", &plan, py::arg("op"), py::arg("pass_"), py::arg("dtype"), py::arg("layout"), py::arg("batch"),
        py::arg("channels"), py::arg("in_size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("out_channels") = 0, py::arg("multiplier") = 1, py::arg("threads") = 1, py::arg("bias") = false);
  define_tuner(m);
}
