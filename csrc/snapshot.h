// Whether anything about Python modules has changed since they were last looked at.
//
// What FusedDSConv keeps (folded and packed weights) and what convert splices in holds only while the modules behind it are as
// they were: same attributes, same parts, no hooks, tensors neither replaced nor written. To look at all that in Python took a
// third of a small block's call.
//
// A snapshot is a tuple, so that Python's garbage collector sees the cycles it is part of (a module keeps one of itself):
//   (module, its type, its __dict__, contents of the __dict__, (a dict in it, its contents), ...) for each module,
//   the tensors, their versions and addresses behind that of the selected instruction set, as bytes, and Lines, as bytes.
// The contents of a dict are its keys and values in turn, held and compared by identity.
#pragma once

#include <pybind11/pybind11.h>
#include <string.h>

#include <algorithm>
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

inline py::tuple contents(PyObject* dict) {
  py::list items;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &at, &key, &value)) {
    if (is_kept(key)) continue;
    items.append(py::handle(key));
    items.append(py::handle(value));
  }
  return py::tuple(items);
}

inline bool has_contents(PyObject* dict, PyObject* items) {
  const Py_ssize_t count = PyTuple_GET_SIZE(items);
  Py_ssize_t i = 0, at = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &at, &key, &value)) {
    if (i < count && PyTuple_GET_ITEM(items, i) == key && PyTuple_GET_ITEM(items, i + 1) == value) {
      i += 2;
    } else if (!is_kept(key)) {  // last: it reads the key itself
      return false;
    }
  }
  return i == count;
}

template <class T>
py::bytes as_bytes(const std::vector<T>& numbers) {
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T));
}

// The cache lines that a check reads, as far as they are known: addresses to prefetch, which may be stale.
//
// Between two blocks of a network megabytes go through the caches, and a check's lines, some 300, lie in L3 or memory again.
// Read as they come, most wait for the one before; asked for all at once they come at the rate of the cache.
class Lines {
 public:
  void add(const void* begin, size_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
    for (uintptr_t line = first / kLine; line <= (first + bytes - 1) / kLine; ++line) addresses_.push_back(line * kLine);
  }
  void add_tuple(PyObject* tuple) { add(tuple, sizeof(PyTupleObject) + PyTuple_GET_SIZE(tuple) * sizeof(PyObject*)); }
  void add_dict(PyObject* object) {
    const auto* const dict = reinterpret_cast<PyDictObject*>(object);
    const size_t items = PyDict_GET_SIZE(object);
    add(dict, sizeof *dict);
    if (items == 0) return;
    constexpr size_t kHeader = 32, kIndexed = 2 + 3 * sizeof(void*);  // a share of the index, hash, key and value
    add(dict->ma_keys, kHeader + items * kIndexed);
    if (dict->ma_values != nullptr) add(dict->ma_values, items * sizeof(void*));
  }
  py::bytes bytes() {
    std::sort(addresses_.begin(), addresses_.end());
    addresses_.erase(std::unique(addresses_.begin(), addresses_.end()), addresses_.end());
    return as_bytes(addresses_);
  }
  static void prefetch(PyObject* bytes) {
    const char* const text = PyBytes_AS_STRING(bytes);
    for (Py_ssize_t at = 0; at < PyBytes_GET_SIZE(bytes); at += sizeof(uintptr_t)) {
      uintptr_t line;
      memcpy(&line, text + at, sizeof line);
      __builtin_prefetch(reinterpret_cast<const void*>(line));
    }
  }

 private:
  static constexpr uintptr_t kLine = 64;
  std::vector<uintptr_t> addresses_;
};

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
  Lines lines;
  const auto note = [&](py::list& part, const py::handle dict) {
    const py::tuple items = contents(dict.ptr());
    part.append(dict);
    part.append(items);
    lines.add_dict(dict.ptr());
    lines.add_tuple(items.ptr());
  };
  for (const py::handle module : modules) {
    const py::object attributes = module.attr("__dict__");
    py::list part;
    part.append(module);
    part.append(py::type::handle_of(module));
    note(part, attributes);
    for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(attributes)) {
      if (!is_kept(name.ptr()) && PyDict_Check(value.ptr())) note(part, value);
    }
    const py::tuple fixed(part);
    parts.append(fixed);
    lines.add(module.ptr(), sizeof(PyObject));
    lines.add_tuple(fixed.ptr());
  }
  for (const py::handle tensor : tensors) {
    constexpr size_t kTensor = 192, kStorage = 64;  // of c10's TensorImpl and StorageImpl
    const auto cdata = [](const py::handle of) { return reinterpret_cast<const void*>(py::cast<uintptr_t>(of.attr("_cdata"))); };
    lines.add(tensor.ptr(), sizeof(PyObject) + sizeof(void*));
    lines.add(cdata(tensor), kTensor);
    lines.add(cdata(tensor.attr("untyped_storage")()), kStorage);
  }
  const py::tuple all(parts);
  lines.add_tuple(all.ptr());
  lines.add_tuple(tensors.ptr());
  return py::make_tuple(all, tensors, as_bytes(tensor_states(tensors.ptr())), lines.bytes());
}

inline bool is_current(const py::tuple& snapshot) {
  Lines::prefetch(PyTuple_GET_ITEM(snapshot.ptr(), 3));
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
