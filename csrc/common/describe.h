// Problems, kernel rows and plans as Python objects, for the modules of both devices.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "common/problem.h"
#include "common/tuner.h"

namespace dwconv {

namespace py = pybind11;
using Pair = std::pair<int64_t, int64_t>;
using Paddings = std::vector<int64_t>;  // height and width, or top, bottom, left, right

inline DType parse_dtype(const std::string& name) {
  for (DType dtype : kDTypes) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got '" + name + "'");
}

// The forward problem of a convolution; all but its strides.
inline void describe_problem(DepthwiseProblem& p, const std::string& dtype, const std::string& layout, int64_t batch,
                             int64_t channels, Pair in_size, Pair kernel, Pair stride, const Paddings& padding, Pair dilation) {
  p.dtype = p.out_dtype = parse_dtype(dtype);
  if (layout != "NCHW" && layout != "channels_last")
    throw py::value_error("layout: expected NCHW or channels_last, got '" + layout + "'");
  p.layout = layout == "NCHW" ? Layout::kNCHW : Layout::kNHWC;
  p.batch = batch, p.channels = channels;
  p.in_h = in_size.first, p.in_w = in_size.second;
  p.kernel_h = kernel.first, p.kernel_w = kernel.second;
  p.stride_h = stride.first, p.stride_w = stride.second;
  p.dilation_h = dilation.first, p.dilation_w = dilation.second;
  if (padding.size() != 2 && padding.size() != 4) throw py::value_error("padding: expected two or four values");
  const size_t ends = padding.size() / 2;  // of an axis
  p.pad_h = padding[0], p.pad_w = padding[ends];
  const int64_t padded_h = p.in_h + p.pad_h + padding[ends - 1], padded_w = p.in_w + p.pad_w + padding[2 * ends - 1];
  if (p.stride_h < 1 || p.stride_w < 1) throw py::value_error("stride: must be positive");
  if (p.dilation_h * (p.kernel_h - 1) >= padded_h || p.dilation_w * (p.kernel_w - 1) >= padded_w)
    throw py::value_error("kernel: larger than the padded input");
  p.out_h = (padded_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_w = (padded_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
}

// One of the passes given, of an op.
inline Pass parse_pass(const std::string& name, std::initializer_list<Pass> known) {
  std::string names;
  for (const Pass& pass : known) {
    if (name == pass_name(pass)) return pass;
    names += (names.empty() ? "" : &pass == known.end() - 1 ? " or " : ", ") + std::string(pass_name(pass));
  }
  throw py::value_error("pass: expected " + names + ", got '" + name + "'");
}

// What the kernel tables of both devices have.
template <class KernelRow>
py::dict row_facts(const KernelRow& row) {
  py::dict d;
  d["name"] = row.name;
  d["op"] = op_name(row.op);
  d["pass"] = pass_name(row.pass);
  d["dtype"] = dtype_name(row.dtype);
  d["layout"] = layout_name(row.layout);
  d["filter"] = row.filter;
  d["stride"] = row.stride;
  return d;
}

// "torch" in the place of a plan's kernel, and why.
inline void set_torch(py::dict& plan, const std::string& why) {
  plan["name"] = kTorchWay;
  plan["reason"] = why;
}

inline void define_tuner(py::module_& m) {
  m.def(
      "set_benchmark", [](bool on, const std::string& file, const std::string& versions) { tuner().set(on, file, versions); },
      "Turns the tuner (csrc/common/tuner.h) on or off.", py::arg("on"), py::arg("file") = "", py::arg("versions") = "");
  m.def(
      "fake_times", [](std::vector<std::pair<std::string, double>> seconds) { tuner().fake(std::move(seconds)); },
      "What the tuner's clock says of ways whose names have these texts, until called with nothing; for tests.",
      py::arg("seconds") = std::vector<std::pair<std::string, double>>());
  m.def(
      "benchmark_choices",
      [] {
        py::list list;
        for (const auto& [subject, choice] : tuner().choices()) {
          list.append(py::dict(py::arg("device") = subject.first, py::arg("problem") = subject.second,
                               py::arg("way") = choice.way, py::arg("times") = choice.times));
        }
        return list;
      },
      "What the tuner has chosen, or read.");
  m.def("timed_runs", [] { return tuner().timed_runs(); }, "How often the tuner has run something; for tests.");
}

}  // namespace dwconv
