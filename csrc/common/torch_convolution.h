// torch's own convolution and activations, through its dispatcher, where they run in the place of our kernels. Include after
// defining TORCH_TARGET_VERSION; internal linkage, as in checks.h.
#pragma once

#include <array>
#include <tuple>

#include "common/tensors.h"

namespace dwconv {
namespace {

// Whether this thread is in torch's convolution: an op that is called from there (torch's kernel may be overridden by one that
// calls ours) may not go back.
inline bool& in_torch() {
  static thread_local bool inside = false;
  return inside;
}

// A dispatched call: arguments in the schema's order, results from the stack's beginning on.
template <size_t kArguments>
void call_torch(const char* op, const char* overload, std::array<StableIValue, kArguments>& stack) {
  const struct Inside {
    bool before = std::exchange(in_torch(), true);
    ~Inside() { in_torch() = before; }
  } inside;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
}

// In the ops' layout and strides.
inline Tensor as_output(const Tensor& t, const Ints& size, Layout layout) {
  const Tensor packed = dense(t, layout);
  const OutputStrides strides(size);
  for (int64_t d = 0; d < 4; ++d) {  // a dimension of one element may have any
    if (packed.stride(d) != strides.of(layout)[d])
      return reinterpreted(packed, size, Ints(strides.of(layout), strides.of(layout) + 4));
  }
  return packed;
}

// Whether torch's convolution, whose padding is the same at both ends, computes the same: where its output has the size.
inline bool torch_has(const ConvolutionShape& s) {
  const auto same = [](int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out) {
    return pad >= 0 && (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1 == out;
  };
  return same(s.in_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.out_h) &&
         same(s.in_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.out_w);
}

struct TorchConvolution {
  Ints stride, padding, dilation;
  int64_t groups;
  bool transposed = false;
  Ints output_padding = {0, 0};

  explicit TorchConvolution(const ConvolutionShape& s)
      : stride{s.stride_h, s.stride_w}, padding{s.pad_h, s.pad_w}, dilation{s.dilation_h, s.dilation_w}, groups(s.channels) {}
  // A transposed one.
  TorchConvolution(int64_t channels, const Ints& by, const Ints& pad, const Ints& more, const Ints& apart)
      : stride(by), padding(pad), dilation(apart), groups(channels), transposed(true), output_padding(more) {}
  TorchConvolution() : stride{1, 1}, padding{0, 0}, dilation{1, 1}, groups(1) {}  // a pointwise one
};

inline Tensor torch_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const TorchConvolution& c) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),         from(weight),     from(bias),         from(c.stride),
                                    from(c.padding), from(c.dilation), from(c.transposed), from(c.output_padding),
                                    from(c.groups)};
  call_torch("aten::convolution", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Those that `mask` does not name are undefined.
inline std::tuple<Tensor, Tensor, Tensor> torch_convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                                     const TorchConvolution& c, const std::array<bool, 3>& mask) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::optional<Ints> bias_size = mask[2] ? std::optional(Ints{weight.size(0)}) : std::nullopt;
  const torch::headeronly::HeaderOnlyArrayRef<bool> wanted(mask.data(), mask.size());
  std::array<StableIValue, 11> stack{from(grad),       from(x),         from(weight),     from(bias_size),
                                     from(c.stride),   from(c.padding), from(c.dilation), from(false),
                                     from(Ints{0, 0}), from(c.groups),  from(wanted)};
  call_torch("aten::convolution_backward", "", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

// Numbers of a type that the schema leaves open do not pass the stable ABI.
constexpr bool torch_has(const Activation& activation) { return activation.kind != ActivationKind::kLeakyRelu; }

// One that torch_has.
inline void torch_activate_(const Tensor& t, const Activation& activation) {
  using torch::stable::detail::from;
  const auto unary = [&](const char* op) {
    std::array<StableIValue, 1> stack{from(t)};
    call_torch(op, "", stack);
    torch::stable::detail::to<Tensor>(stack[0]);
  };
  switch (activation.kind) {
    case ActivationKind::kIdentity:
    case ActivationKind::kLeakyRelu:
      return;
    case ActivationKind::kRelu:
      return unary("aten::relu_");
    case ActivationKind::kRelu6:
      return unary("aten::relu6_");
    case ActivationKind::kSilu:
      return unary("aten::silu_");
    case ActivationKind::kHardswish:
      return unary("aten::hardswish_");
    case ActivationKind::kGelu:
    case ActivationKind::kGeluTanh: {
      const std::string how = activation.kind == ActivationKind::kGelu ? "none" : "tanh";
      std::array<StableIValue, 2> stack{from(t), from(how)};
      call_torch("aten::gelu_", "", stack);
      torch::stable::detail::to<Tensor>(stack[0]);
      return;
    }
  }
}

// Of (N, C, H, W): (N, C, 1, 1).
inline Tensor torch_mean_of_pixels(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<Ints>(Ints{2, 3})), from(true),
                                    from(std::optional<ScalarType>())};
  call_torch("aten::mean", "dim", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// act(conv(x)) in the ops' layout.
inline Tensor in_torch_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const TorchConvolution& c, const Activation& activation, const Ints& size, Layout layout) {
  const Tensor output = as_output(torch_convolution(x, weight, bias, c), size, layout);
  torch_activate_(output, activation);
  return output;
}

}  // namespace
}  // namespace dwconv
