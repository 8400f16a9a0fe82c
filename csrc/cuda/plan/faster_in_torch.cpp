// Where torch's own convolution runs in the place of a kernel of ours without the tuner: in ranges of problems around layers for
// which it was clearly faster when both were measured on a GPU of the same architecture. `python -m benchmarks calibrate` writes
// the ranges, and says what is clear (benchmarks/calibrate.py).
#include <stdio.h>

#include "cuda/plan/plan.h"

namespace dwconv::cuda {

struct Span {
  int64_t least, most;
  bool has(int64_t n) const { return least <= n && n <= most; }
};

// Filter and stride are square or as measured, padding half of the filter, one filter a channel.
struct FasterInTorch {
  int32_t arch;
  Op op;
  Pass pass;
  DType dtype;
  Layout layout;
  int64_t kernel_h, kernel_w, stride;
  Span batch, channels, out_channels, in_h, in_w;
  double ours_us, torch_us;  // of the layer in the middle
};

const FasterInTorch* faster_in_torch(const Work& work, const Gpu& gpu) {
  static const std::vector<FasterInTorch> ranges = {
#include "cuda/plan/faster_in_torch.inc"
  };
  const DepthwiseProblem& p = work.request.problem;
  // As measured: a layer has neither bias nor activation, and a block's product may round to tf32.
  const Extras& e = work.extras;
  const bool block = work.op == Op::kSeparable;
  if (block ? e.residual || (p.dtype == DType::kFloat32 && !work.request.allow_tf32)
            : e.bias || e.activation.kind != ActivationKind::kIdentity)
    return nullptr;
  for (const FasterInTorch& r : ranges) {
    if (r.arch == gpu.arch && r.op == work.op && r.pass == work.pass && r.dtype == p.dtype && r.layout == p.layout &&
        r.kernel_h == p.kernel_h && r.kernel_w == p.kernel_w && r.stride == p.stride_h && r.stride == p.stride_w &&
        p.pad_h == p.kernel_h / 2 && p.pad_w == p.kernel_w / 2 && p.dilation_h == 1 && p.dilation_w == 1 &&
        work.request.multiplier == 1 && r.batch.has(p.batch) && r.channels.has(p.channels) && r.in_h.has(p.in_h) &&
        r.in_w.has(p.in_w) && r.out_channels.has(block ? work.out_channels : p.channels)) {
      return &r;
    }
  }
  return nullptr;
}

std::string describe(const FasterInTorch& r) {
  char text[160];
  snprintf(text, sizeof text,
           "torch's own convolution, faster for layers like this on sm_%d when measured: %.1f us, ours %.1f us", r.arch,
           r.torch_us, r.ours_us);
  return text;
}

}  // namespace dwconv::cuda
