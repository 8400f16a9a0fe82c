// The activations' names, as the ops' schemas take them.
#pragma once

#include <string.h>

#include "common/problem.h"

namespace dwconv {

struct ActivationName {
  const char* name;
  ActivationKind kind;
};

static constexpr ActivationName kActivationNames[] = {
    {"identity", ActivationKind::kIdentity},   {"relu", ActivationKind::kRelu},
    {"relu6", ActivationKind::kRelu6},         {"silu", ActivationKind::kSilu},
    {"hardswish", ActivationKind::kHardswish}, {"gelu", ActivationKind::kGelu},
    {"gelu_tanh", ActivationKind::kGeluTanh},  {"leaky_relu", ActivationKind::kLeakyRelu},
};

static constexpr const char* activation_name(ActivationKind kind) { return kActivationNames[static_cast<int>(kind)].name; }

static inline bool parse_activation(const char* name, ActivationKind* kind) {
  for (const ActivationName& entry : kActivationNames) {
    if (strcmp(entry.name, name) == 0) {
      *kind = entry.kind;
      return true;
    }
  }
  return false;
}

}  // namespace dwconv
