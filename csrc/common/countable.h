// Whether numbers are sizes that weights can have. Plain arithmetic, no torch.
#pragma once

#include <stdint.h>

namespace dwconv {

// (channels, kernel_h, kernel_w) filters and (out_channels, channels) weights of less than 2^48 elements, more than a process can
// address: 64 bits count their bytes, whatever these are padded to. In doubles, which products do not overflow.
constexpr bool countable(int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w) {
  constexpr double kMost = 281474976710656.0;
  if (channels < 0 || out_channels < 0 || kernel_h < 0 || kernel_w < 0) return false;
  const double depth = static_cast<double>(channels);
  return depth * static_cast<double>(out_channels) < kMost &&
         depth * static_cast<double>(kernel_h) * static_cast<double>(kernel_w) < kMost && depth < kMost;
}

}  // namespace dwconv
