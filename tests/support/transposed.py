"""Transposed convolutions: named cases, and the check of one against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import LAYOUTS
from reference import is_channels_last
from tolerance import UNIT, assert_close
from torch import Tensor

import dwconv_ext

Pair = tuple[int, int]


@dataclass(frozen=True)
class Transposed:
    name: str
    batch: int
    channels: int
    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (2, 2)
    padding: Pair = (1, 1)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    multiplier: int = 1

    @property
    def conv(self) -> tuple[Pair, Pair, Pair, Pair]:
        return self.stride, self.padding, self.output_padding, self.dilation

    def torch(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, w, b, self.stride, self.padding, self.output_padding, x.shape[1], self.dilation)

    def tensors(self, dtype: torch.dtype, layout: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.channels, *self.size, generator=random).to(dtype)
        w = torch.randn(self.channels, self.multiplier, *self.kernel, generator=random).to(dtype)
        b = torch.randn(self.channels * self.multiplier, generator=random).to(dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]), w, b

    def __str__(self) -> str:
        return self.name


CASES = [
    Transposed("upsample_2x2", 2, 32, (7, 9), (2, 2), padding=(0, 0)),
    Transposed("upsample_2x2_cropped", 1, 17, (7, 5), (2, 2), padding=(1, 1)),
    Transposed("upsample_3x3", 2, 20, (9, 8), output_padding=(1, 1)),
    Transposed("upsample_4x4", 2, 33, (7, 7), (4, 4)),
    Transposed("upsample_4x4_no_padding", 1, 16, (9, 14), (4, 4), padding=(0, 0)),
    Transposed("paddings_of_other_parity", 1, 18, (6, 7), (4, 4), padding=(1, 2)),
    Transposed("upsample_5x5", 2, 18, (8, 7), (5, 5), padding=(2, 2), output_padding=(1, 0)),
    Transposed("upsample_7x7", 1, 16, (9, 9), (7, 7), padding=(3, 3)),
    Transposed("wide_4x4", 1, 3, (4, 70), (4, 4)),
    Transposed("stride_1", 2, 24, (8, 9), stride=(1, 1)),
    Transposed("stride_1_large", 1, 16, (12, 11), (9, 13), (1, 1), (4, 6)),
    Transposed("stride_1_grows", 1, 17, (5, 6), (5, 5), (1, 1), (0, 0)),
    Transposed("stride_3", 2, 16, (5, 6), (3, 3), (3, 3), (0, 1), (2, 1)),
    Transposed("stride_beyond_filter", 1, 16, (4, 5), (2, 2), (4, 5), (0, 0), (3, 4)),
    Transposed("stride_2x1", 2, 19, (6, 8), (6, 3), (2, 1), (2, 1)),
    Transposed("dilated", 1, 17, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), (2, 2)),
    Transposed("dilated_strided", 1, 16, (6, 5), (3, 2), (2, 3), (1, 0), (2, 2), (3, 3)),
    Transposed("output_padding_beyond_stride", 1, 8, (4, 5), (2, 2), (1, 2), (0, 0), (2, 4), (3, 5)),
    Transposed("padding_crops", 2, 16, (9, 8), (3, 3), (2, 2), (4, 3)),
    Transposed("padding_crops_stride_1", 1, 16, (9, 8), (3, 3), (1, 1), (3, 4)),
    Transposed("one_pixel", 3, 19, (1, 1), (4, 4)),
    Transposed("one_row", 2, 20, (1, 30), (1, 4), (1, 2), (0, 1)),
    Transposed("one_channel", 2, 1, (7, 9)),
    Transposed("tiles_of_rows", 1, 16, (40, 33), (4, 4)),
    Transposed("two_filters", 2, 6, (7, 8), multiplier=2),
    Transposed("three_filters_stride_1", 2, 5, (7, 8), (4, 3), (1, 1), multiplier=3),
    Transposed("empty_batch", 0, 16, (5, 5)),
]


def _with_grads(case: Transposed, x: Tensor, w: Tensor, b: Tensor, grad: Tensor) -> list[Tensor]:
    x, w, b = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b))
    y = case.torch(x, w, b)
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), grad.to(y.dtype))]


def check_transposed(case: Transposed, x: Tensor, w: Tensor, b: Tensor, *, peer: bool = True) -> None:
    """Forward and every gradient against float64, element by element, and against torch's own error."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    y = dwconv_ext.depthwise_conv_transpose2d(*leaves, *case.conv)
    assert y.dtype == x.dtype
    if is_channels_last(x):
        assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grad = grad.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else grad
    ours = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    double = [t.detach().double().contiguous() for t in (x, w, b, grad)]
    exact = _with_grads(case, *double)
    scale = _with_grads(case, *(t.abs() for t in double))
    theirs = _with_grads(case, x, w, b, grad) if peer else [None] * 4
    taps, pixels = w.shape[2] * w.shape[3], y.shape[0] * y.shape[2] * y.shape[3]
    terms = (taps, taps * case.multiplier, pixels, pixels)
    for name, got, want, s, their, n in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), ours, exact, scale, theirs, terms, strict=True
    ):
        # Each of a channel's filters gives a part of the input's gradient, which is rounded.
        parts = case.multiplier * UNIT[x.dtype] * s if name == "grad_input" and case.multiplier > 1 else None
        assert_close(got, want, s, n, name=name, peer=their if parts is None else None, middle=parts)
