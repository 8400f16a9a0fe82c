"""Layers of no tensors, which are steps all the same: what lies between the convolutions of a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.functional import DTYPES
from .folded_layers import Folded
from .folded_weights import Tensors
from .steps import Step

ops = torch.ops.dwconv_ext


class _Fixed(Folded):
    """A step that is always the same."""

    step: Step

    def kept(self, tensors: Tensors, dtype: torch.dtype) -> Step:
        return self.step

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Step:
        return self.step

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.dtype in DTYPES and input.numel() > 0


class FoldedPool(_Fixed):
    """``x.mean((2, 3), keepdim)``."""

    def __init__(self, keepdim: bool) -> None:
        self.step = Step(ops.global_average_pool.default, keepdim)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        return input.mean((2, 3), keepdim=self.step.arguments[0])


class FoldedMaxPool(_Fixed):
    """``max_pool2d(x, kernel_size, stride, padding, dilation)``, of pairs."""

    def __init__(self, *window: tuple[int, int]) -> None:
        self.step = Step(ops.max_pool2d.default, *window)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        return F.max_pool2d(input, *self.step.arguments)


class FoldedInterleave(_Fixed):
    """``torch.stack((a, b), 2).flatten(1, 2)``; b comes in the residual's place."""

    step = Step(ops.interleave_channels.default, more=1)

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor) -> Tensor:
        return torch.stack((input, residual), 2).flatten(1, 2)


class FoldedNarrow(_Fixed):
    """Channels [start, start + length) of the input, a view."""

    def __init__(self, start: int, length: int) -> None:
        self.step = Step(torch.ops.aten.narrow.default, 1, start, length)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        return input.narrow(*self.step.arguments)
