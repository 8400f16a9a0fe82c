// Input, weight and bias gradient in one launch, in channels_last for square filters of 3 and 5 at stride 1, where each alone
// would leave a part of the GPU idle: the first blocks make the weight's (depthwise_backward_weight_rows.cuh), which take longer,
// the others the input's, as a forward pass of grad_output with the flipped filter (depthwise_rows.cuh).
//
// The plan guarantees what these two want, with blocks of as many threads. Traffic: theirs; grad_output comes from L2 the second
// time.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight_rows.cuh"

namespace dwconv::cuda {

template <class T, class Taps, int V>
DWCONV_KERNEL(kBackwardRowThreads, kBackwardRowBlocks)
depthwise_backward_rows_nhwc(BackwardTileArgs args) {
  if (block_index() < args.weight_blocks) {
    correlate_rows<T, Taps, V>(args.weight, block_index());
  } else {
    convolve_rows<T, Taps, V>(args.input, block_index() - args.weight_blocks, [](auto&) {}, [](int, const Packed<T, V>&) {});
  }
}

}  // namespace dwconv::cuda
