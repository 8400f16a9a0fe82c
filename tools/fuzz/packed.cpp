// Packed weights: the CPU's are refused with any other format or a changed byte of their header; CUDA's places lie in their order
// within the sizes that 64 bits count, whatever the numbers.
#include "cuda/plan/packed.h"

#include <vector>

#include "common/countable.h"
#include "cpu/plan/plan.h"
#include "cpu/runtime/cpu_features.h"
#include "cpu/runtime/pack_weights.h"
#include "problems.h"

namespace dwconv::fuzz {
namespace {

BlockFormat format(FuzzedDataProvider& from, DType dtype) {
  const std::vector<IsaKernels>& sets = supported_isas();
  const IsaKernels& isa = sets[from.ConsumeIntegralInRange<size_t>(0, sets.size() - 1)];
  const int64_t channels = from.ConsumeIntegralInRange<int64_t>(1, 40),
                out_channels = from.ConsumeIntegralInRange<int64_t>(1, 40);
  const int64_t kernel = from.ConsumeIntegralInRange<int64_t>(0, 4);
  return block_format(isa, dtype, pointwise_format(isa, dtype), channels, out_channels, kernel, kernel);
}

void run(FuzzedDataProvider& from) {
  const DType dtype = from.ConsumeBool() ? DType::kFloat32 : DType::kFloat64;
  const BlockFormat made = format(from, dtype), wanted = format(from, dtype);
  const size_t values = 40 * 40 + 16 * 40;
  const std::vector<double> zeros(values);
  std::vector<char> packed(static_cast<size_t>(block_bytes(made)));
  const void* const filters = made.kernel_h > 0 ? zeros.data() : nullptr;
  pack_block(made, dtype, {filters, filters, zeros.data(), zeros.data(), nullptr}, packed.data());
  HOLDS(is_packed_for(made, packed.data()));
  HOLDS(is_packed_for(wanted, packed.data()) == (memcmp(&made, &wanted, sizeof made) == 0));
  const BlockWeights weights = packed_weights(made, packed.data());
  HOLDS(static_cast<const char*>(weights.pw_bias) < packed.data() + packed.size());
  const size_t changed = from.ConsumeIntegralInRange<size_t>(0, sizeof made - 1);
  const char by = from.ConsumeIntegralInRange<char>(1, 127);
  packed[changed] = static_cast<char>(packed[changed] ^ by);
  HOLDS(!is_packed_for(made, packed.data()));

  constexpr int64_t kMost = INT64_MAX;
  const int64_t n[] = {number(from, 0, kMost - 1), number(from, 0, kMost - 1), number(from, 0, kMost - 1),
                       number(from, 0, kMost - 1)};
  if (!countable(n[0], n[1], n[2], n[3])) return;
  const cuda::PackedPlaces at(static_cast<DType>(from.ConsumeIntegralInRange<int>(0, 3)), n[0], n[1], n[2], n[3]);
  HOLDS(0 == at.dw_weight && at.dw_weight <= at.dw_bias && at.dw_bias <= at.pw_weight && at.pw_weight < at.pw_bias);
  HOLDS(at.pw_bias < at.end && at.end % 16 == 0);
}

}  // namespace
}  // namespace dwconv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider from(data, size);
  try {
    dwconv::fuzz::run(from);
  } catch (const std::runtime_error&) {  // no kernel of this dtype in the set
  }
  return 0;
}
