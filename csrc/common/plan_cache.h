// What a thread remembers by all that it depends on: a plain struct with `problem` among its fields, compared field by field.
#pragma once

#include <stddef.h>

#include <unordered_map>
#include <utility>

#include "common/problem.h"

namespace dwconv {

inline size_t hash_of(const DepthwiseProblem& p) {
  size_t hash = 0;
  for (const int64_t value : {p.batch, p.channels, p.in_h, p.in_w, p.kernel_h, p.kernel_w, p.stride_h, p.out_h,
                              static_cast<int64_t>(p.dtype), static_cast<int64_t>(p.layout)}) {
    hash = (hash ^ static_cast<size_t>(value)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

template <class Value, class Key>
auto& remembered_values() {
  struct Hash {
    size_t operator()(const Key& k) const { return hash_of(k.problem); }
  };
  static thread_local std::unordered_map<Key, Value, Hash> values;
  return values;
}

// What this thread remembers for an equal key, or null. What is pointed to holds until the thread's next call.
template <class Value, class Key>
const Value* remembered(const Key& key) {
  const auto& values = remembered_values<Value, Key>();
  const auto found = values.find(key);
  return found != values.end() ? &found->second : nullptr;
}

template <class Value, class Key>
const Value& remember(const Key& key, Value value) {
  auto& values = remembered_values<Value, Key>();
  constexpr size_t kMost = 4096;  // shapes that change with every call must not fill the memory
  if (values.size() >= kMost) values.clear();
  return values.emplace(key, std::move(value)).first->second;
}

// make(), or what it gave this thread for an equal key before. The reference holds until the thread's next call.
template <class Plan, class Key, class Make>
const Plan& planned(const Key& key, Make make) {
  const Plan* const found = remembered<Plan>(key);
  return found != nullptr ? *found : remember<Plan>(key, make());
}

}  // namespace dwconv
