// Whether tensors are still what they were when something was made of them (folded, packed weights).
//
// torch counts writes in Tensor._version, but not all of them: not those through .data, not a fused optimizer's, not another
// process's into shared memory. So besides address, size and version some bytes of each tensor are kept, spread over it, and
// compared, of a small tensor all: a write of the whole tensor is seen, one of a few elements past the version counter may be
// not. Of a tensor of several dimensions strides and dtype are compared too: .data may be given another view of the same
// memory. A tensor is known by its object; a weak reference to its storage tells when another may have come to the same address
// (one to the tensor itself would forbid torch.utils.swap_tensors). They are read through Python's attributes, so that no build
// of torch is linked here.
#pragma once

#include <pybind11/pybind11.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/runtime/cpu_features.h"

namespace dwconv {

namespace py = pybind11;

class __attribute__((visibility("hidden"))) WatchedTensors {
 public:
  // Dense CPU tensors, and None for one that is absent.
  explicit WatchedTensors(const py::tuple& tensors) {
    for (const py::handle tensor : tensors) {
      tensors_.push_back(tensor.ptr());
      if (tensor.is_none()) continue;
      storages_.push_back(py::weakref(tensor.attr("untyped_storage")()));
      if (py::cast<int64_t>(tensor.attr("dim")()) > 1)
        views_.push_back({tensor.ptr(), tensor.attr("stride")(), tensor.attr("dtype")});
    }
    read_states(tensors, states_);
    sampled(states_, [this](const char* content, int64_t bytes) {
      content_.insert(content_.end(), content, content + bytes);
      return true;
    });
  }

  bool unchanged(const py::tuple& tensors) const {
    if (tensors.size() != tensors_.size()) return false;
    for (size_t i = 0; i < tensors.size(); ++i)
      if (PyTuple_GET_ITEM(tensors.ptr(), i) != tensors_[i]) return false;
    for (const py::weakref& storage : storages_)
      if (PyWeakref_GET_OBJECT(storage.ptr()) == Py_None) return false;
    for (const View& view : views_)
      if (!view.is_same()) return false;
    static thread_local std::vector<State> states;
    try {
      read_states(tensors, states);
    } catch (py::error_already_set&) {  // an inference tensor, which has no version, at a watched one's place
      return false;
    }
    if (states.size() != states_.size() || memcmp(states.data(), states_.data(), states.size() * sizeof(State)) != 0)
      return false;
    const char* known = content_.data();
    return sampled(states_, [&known](const char* content, int64_t bytes) {
      const bool equal = memcmp(known, content, bytes) == 0;
      known += bytes;
      return equal;
    });
  }

 private:
  struct State {
    int64_t address, bytes, version;
  };
  static constexpr int64_t kSamples = 16, kBytes = 16;
  static constexpr int64_t kSmall = 8192;  // of these all bytes are compared: BatchNorm's statistics move without their version

  static int64_t integer(PyObject* owned) {
    const py::object number = py::reinterpret_steal<py::object>(owned);
    if (!number) throw py::error_already_set();
    const int64_t value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  // torch.Tensor's own attributes, looked up once.
  struct Attributes {
    PyObject *data_ptr, *nbytes, *version, *stride, *dtype;

    Attributes() {
      const py::object tensor = py::module_::import("torch").attr("Tensor");
      data_ptr = py::object(tensor.attr("data_ptr")).release().ptr();
      nbytes = py::object(tensor.attr("nbytes")).release().ptr();
      version = py::object(tensor.attr("_version")).release().ptr();
      stride = py::object(tensor.attr("stride")).release().ptr();
      dtype = py::object(tensor.attr("dtype")).release().ptr();
    }
    static PyObject* object(PyObject* attribute, PyObject* tensor) {
      return Py_TYPE(attribute)->tp_descr_get(attribute, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
    }
    static int64_t get(PyObject* attribute, PyObject* tensor) { return integer(object(attribute, tensor)); }
  };
  static const Attributes& attributes() {
    static const Attributes* const the_attributes = new Attributes;
    return *the_attributes;
  }

  // With its bytes, strides and dtype tell a dense tensor's shape.
  struct View {
    PyObject* tensor;
    py::object strides, dtype;

    bool is_same() const {
      const Attributes& of = attributes();
      const py::object now = py::reinterpret_steal<py::object>(PyObject_CallOneArg(of.stride, tensor));
      const py::object its_dtype = py::reinterpret_steal<py::object>(Attributes::object(of.dtype, tensor));
      if (!now || !its_dtype) throw py::error_already_set();
      return its_dtype.is(dtype) && now.equal(strides);
    }
  };

  static void read_states(const py::tuple& tensors, std::vector<State>& states) {
    const Attributes& of = attributes();
    states.assign(1, {0, 0, reinterpret_cast<int64_t>(selected_isa().name)});
    for (const py::handle tensor : tensors) {
      if (tensor.is_none())
        states.push_back({0, 0, -1});
      else
        states.push_back({integer(PyObject_CallOneArg(of.data_ptr, tensor.ptr())), Attributes::get(of.nbytes, tensor.ptr()),
                          Attributes::get(of.version, tensor.ptr())});
    }
  }

  // use(content, bytes) of what is compared, until it returns false: all of a small tensor, of others the first and the last
  // bytes and some between at equal distances.
  template <class Use>
  static bool sampled(const std::vector<State>& states, Use use) {
    for (size_t i = 1; i < states.size(); ++i) {
      const char* const content = reinterpret_cast<const char*>(states[i].address);
      const int64_t bytes = states[i].bytes;
      if (bytes == 0) continue;
      if (bytes <= kSmall) {
        if (!use(content, bytes)) return false;
        continue;
      }
      for (int64_t s = 0; s < kSamples; ++s)
        if (!use(content + (bytes - kBytes) * s / (kSamples - 1), kBytes)) return false;
    }
    return true;
  }

  std::vector<PyObject*> tensors_;  // to compare with, not owned
  std::vector<py::weakref> storages_;
  std::vector<View> views_;
  std::vector<State> states_;
  std::vector<char> content_;
};

}  // namespace dwconv
