"""DepthwiseConv2d: nn.Conv2d with groups=in_channels on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.arguments import PADDING, IntOrPair, positive_int, to_pair
from ..ops.autograd import has_function_override
from ..ops.functional import as_weights_layout, depthwise_conv2d
from .scriptable import as_class


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels.

    Same arguments less ``groups``, same ``state_dict``, all padding modes, and a backward pass of its own.

    Args:
        in_channels: C.
        out_channels: a multiple of C (the channel multiplier).
        kernel_size: int or pair (height, width).
        stride: int or pair.
        padding: int, pair, ``'same'`` or ``'valid'``, as in ``depthwise_conv2d``.
        dilation: int or pair.
        bias: whether there is one.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C, H, W) or (C, H, W) -> (N, out_channels, outH, outW) or without N, as of nn.Conv2d, in the input's layout.

    Raises:
        ValueError: in_channels that is not a positive int, out_channels that is no multiple of it, another padding or mode.
        TypeError: kernel_size, stride, padding or dilation that is neither an int nor a pair of ints.
        RuntimeError: in the forward pass, an input that does not fit, as in ``depthwise_conv2d``.

    Examples:
        >>> import torch
        >>> DepthwiseConv2d(32, 32, 3, padding=1)(torch.randn(1, 32, 56, 56)).shape
        torch.Size([1, 32, 56, 56])

    Source: Howard et al., "MobileNets", arXiv:1704.04861, section 3.1.
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
        own = type(self).__name__
        in_channels = positive_int(own, "in_channels", in_channels)
        kernel_size, stride = to_pair(own, "kernel_size", kernel_size), to_pair(own, "stride", stride)
        dilation = to_pair(own, "dilation", dilation)
        if not isinstance(padding, str):
            padding = to_pair(own, "padding", padding, PADDING)
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
        return as_class(nn.Conv2d, self)
