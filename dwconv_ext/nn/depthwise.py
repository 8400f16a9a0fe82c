"""DepthwiseConv2d: nn.Conv2d with groups=in_channels on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd import has_function_override
from ..ops.functional import IntOrPair, as_weights_layout, depthwise_conv2d, to_pair


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels.

    Same arguments less ``groups``, same ``state_dict``, all padding modes. ``out_channels`` must be a multiple of
    ``in_channels`` (the channel multiplier).

    Examples:
        >>> import torch
        >>> DepthwiseConv2d(32, 32, 3, padding=1)(torch.randn(1, 32, 56, 56)).shape
        torch.Size([1, 32, 56, 56])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # Python's own: numpy's are no constants to a compiler.
        kernel_size, stride, dilation = map(to_pair, ("kernel_size", "stride", "dilation"), (kernel_size, stride, dilation))
        if not isinstance(padding, str):
            padding = to_pair("padding", padding)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device, dtype
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch.fx's proxies; subclasses and modes that look for conv2d; a module that was edited.
        if (
            not isinstance(input, Tensor)
            or has_function_override(input, weight)
            or self.groups != self.in_channels
            or weight.shape[1] != 1
        ):
            return nn.Conv2d._conv_forward(self, input, weight, bias)
        input = as_weights_layout(input, weight)
        if self.padding_mode == "zeros":
            return depthwise_conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return depthwise_conv2d(padded, weight, bias, self.stride, 0, self.dilation)

    def __prepare_scriptable__(self) -> nn.Conv2d:
        """torch.jit.script, which reads a class's source, is given torch's module."""
        plain = nn.Conv2d.__new__(nn.Conv2d)
        plain.__dict__.update(self.__dict__)
        return plain
