"""Parameters and multiply-adds: of one convolution by formula, of a whole model by measurement.

With a filter of Dk x Dk, M input channels, N output channels and an output of Df x Df (Howard et al., arXiv:1704.04861,
section 3.1):

    standard     Dk Dk M N              parameters, times Df Df multiply-adds
    depthwise    Dk Dk M
    pointwise    M N
    separable    Dk Dk M + M N          1 / N + 1 / Dk^2 of the standard convolution
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .nn.conv_transpose import DepthwiseConvTranspose2d
from .nn.depthwise import DepthwiseConv2d
from .nn.depthwise1d import DepthwiseConv1d
from .nn.separable import FusedDSConv
from .ops.arguments import IntOrPair, check_kind, positive_int, positive_pair, shape_of
from .plan import plan


class Cost(NamedTuple):
    """Parameters, and multiply-adds (one multiplication with its addition; twice as many FLOPs) for one image."""

    parameters: int
    multiply_adds: int

    def __add__(self, other: tuple) -> Cost:  # of costs, not the concatenation of tuples
        return Cost(self.parameters + other[0], self.multiply_adds + other[1])


def _cost(function: str, kernel: IntOrPair, out_size: IntOrPair, **channels: int) -> Cost:
    op = f"cost.{function}"
    sizes = [positive_int(op, name, value) for name, value in channels.items()]
    parameters = math.prod((*positive_pair(op, "kernel", kernel), *sizes))
    return Cost(parameters, parameters * math.prod(positive_pair(op, "out_size", out_size)))


def standard(kernel: IntOrPair, in_channels: int, out_channels: int, out_size: IntOrPair = 1) -> Cost:
    """A standard convolution: Dk Dk M N parameters, times Df Df multiply-adds.

    Args:
        kernel: Dk, int or pair (height, width).
        in_channels: M.
        out_channels: N.
        out_size: Df, int or pair.

    Raises:
        TypeError: kernel or out_size that is neither an int nor a pair of ints.
        ValueError: a size that is not positive, channels that are not a positive int.

    Examples:
        >>> standard(3, 3, 4).parameters
        108
    """
    return _cost("standard", kernel, out_size, in_channels=in_channels, out_channels=out_channels)


def depthwise(kernel: IntOrPair, in_channels: int, out_size: IntOrPair = 1) -> Cost:
    """A depthwise convolution: Dk Dk M parameters, times Df Df multiply-adds.

    Args:
        kernel: Dk, int or pair (height, width).
        in_channels: M.
        out_size: Df, int or pair.

    Raises:
        TypeError: as in ``standard``.
        ValueError: as in ``standard``.

    Examples:
        >>> depthwise(3, 3).parameters
        27
    """
    return _cost("depthwise", kernel, out_size, in_channels=in_channels)


def pointwise(in_channels: int, out_channels: int, out_size: IntOrPair = 1) -> Cost:
    """A 1x1 convolution: M N parameters, times Df Df multiply-adds.

    Args:
        in_channels: M.
        out_channels: N.
        out_size: Df, int or pair (height, width).

    Raises:
        TypeError: as in ``standard``.
        ValueError: as in ``standard``.

    Examples:
        >>> pointwise(3, 4, 8)
        Cost(parameters=12, multiply_adds=768)
    """
    return _cost("pointwise", 1, out_size, in_channels=in_channels, out_channels=out_channels)


def separable(kernel: IntOrPair, in_channels: int, out_channels: int, out_size: IntOrPair = 1) -> Cost:
    """Depthwise, then pointwise: Dk Dk M + M N parameters, times Df Df multiply-adds.

    Args:
        kernel: Dk, int or pair (height, width).
        in_channels: M.
        out_channels: N.
        out_size: Df, int or pair.

    Raises:
        TypeError: as in ``standard``.
        ValueError: as in ``standard``.

    Examples:
        >>> separable(3, 3, 4).parameters
        39
    """
    return depthwise(kernel, in_channels, out_size) + pointwise(in_channels, out_channels, out_size)


def separable_ratio(kernel: IntOrPair, out_channels: int) -> float:
    """A separable convolution's cost over the standard one's: 1 / N + 1 / (Dk Dk).

    Args:
        kernel: Dk, int or pair (height, width).
        out_channels: N.

    Raises:
        TypeError: as in ``standard``.
        ValueError: as in ``standard``.

    Examples:
        >>> round(separable_ratio(3, 4), 3)
        0.361
    """
    weight = _cost("separable_ratio", kernel, 1).parameters
    return 1 / positive_int("cost.separable_ratio", "out_channels", out_channels) + 1 / weight


# --- a whole model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One layer that has parameters.

    Attributes:
        name: its path in the model.
        layer: its class.
        output: the output's shape.
        parameters: its own.
        multiply_adds: for the whole batch.
        kernel: ours, where it is ours.
    """

    name: str
    layer: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    kernel: str


