"""The fused block with its weights packed: separable_conv2d for many calls with the same weights, on the CPU.

Packing takes longer than a small block's convolution, and separable_conv2d's fifteen arguments half as long as its call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C
from .autograd import is_plain
from .functional import ACTIVATIONS, IntOrPair, _pair, padding_of

ops = torch.ops.dwconv_ext


def _selected_isa() -> str:
    return _C.selected_isa()


# What torch.compiler.assume_constant_result sets. Calling it imports torch._dynamo, which takes about as long as torch itself.
_selected_isa._dynamo_marked_constant = True


class PackedBlock:
    """``separable_conv2d`` of folded weights, where no derivative is wanted.

    Args:
        weights: dw_weight, dw_bias, pw_weight, pw_bias, as :func:`separable_conv2d` takes them.
        activations, slopes: after the depthwise and after the pointwise convolution.
    """

    def __init__(
        self,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        stride: IntOrPair,
        padding: str | IntOrPair,
        dilation: IntOrPair,
        activations: tuple[str, str],
        slopes: tuple[float, float],
    ) -> None:
        dw_weight, _, pw_weight, _ = weights
        filter_size = dw_weight.shape[2:]
        stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
        both_sides, more = padding_of(padding, filter_size, stride, dilation)
        self.dtype, self.channels = dw_weight.dtype, dw_weight.shape[0]
        self.usable = dw_weight.device.type == "cpu" and not any(more) and set(activations) <= set(ACTIVATIONS)
        if self.usable:
            numbers = map(ACTIVATIONS.index, activations)
            self.block = [pw_weight.shape[0], *filter_size, *stride, *both_sides, *dilation, *numbers]
            self.slopes = list(slopes)
            self.packed = ops.separable_conv2d_pack(*weights, _selected_isa())

    def takes(self, input: Any, residual: Tensor | None) -> bool:
        """Whether it computes what separable_conv2d would. What fits neither is separable_conv2d's to refuse."""
        if not self.usable or not is_plain(input, self.dtype) or input.dim() != 4 or input.size(1) != self.channels:
            return False
        return residual is None or is_plain(residual, self.dtype)

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.separable_conv2d_packed.default(input, self.packed, self.block, self.slopes, residual)
