#include "planted.h"

#include <stdexcept>

#include "cuda/kernels/device.cuh"

namespace dwconv::cuda {
namespace {

struct PlantedArgs {
  const float* input;
  float* output;
  int count;
  const char* bug;
};

// output[i] = input[(i + 1) % n] + input[(i + 37) % n] through shared memory, then halves of a warp exchange: every kind of
// cooperation that the kernels use.
DWCONV_KERNEL(128, 1) shift(PlantedArgs args) {
  const std::string bug = args.bug;
  const int i = thread_index(), n = args.count;
  float* const values = reinterpret_cast<float*>(shared_memory());
  if (bug != "missing_wait_for_previous") wait_for_previous();
  if (i % 4 == 0) copy_async(values + i, args.input + i, true);
  copy_commit();
  if (bug != "missing_copy_wait") copy_wait<0>();
  if (bug != "missing_barrier" && !(bug == "divergent_barrier" && i >= n / 2)) synchronize();
  float sum = values[(i + 1) % n] + values[(i + 37) % n];
  if (bug != "missing_barrier_before_reuse") synchronize();
  values[i] = sum;
  if (!(bug == "divergent_warp" && i % 2)) synchronize_warp();
  sum = values[i ^ 16];
  if (bug == "shared_overrun" && i == n - 1) values[n] = sum;
  if (bug == "uninitialised" && i == 3) return;
  const int at = bug == "global_overrun" && i == n - 1 ? n : i;
  store(args.output + at, Vector<float, 1>{{sum}});
}

// output[i] = a sum of 16 ones from a warpgroup's product.
DWCONV_KERNEL(128, 1) product(PlantedArgs args) {
  const std::string bug = args.bug;
  constexpr int kLine = 64;  // 16-bit values
  __half* const operands = reinterpret_cast<__half*>(shared_memory());
  for (int line = thread_index(); line < 64 + 128; line += block_size()) {
    for (int k = 0; k < kLine; ++k) operands[line * kLine + k] = __float2half_rn(1);
  }
  write_operands();
  synchronize();
  float sum[64] = {};
  begin_products();
  multiply_group<__half, false>(sum, operands, operands + 64 * kLine, 0);
  commit_products();
  if (bug == "operands_overwritten") operands[thread_index() * kLine] = __float2half_rn(2);
  if (bug != "missing_product_wait") complete_products();
  store(args.output + thread_index(), Vector<float, 1>{{sum[0]}});
}

}  // namespace
}  // namespace dwconv::cuda

std::vector<float> run_planted(const std::string& bug, const std::string& order) {
  using namespace dwconv::cuda;
  constexpr int kCount = 128;
  // On the heap and exactly as large as it is, so that AddressSanitizer knows its ends.
  float* const input = static_cast<float*>(::operator new(kCount * sizeof(float), std::align_val_t(64)));
  float* const output = static_cast<float*>(::operator new(kCount * sizeof(float), std::align_val_t(64)));
  for (int i = 0; i < kCount; ++i) input[i] = static_cast<float>(i), output[i] = NAN;
  emulator::options().order = order == "backwards"  ? emulator::Order::kBackwards
                              : order == "shuffled" ? emulator::Order::kShuffled
                                                    : emulator::Order::kForwards;
  const PlantedArgs args = {input, output, kCount, bug.c_str()};
  emulator::Traffic traffic;
  const bool products = bug == "product" || bug == "missing_product_wait" || bug == "operands_overwritten";
  const emulator::Body body = products ? &emulator::call<PlantedArgs, &product> : &emulator::call<PlantedArgs, &shift>;
  const std::string wrong =
      emulator::run(body, &args, 1, kCount, products ? 192 * 128 : kCount * sizeof(float), &traffic, !products);
  emulator::options().order = emulator::Order::kForwards;
  const std::vector<float> result(output, output + kCount);
  ::operator delete(input, std::align_val_t(64));
  ::operator delete(output, std::align_val_t(64));
  if (!wrong.empty()) throw std::runtime_error(wrong);
  return result;
}
