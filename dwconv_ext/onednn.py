"""torch's own convolution as torch.compile calls it: oneDNN with the activation in it and the weights in the order it reads.

F.conv2d brings the weights into that order at every call, which at batch 1 is up to half of its time. The two ops are torch's
(inductor freezes graphs to them), but not public: where they are missing nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NAMES = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
LEAST_MACS = 1 << 20  # the op's own 20 us are more than the packing costs below


def is_channels_last(t: Tensor) -> bool:
    """And not NCHW as well, as it is with one channel or one pixel."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


class PackedConv:
    """A convolution with folded weights and the activation after it, without gradients, where input or weights are channels_last.

    Then torch's output is channels_last, as this one's always is. The packed weights are kept for the last input's shape, which
    oneDNN's order depends on.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, activation: str, slope: float) -> None:
        self.conv, self.weight, self.bias = conv, weight, bias
        self.post = ("leaky_relu", [slope], "") if activation == "leaky_relu" else _NAMES[activation]
        self.channels_last = is_channels_last(weight)
        filter_sizes = zip(weight.shape[2:], conv.dilation, conv.padding, strict=True)
        self.least_height, self.least_width = (d * (k - 1) + 1 - 2 * p for k, d, p in filter_sizes)
        self.macs_per_input = weight.numel() / weight.shape[1] / (conv.stride[0] * conv.stride[1])
        self.packed: tuple[torch.Size, Tensor] | None = None

    @staticmethod
    def can_pack(conv: nn.Conv2d, weight: Tensor) -> bool:
        if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        ops = torch.ops.mkldnn
        if not (hasattr(ops, "_convolution_pointwise") and hasattr(ops, "_reorder_convolution_weight")):
            return False
        return torch.backends.mkldnn.is_available() and (
            weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def takes(self, input: Tensor) -> bool:
        """Whether it computes what F.conv2d would, and in less time."""
        if type(input) is not Tensor or input.dtype != self.weight.dtype or input.dim() != 4:
            return False
        if not (self.channels_last or is_channels_last(input)):
            return False
        if torch.is_grad_enabled() and input.requires_grad:
            return False
        if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
            return False
        _, channels, height, width = input.shape  # what does not fit is F.conv2d's to refuse
        if channels != self.weight.shape[1] or height < self.least_height or width < self.least_width:
            return False
        return input.numel() * self.macs_per_input >= LEAST_MACS

    def __call__(self, input: Tensor) -> Tensor:
        conv, ops, shape = self.conv, torch.ops.mkldnn, input.shape
        packed = self.packed
        if packed is None or packed[0] != shape:
            weight = self.weight.contiguous(memory_format=torch.channels_last)
            order = ops._reorder_convolution_weight(weight, conv.padding, conv.stride, conv.dilation, 1, shape)
            packed = self.packed = shape, order
        return ops._convolution_pointwise(input, packed[1], self.bias, conv.padding, conv.stride, conv.dilation, 1, *self.post)
