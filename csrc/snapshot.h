// Whether anything about Python modules has changed since they were last looked at.
//
// What FusedDSConv keeps (folded and packed weights) and what convert splices in holds only while the modules behind it are as
// they were: same attributes, same parts, no hooks, tensors neither replaced nor written. To look at all that in Python took a
// third of a small block's call.
//
// A snapshot is a tuple, so that Python's garbage collector sees the cycles it is part of (a module keeps one of itself):
//   (module, its type, its __dict__, contents of the __dict__, (a dict in it, its contents), ...) for each module,
//   the tensors, and their versions and addresses behind that of the selected instruction set, as bytes.
// The contents of a dict are its keys and values in turn, held and compared by identity.
#pragma once

#include <pybind11/pybind11.h>
#include <string.h>

#include <vector>

#include "cpu/cpu_features.h"

namespace dwconv {
namespace {

namespace py = pybind11;

struct SnapshotNames {
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* kept = PyUnicode_InternFromString("_kept");
};
inline const SnapshotNames& snapshot_names() {
  static const SnapshotNames names;
  return names;
}

// The attribute in which a module keeps its snapshot: not part of one. Unpickled names need not be interned.
inline bool is_kept(PyObject* key) {
  PyObject* const kept = snapshot_names().kept;
  if (key == kept) return true;
  return PyUnicode_Check(key) && PyUnicode_GET_LENGTH(key) == PyUnicode_GET_LENGTH(kept) && PyUnicode_Compare(key, kept) == 0;
}

// Calls body(key, value) for each item, until one returns false.
template <class Body>
bool each_item(PyObject* dict, Body body) {
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &at, &key, &value)) {
    if (!is_kept(key) && !body(key, value)) return false;
  }
  return true;
}

inline py::tuple contents(PyObject* dict) {
  py::list items;
  each_item(dict, [&](PyObject* key, PyObject* value) {
    items.append(py::handle(key));
    items.append(py::handle(value));
    return true;
  });
  return py::tuple(items);
}

inline bool has_contents(PyObject* dict, PyObject* items) {
  const Py_ssize_t count = PyTuple_GET_SIZE(items);
  Py_ssize_t i = 0;
  const bool same = each_item(dict, [&](PyObject* key, PyObject* value) {
    const bool here = i + 1 < count && PyTuple_GET_ITEM(items, i) == key && PyTuple_GET_ITEM(items, i + 1) == value;
    i += 2;
    return here;
  });
  return same && i == count;
}

inline int64_t integer(PyObject* owned) {
  const py::object number = py::reinterpret_steal<py::object>(owned);
  if (!number) throw py::error_already_set();
  const int64_t value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline std::vector<int64_t> tensor_states(PyObject* tensors) {
  const SnapshotNames& names = snapshot_names();
  std::vector<int64_t> states = {reinterpret_cast<int64_t>(selected_isa().name)};
  states.reserve(1 + 2 * PyTuple_GET_SIZE(tensors));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors, i);
    states.push_back(integer(PyObject_GetAttr(tensor, names.version)));
    states.push_back(integer(PyObject_CallMethodNoArgs(tensor, names.data_ptr)));
  }
  return states;
}

inline py::tuple snapshot(const py::list& modules, const py::tuple& tensors) {
  py::list parts;
  for (const py::handle module : modules) {
    const py::object attributes = module.attr("__dict__");
    py::list part;
    part.append(module);
    part.append(py::type::handle_of(module));
    part.append(attributes);
    part.append(contents(attributes.ptr()));
    each_item(attributes.ptr(), [&](PyObject*, PyObject* value) {
      if (PyDict_Check(value)) {
        part.append(py::handle(value));
        part.append(contents(value));
      }
      return true;
    });
    parts.append(py::tuple(part));
  }
  const std::vector<int64_t> states = tensor_states(tensors.ptr());
  return py::make_tuple(py::tuple(parts), tensors,
                        py::bytes(reinterpret_cast<const char*>(states.data()), states.size() * sizeof(int64_t)));
}

inline bool is_current(const py::tuple& snapshot) {
  PyObject* const parts = PyTuple_GET_ITEM(snapshot.ptr(), 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); ++i) {
    PyObject* const part = PyTuple_GET_ITEM(parts, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(part, 0))) != PyTuple_GET_ITEM(part, 1)) return false;
    for (Py_ssize_t d = 2; d < PyTuple_GET_SIZE(part); d += 2) {
      if (!has_contents(PyTuple_GET_ITEM(part, d), PyTuple_GET_ITEM(part, d + 1))) return false;
    }
  }
  const std::vector<int64_t> states = tensor_states(PyTuple_GET_ITEM(snapshot.ptr(), 1));
  PyObject* const before = PyTuple_GET_ITEM(snapshot.ptr(), 2);
  const size_t bytes = states.size() * sizeof(int64_t);
  return static_cast<size_t>(PyBytes_GET_SIZE(before)) == bytes && memcmp(PyBytes_AS_STRING(before), states.data(), bytes) == 0;
}

}  // namespace
}  // namespace dwconv
