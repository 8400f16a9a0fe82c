"""YOLOX's depthwise-separable convolution, one kernel in eval mode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from ..convert import convert
from ..ops.arguments import check_one_of, positive_int

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: nn.SiLU(inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "lrelu": lambda: nn.LeakyReLU(0.1, inplace=True),
}


def base_conv(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, act: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), act=ACTIVATIONS[act]()))


class DWConv(nn.Module):
    """YOLOX's ``DWConv``: depthwise k x k and pointwise 1x1, each with BatchNorm and activation. Its state_dict is YOLOX's.

    Args:
        in_channels: of the block.
        out_channels: of the block.
        ksize: odd filter size.
        stride: of the depthwise convolution.
        act: ``silu``, ``relu`` or ``lrelu`` (slope 0.1).

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: a size that is not a positive int, an even ksize, an unknown act.

    Source: Ge et al., "YOLOX", arXiv:2107.08430.
    """

    def __init__(self, in_channels: int, out_channels: int, ksize: int, stride: int = 1, act: str = "silu") -> None:
        super().__init__()
        own = type(self).__name__
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("ksize", ksize), ("stride", stride),
        ):  # fmt: skip
            positive_int(own, name, value)
        if ksize % 2 == 0:
            raise ValueError(f"{own}: ksize must be odd, but got {ksize}")
        check_one_of(own, "act", act, ACTIVATIONS)
        self.dconv = base_conv(in_channels, in_channels, ksize, stride, in_channels, act)
        self.pconv = base_conv(in_channels, out_channels, 1, 1, 1, act)
        convert(self, inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.pconv(self.dconv(input))
