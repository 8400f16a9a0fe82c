// What every plan says of its work, whatever the device.
#pragma once

#include <stdint.h>

#include <string>

namespace dwconv {

struct PlanFacts {
  int64_t bytes = 0;  // compulsory memory traffic: every operand once
  int64_t flops = 0;
  std::string reason;
};

}  // namespace dwconv
