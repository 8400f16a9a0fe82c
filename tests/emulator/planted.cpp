#include "planted.h"

#include <stdexcept>

#include "../../csrc/cuda/kernels/device.cuh"

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
  const std::string wrong =
      emulator::run(&emulator::call<PlantedArgs, &shift>, &args, 1, kCount, kCount * sizeof(float), &traffic);
  emulator::options().order = emulator::Order::kForwards;
  const std::vector<float> result(output, output + kCount);
  ::operator delete(input, std::align_val_t(64));
  ::operator delete(output, std::align_val_t(64));
  if (!wrong.empty()) throw std::runtime_error(wrong);
  return result;
}
