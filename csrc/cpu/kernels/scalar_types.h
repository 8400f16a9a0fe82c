// bfloat16 and float16 as plain 16-bit structs with scalar conversions (round to nearest even, NaN kept).
// Everything here has internal linkage: the ISA files compile it with their own instruction sets, and the linker must
// never pick an AVX-512 copy for a baseline caller.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dwconv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct BFloat16Pair {
  BFloat16 low, high;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_accumulate(float value) { return value; }
static inline double to_accumulate(double value) { return value; }
static inline float to_accumulate(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
static inline float to_accumulate(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Shifting exponent and mantissa into float's fields leaves the bias 112 too small; the product also makes
  // subnormals right. Infinity and NaN need their exponent restored.
  float scaled = bits_float(magnitude) * bits_float(0x77800000u);  // 2^112
  if ((value.bits & 0x7c00u) == 0x7c00u) {
    return bits_float(sign | 0x7f800000u | magnitude);
  }
  return bits_float(sign | float_bits(scaled));
}

static inline void from_accumulate(float value, float* out) { *out = value; }
static inline void from_accumulate(double value, double* out) { *out = value; }
static inline void from_accumulate(float value, BFloat16* out) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = 0x7fc0u;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
static inline void from_accumulate(float value, Float16* out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal in float16
    // Adding 0.5 aligns the value so that float's own rounding rounds at float16's subnormal step, 2^-24.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace dwconv
