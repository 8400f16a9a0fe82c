// What every plan says of its work, whatever the device.
#pragma once

#include <stdint.h>

#include <string>

namespace dwconv {

// A count of operations, which may be more than 64 bits hold where a filter is as large as an image: then the most they do.
inline int64_t counted(double operations) {
  constexpr double kMost = 9.2e18;
  return operations < kMost ? static_cast<int64_t>(operations) : INT64_MAX;
}

struct PlanFacts {
  int64_t bytes = 0;  // compulsory memory traffic: every operand once
  int64_t flops = 0;
  std::string reason;
};

}  // namespace dwconv
