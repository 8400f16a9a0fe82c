// Plans remembered by all that they depend on: a plain struct with `problem` among its fields, compared field by field.
#pragma once

#include <stddef.h>

#include <unordered_map>

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

// make(), or what it gave this thread for an equal key before. The reference holds until the thread's next call.
template <class Plan, class Key, class Make>
const Plan& planned(const Key& key, Make make) {
  struct Hash {
    size_t operator()(const Key& k) const { return hash_of(k.problem); }
  };
  static thread_local std::unordered_map<Key, Plan, Hash> plans;
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  constexpr size_t kMost = 4096;  // shapes that change with every call must not fill the memory
  if (plans.size() >= kMost) plans.clear();
  return plans.emplace(key, make()).first->second;
}

}  // namespace dwconv
