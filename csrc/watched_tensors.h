// Whether tensors are still what they were when something was made of them (folded, packed weights).
//
// torch counts writes in Tensor._version, but not all of them: not those through .data, not a fused optimizer's, not another
// process's into shared memory. So besides address, size and version some bytes of each tensor are kept, spread over it, and
// compared, of a small tensor all: a write of the whole tensor is seen, one of a few elements past the version counter may be
// not. The tensors are known by weak references, so that another at the same address is another, and read through Python's
// attributes, so that no build of torch is linked here.
#pragma once

#include <pybind11/pybind11.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"

namespace dwconv {

namespace py = pybind11;

class WatchedTensors {
 public:
  // Dense CPU tensors, and None for one that is absent.
  explicit WatchedTensors(const py::tuple& tensors) {
    for (const py::handle tensor : tensors) tensors_.push_back(tensor.is_none() ? py::object(py::none()) : py::weakref(tensor));
    read_states(tensors, states_);
    read_content(states_, content_);
  }

  bool unchanged(const py::tuple& tensors) const {
    if (tensors.size() != tensors_.size()) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      PyObject* const known = tensors_[i].is_none() ? Py_None : PyWeakref_GET_OBJECT(tensors_[i].ptr());
      if (PyTuple_GET_ITEM(tensors.ptr(), i) != known) return false;
    }
    static thread_local std::vector<State> states;
    static thread_local std::vector<char> content;
    read_states(tensors, states);
    if (states.size() != states_.size() || memcmp(states.data(), states_.data(), states.size() * sizeof(State)) != 0)
      return false;
    read_content(states, content);
    return content == content_;
  }

  static void forget_all() { ++epoch(); }

 private:
  struct State {
    int64_t address, bytes, version;
  };
  static constexpr int64_t kSamples = 16, kBytes = 16;
  static constexpr int64_t kSmall = 8192;  // of these all bytes are compared: BatchNorm's statistics move without their version

  // Moved on by forget_all; a part of every state.
  static int64_t& epoch() {
    static int64_t epoch = 0;
    return epoch;
  }

  static int64_t integer(PyObject* owned) {
    const py::object number = py::reinterpret_steal<py::object>(owned);
    if (!number) throw py::error_already_set();
    const int64_t value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  static void read_states(const py::tuple& tensors, std::vector<State>& states) {
    static PyObject* const version = PyUnicode_InternFromString("_version");
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const nbytes = PyUnicode_InternFromString("nbytes");
    states.assign(1, {epoch(), 0, reinterpret_cast<int64_t>(selected_isa().name)});
    for (const py::handle tensor : tensors) {
      if (tensor.is_none()) {
        states.push_back({0, 0, -1});
        continue;
      }
      states.push_back({integer(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)),
                        integer(PyObject_GetAttr(tensor.ptr(), nbytes)), integer(PyObject_GetAttr(tensor.ptr(), version))});
    }
  }

  // The first and the last bytes, and some between at equal distances.
  static void read_content(const std::vector<State>& states, std::vector<char>& content) {
    size_t all = 0;
    for (size_t i = 1; i < states.size(); ++i) all += states[i].bytes <= kSmall ? states[i].bytes : kSamples * kBytes;
    content.resize(all);
    char* to = content.data();
    for (size_t i = 1; i < states.size(); ++i) {
      const char* const from = reinterpret_cast<const char*>(states[i].address);
      const int64_t bytes = states[i].bytes;
      if (bytes <= kSmall) {
        if (bytes > 0) memcpy(to, from, bytes);
        to += bytes;
        continue;
      }
      for (int64_t s = 0; s < kSamples; ++s, to += kBytes) memcpy(to, from + (bytes - kBytes) * s / (kSamples - 1), kBytes);
    }
  }

  std::vector<py::object> tensors_;
  std::vector<State> states_;
  std::vector<char> content_;
};

}  // namespace dwconv
