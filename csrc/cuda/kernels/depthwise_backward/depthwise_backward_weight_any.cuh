// Depthwise weight and bias gradient for any filter, stride, dilation and channel multiplier, both layouts, first stage (the
// formula: depthwise_backward_weight.cuh).
//
// A thread sums up to 8 taps of one filter row of one output channel over some pixels: a value of grad_output serves 8 products.
// channels_last: a warp has 32 channels, the block's warps share the pixels. NCHW: a block has one channel, its threads share the
// pixels, lanes along the columns. grad_output and input are read through L1. The threads of a channel are added as in the tiled
// kernels. Blocks: channels (32 a block in channels_last) fastest, then taps, then parts; a part is a range of images and pixels.
// Traffic: each group of 8 taps reads both tensors; they come from L2 where they fit.
#pragma once

#include "cuda/kernels/depthwise_backward/depthwise_backward_weight.cuh"

namespace dwconv::cuda {

template <class T, bool kChannelsLast>
DWCONV_KERNEL(kMostThreads, 1)
depthwise_backward_weight_any(BackwardWeightTileArgs args) {
  using A = accumulate_t<T>;
  const DepthwiseProblem& p = args.problem;
  const int kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const int groups_w = (kernel_w + kAnyTaps - 1) / kAnyTaps;
  const int64_t outputs = p.channels * args.multiplier;
  int block = block_index();
  const int64_t slab = block % slabs_of(args.tiling);
  block /= slabs_of(args.tiling);
  const int group = static_cast<int>(block % (static_cast<int64_t>(kernel_h) * groups_w));
  const int64_t part = block / (static_cast<int64_t>(kernel_h) * groups_w);
  const int r = group / groups_w, s0 = group % groups_w * kAnyTaps, taps = least(kAnyTaps, kernel_w - s0);

  const int lanes = kChannelsLast ? kWarp : 1;
  const int lane = thread_index() % lanes, slot = thread_index() / lanes, slots = block_size() / lanes;
  const int64_t o = slab * lanes + lane;
  const bool active = o < outputs;
  A acc[kAnyTaps] = {}, bias[1] = {};
  const int pixels = static_cast<int>(p.out_h * p.out_w), out_w = static_cast<int>(p.out_w);
  const int tiles_an_image = (pixels + kAnyPixels - 1) / kAnyPixels;
  const int64_t begin = divided(args.tiles * part, args.parts), end = divided(args.tiles * (part + 1), args.parts);
  for (int64_t tile = begin; tile < end && active; ++tile) {
    const int64_t n = divided(tile, tiles_an_image);
    const int first = static_cast<int>(tile - n * tiles_an_image) * kAnyPixels;
    const T* const image = static_cast<const T*>(args.input) + n * p.in_stride_n + o / args.multiplier * p.in_stride_c;
    const T* const grad = static_cast<const T*>(args.grad_output) + n * p.out_stride_n + o * p.out_stride_c;
    for (int pixel = first + slot; pixel < least(first + kAnyPixels, pixels); pixel += slots) {
      const int y = pixel / out_w, x = pixel - y * out_w;
      const A g = load_one(grad + y * p.out_stride_h + x * p.out_stride_w);
      bias[0] += g;
      const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_h;
      if (row < 0 || row >= p.in_h) continue;
      const T* const from = image + row * p.in_stride_h;
      const int64_t column0 = x * p.stride_w + s0 * p.dilation_w - p.pad_w;
#pragma unroll
      for (int k = 0; k < kAnyTaps; ++k) {
        const int64_t column = column0 + k * p.dilation_w;
        if (k < taps && column >= 0 && column < p.in_w) acc[k] += g * load_one(from + column * p.in_stride_w);
      }
    }
  }
  A* const scratch = reinterpret_cast<A*>(shared_memory());
  add_slots(acc, scratch, slot, slots, lane, lanes, true);
  if (active && slot == 0 && args.partial != nullptr) {
    const int64_t to = ((part * outputs + o) * kernel_h + r) * kernel_w + s0;
#pragma unroll
    for (int k = 0; k < kAnyTaps; ++k) {
      if (k < taps) store_sum<T>(args, args.partial, to + k, acc[k]);
    }
  }
  if (args.partial_bias == nullptr || group != 0) return;
  add_slots(bias, scratch, slot, slots, lane, lanes, true);
  if (active && slot == 0) store_sum<T>(args, args.partial_bias, part * outputs + o, bias[0]);
}

}  // namespace dwconv::cuda
