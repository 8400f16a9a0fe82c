// Packed weights as tensors of bytes (plan/packed.h): making and checking them. What they were made of can't be read without
// waiting for the GPU: their size alone says it.
#pragma once

#include "common/packed_checks.h"
#include "cuda/ops/launch.h"
#include "cuda/plan/packed.h"

namespace dwconv::cuda {
namespace {

inline ScalarType scalar_type(DType dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return kTypes[static_cast<int>(dtype)];
}

// Weights whose shapes have been checked; those that are not given count as zeros. Each is one copy, as one conversion would be.
inline Tensor pack(DType dtype, const PackedPlaces& at, const Tensor& like, const std::optional<Tensor>& dw_weight,
                   const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_weight,
                   const std::optional<Tensor>& pw_bias) {
  Tensor packed = empty_buffer("packed weights", like, {at.end}, ScalarType::Byte);
  const int64_t unit = element_size(dtype), wide = accumulate_size(dtype);
  struct Part {
    const std::optional<Tensor>& from;
    int64_t begin, end, unit;
  };
  const Part parts[] = {{dw_weight, at.dw_weight, at.dw_bias, unit},
                        {dw_bias, at.dw_bias, at.pw_weight, wide},
                        {pw_weight, at.pw_weight, at.pw_bias, unit},
                        {pw_bias, at.pw_bias, at.end, wide}};
  const auto given = [](const Part& part) { return part.begin == part.end || part.from; };
  if (!std::all_of(std::begin(parts), std::end(parts), given)) torch::stable::zero_(packed);
  for (const Part& part : parts) {
    if (!part.from) continue;
    const Tensor source = dense(*part.from);
    const ScalarType type = part.unit == unit ? scalar_type(dtype) : accumulate_scalar(dtype);
    Tensor place = torch::stable::from_blob(static_cast<char*>(packed.mutable_data_ptr()) + part.begin, source.sizes(),
                                            source.strides(), packed.device(), type);
    torch::stable::copy_(place, source);
  }
  return packed;
}

// possible: whether there can be weights of these sizes at all.
inline void check_packed(const char* op, const char* name, const char* pack_op, const Tensor& packed, const Tensor& input,
                         DType dtype, int64_t channels, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, bool possible) {
  const bool bytes = possible && packed.is_cpu() == input.is_cpu() && packed.get_device_index() == input.get_device_index() &&
                     is_run_of_bytes(packed);
  DWCONV_CHECK(bytes && channels > 0 && out_channels > 0 && countable(channels, out_channels, kernel_h, kernel_w) &&
                   packed.size(0) == PackedPlaces(dtype, channels, out_channels, kernel_h, kernel_w).end,
               op, ": ", name, " must be what ", pack_op, " made on this device of ",
               weights_text(pack_op, channels, out_channels));
}

inline const void* at_byte(const Tensor& packed, int64_t byte) {
  return static_cast<const char*>(packed.const_data_ptr()) + byte;
}

}  // namespace
}  // namespace dwconv::cuda
