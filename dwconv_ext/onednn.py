"""torch's own convolution and linear layer as torch.compile calls them: oneDNN with the weights in the order it reads.

F.conv2d brings the weights into that order at every call, which at batch 1 is up to half of its time; F.linear does not run on
oneDNN in float32, and not on all threads with one row. The ops are torch's (inductor freezes graphs to them), but not public:
where they are missing nothing is packed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .autograd import is_plain, taken_apart

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
LEAST_LINEAR_MACS = 3 << 18  # F.linear's is quicker to start
_LINEAR = ("_linear_pointwise", "_reorder_linear_weight")


def is_channels_last(t: Tensor) -> bool:
    """And not NCHW as well, as it is with one channel or one pixel."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@functools.cache
def _runs(dtype: torch.dtype, *names: str) -> bool:
    """Whether this torch has the ops, and this CPU the dtype."""
    ops = torch.ops.mkldnn
    if not (all(hasattr(ops, name) for name in names) and torch.backends.mkldnn.is_available()):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


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
        return weight.device.type == "cpu" and _runs(weight.dtype, "_convolution_pointwise", "_reorder_convolution_weight")

    def takes(self, input: Tensor) -> bool:
        """Whether it computes what F.conv2d would, and in less time."""
        if not is_plain(input, self.weight.dtype) or input.dim() != 4:
            return False
        if not (self.channels_last or is_channels_last(input)):
            return False
        if not torch.backends.mkldnn.enabled:
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


class PackedLinear(nn.Linear):
    """``nn.Linear`` that keeps its weight packed, for calls on the CPU without derivatives: ``convert``'s linear layers.

    It is kept until the weight or the module changes, as the folded weights of :class:`FusedDSConv` are.
    """

    _kept: tuple[tuple, Tensor] | None = None  # a snapshot (csrc/snapshot.h), and the packed weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _takes(self, input: Tensor, weight: Tensor) -> bool:
        """Whether it computes what F.linear would, and in less time."""
        if not is_plain(input, weight.dtype) or not weight.is_cpu or not torch.backends.mkldnn.enabled:
            return False
        if input.dim() < 2 or input.numel() * weight.shape[0] < LEAST_LINEAR_MACS or input.shape[-1] != weight.shape[1]:
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return False
        return type(weight) is nn.Parameter and not weight.is_inference() and _runs(weight.dtype, *_LINEAR)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters.get("weight")  # missing where it is computed: parametrized, pruned
        if weight is None or taken_apart() or not self._takes(input, weight):
            return super().forward(input)
        kept = self._kept
        if kept is None or not _C.is_current(kept[0]):
            order = torch.ops.mkldnn._reorder_linear_weight(weight)
            kept = self._kept = _C.snapshot([self], (weight,)), order
        return torch.ops.mkldnn._linear_pointwise(input, kept[1], self.bias, "none", [], "")
