// Depthwise weight and bias gradient, second stage: the parts' sums, added in their order.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"

namespace dwconv::cuda {

// 32 neighbouring values a block; its 8 warps take every 8th part and are added pairwise.
// kBehind: the launch may begin before the first stage has ended.
template <class T, bool kBehind = false>
DWCONV_KERNEL(kMostThreads, 1)
sum_parts(SumPartsArgs args) {
  if constexpr (kBehind) wait_for_previous();
  using A = accumulate_t<T>;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, warps = block_size() / kWarp;
  const bool weights = block_index() < args.first_blocks;
  const int64_t count = weights ? args.count[0] : args.count[1];
  const A* const partial = static_cast<const A*>(weights ? args.partial[0] : args.partial[1]);
  T* const output = static_cast<T*>(weights ? args.output[0] : args.output[1]);
  const int64_t i = (block_index() - (weights ? 0 : args.first_blocks)) * kWarp + lane;
  A sum[1] = {};
  constexpr int kAtOnce = 8;  // loads of a thread on their way
#pragma unroll 1
  for (int first = warp; i < count && first < args.parts; first += warps * kAtOnce) {
    A value[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int part = first + k * warps;
      if (part < args.parts) value[k] = load_written<1>(partial + part * count + i).value[0];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k * warps < args.parts) sum[0] += value[k];
    }
  }
  add_slots(sum, reinterpret_cast<A*>(shared_memory()), warp, warps, lane, kWarp, true);
  if (i < count && warp == 0) store(output + i, Vector<T, 1>{{from_accumulate<T>(sum[0])}});
}

}  // namespace dwconv::cuda