@dataclass(frozen=True)
class CostTable:
    """The layers of a model; prints as a table with the sums.

    Attributes:
        rows: in the order of the forward pass.
    """

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    def __str__(self) -> str:
        head = ("name", "layer", "output", "parameters", "multiply-adds", "kernel")
        cells = [
            (r.name, r.layer, "x".join(map(str, r.output)), f"{r.parameters:,}", f"{r.multiply_adds:,}", r.kernel)
            for r in self.rows
        ]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}", "")
        widths = [max(len(row[i]) for row in (head, *cells, total)) for i in range(len(head))]
        align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
        lines = ["  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in (head, *cells, total)]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def table(model: nn.Module, input: Tensor | Sequence[int] | None = None) -> CostTable:
    """Every layer of a model with its output shape, parameters, multiply-adds and, where it is one of ours, its kernel.

    Shapes and counts come from torchinfo, which runs the model once, without gradients, in eval mode.

    Args:
        model: any module of one input.
        input: a tensor or its shape; by default one image of ``model.resolution`` (224 where it has none).

    Returns:
        The table; it prints with the sums.

    Raises:
        ModuleNotFoundError: torchinfo is not installed.
        TypeError: model is not an nn.Module, or input is neither a tensor nor a shape.

    Examples:
        >>> from dwconv_ext.models import MobileNetV1
        >>> table(MobileNetV1()).parameters
        4231976
    """
    check_kind("cost.table", "model", model, nn.Module, "an nn.Module")
    try:
        import torchinfo
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("dwconv_ext.cost.table needs torchinfo: pip install torchinfo") from error
    if input is None:
        size = getattr(model, "resolution", 224)
        input = (1, 3, size, size)
    if not isinstance(input, Tensor):
        reference = next(model.parameters(), torch.empty(0))
        input = torch.zeros(shape_of("cost.table", "input", input), dtype=reference.dtype, device=reference.device)
    info = torchinfo.summary(model, input_data=input, device=input.device, verbose=0, mode="eval")
    names = {id(module): name for name, module in model.named_modules()}
    fused = {id(part): block for block in model.modules() if isinstance(block, FusedDSConv) for part in block._parts()}
    rows = []
    for layer in info.summary_list:
        module = layer.module
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own == 0 or layer.is_recursive:
            continue
        kernel = ""
        ours = isinstance(module, (DepthwiseConv2d, DepthwiseConv1d))
        ours = ours or (isinstance(module, DepthwiseConvTranspose2d) and module.in_channels == module.out_channels)
        batched = len(layer.input_size) == (3 if isinstance(module, DepthwiseConv1d) else 4)
        if ours and batched and input.device.type == "cpu":
            seen = torch.empty(layer.input_size, dtype=input.dtype, device="meta")
            kernel = next((p.kernel for p in plan(fused.get(id(module), module), seen) if p.pass_ == "forward"), "")
        elif id(module) in fused:
            kernel = "(the same)"
        # BatchNorm is folded into its convolution in inference, and the literature counts it nowhere.
        macs = 0 if isinstance(module, nn.modules.batchnorm._BatchNorm) else layer.macs
        rows.append(Row(names[id(module)], type(module).__name__, tuple(layer.output_size), own, macs, kernel))
    return CostTable(tuple(rows))
