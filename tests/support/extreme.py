"""Axes of convolutions whose numbers are far beyond their tensors, and the check of a pair of them by definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import LAYOUTS
from tolerance import UNIT
from torch import Tensor

from dwconv_ext import depthwise_conv2d, separable_conv2d


@dataclass(frozen=True)
class Axis:
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def outputs(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def matrix(self) -> Tensor:
        """[output, tap, sample]: 1 where the tap joins the two; Python's integers do not overflow."""
        joined = torch.zeros(self.outputs, self.kernel, self.size, dtype=torch.float64)
        for o in range(self.outputs):
            for r in range(self.kernel):
                sample = o * self.stride + r * self.dilation - self.padding
                if 0 <= sample < self.size:
                    joined[o, r, sample] = 1
        return joined


PLAIN = Axis(7, 3, 1, 1)
AXES = {
    "stride_2_31": Axis(8, 3, 2**31 - 1),
    "stride_2_62": Axis(8, 3, 2**62),
    "stride_most": Axis(8, 3, 2**63 - 1, 3),
    "stride_past_the_image": Axis(70, 3, 90, 89),
    "padding_around": Axis(8, 3, 2**40, 2**40),
    "padding_2_61": Axis(8, 3, 2**61, 2**61 - 2),
    "padding_alone": Axis(8, 3, 2**62, 2**61),
    "padding_most": Axis(8, 3, 2**61, (2**63 - 1 - 8) // 2),
    "dilation": Axis(8, 3, 1, 2**40, 2**40),
    "dilation_2_61": Axis(8, 3, 1, 2**61, 2**61),
    "dilation_of_one_tap": Axis(8, 1, 3, 0, 2**62),
    "dilation_past_the_image": Axis(8, 5, 2, 2**32 + 5, 2**31),
    "dilation_and_stride": Axis(9, 4, 2**50, 3 * 2**50, 2**50),
    "dilation_and_stride_nearly": Axis(9, 4, 2**50 + 2, 3 * 2**50 - 1, 2**50 - 1),
    "two_strides_a_dilation": Axis(9, 3, 2**40, 2**42 - 3, 2**41 + 1),
    "nothing_meets": Axis(9, 2, 2**40, 2**40 - 2**20, 2**39),
    "one_output_one_tap": Axis(5, 3, 2**61, 2**41, 2**41 + 2),
}  # fmt: skip


def operands(h: Axis, w: Axis, dtype: torch.dtype, layout: str, channels: int = 16, multiplier: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, channels, h.size, w.size), (channels * multiplier, 1, h.kernel, w.kernel), (channels * multiplier,)
    x, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return [x.contiguous(memory_format=LAYOUTS[layout]), weight, bias]


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, h: Axis, w: Axis) -> Tensor:
    x = x.repeat_interleave(len(weight) // x.shape[1], 1)
    return torch.einsum("nchw,crs,orh,psw->ncop", x, weight[:, 0], h.matrix(), w.matrix()) + bias.reshape(1, -1, 1, 1)


def check(
    h: Axis, w: Axis, dtype: torch.dtype, layout: str, channels: int = 16, multiplier: int = 1, device: str = "cpu"
) -> None:
    """Forward, the three gradients and the fused block."""
    tensors = operands(h, w, dtype, layout, channels, multiplier)
    conv = tuple(zip(*((a.stride, a.padding, a.dilation) for a in (h, w)), strict=True))
    exact = [t.double().requires_grad_() for t in tensors]
    want = by_definition(*exact, h, w)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    ours = [t.to(device).requires_grad_() for t in tensors]
    y = depthwise_conv2d(*ours, *conv)
    got = [y, *torch.autograd.grad(y, ours, grad.to(device).contiguous(memory_format=LAYOUTS[layout]))]
    least = 1e-12 if dtype == torch.float64 else 1e-4  # of sums that cancel
    limit = {"rtol": 4 * UNIT[dtype], "atol": 64 * UNIT[dtype] + least}
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.detach().double().cpu(), b.detach(), **limit)
    if multiplier == 1:
        pointwise = torch.randn(6, channels, 1, 1, generator=torch.Generator().manual_seed(2)).to(dtype)
        x, weight, bias = (t.to(device) for t in tensors)
        block = separable_conv2d(x, weight, bias, pointwise.to(device), None, *conv, "relu", "identity")
        through = F.conv2d(want.detach().relu(), pointwise.double())
        torch.testing.assert_close(block.double().cpu(), through, rtol=8 * UNIT[dtype], atol=256 * UNIT[dtype] + least)
