"""DepthwiseConv1d: nn.Conv1d with groups=in_channels on this package's kernels, causal where asked."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.arguments import PADDING_1D, IntOrSingle, positive_int, to_single
from ..ops.autograd import has_function_override
from ..ops.conv1d import depthwise_conv1d
from .scriptable import as_class


class DepthwiseConv1d(nn.Conv1d):
    """``nn.Conv1d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels; causal too.

    Same arguments less ``groups``, same ``state_dict``, all padding modes, and a backward pass of its own.

    Args:
        in_channels: C.
        out_channels: a multiple of C (the channel multiplier).
        kernel_size: int or 1-tuple.
        stride: int or 1-tuple.
        padding: int, 1-tuple, ``'same'`` or ``'valid'``, as in ``depthwise_conv1d``; 0 where causal.
        dilation: int or 1-tuple.
        bias: whether there is one.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``; ``zeros`` where causal.
        device: of the parameters.
        dtype: of the parameters.
        causal: (kernel_size - 1) * dilation zeros on the left alone.

    Shape:
        (N, C, L) or (C, L) -> (N, out_channels, outL) or without N, as of nn.Conv1d, in the input's layout. A causal one may be
        called with ``state``, and returns the next block's with its output, as ``depthwise_conv1d`` does.

    Raises:
        ValueError: in_channels that is not a positive int, out_channels that is no multiple of it, another padding or mode, a
            padding or mode that goes with no causal one; in the forward pass, a state where it is not causal.
        TypeError: kernel_size, stride, padding or dilation that is neither an int nor a 1-tuple; causal that is no bool.
        RuntimeError: in the forward pass, an input that does not fit, as in ``depthwise_conv1d``.

    Examples:
        >>> import torch
        >>> DepthwiseConv1d(256, 256, 31, padding=15)(torch.randn(8, 256, 400)).shape
        torch.Size([8, 256, 400])

    Source: Gulati et al., "Conformer", arXiv:2005.08100, section 2.2.
    """

    causal = False  # of an nn.Conv1d that convert has given this class

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrSingle,
        stride: IntOrSingle = 1,
        padding: str | IntOrSingle = 0,
        dilation: IntOrSingle = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        causal: bool = False,
    ) -> None:
        own = type(self).__name__
        in_channels = positive_int(own, "in_channels", in_channels)
        kernel_size, stride = to_single(own, "kernel_size", kernel_size), to_single(own, "stride", stride)
        dilation = to_single(own, "dilation", dilation)
        if not isinstance(padding, str):
            padding = to_single(own, "padding", padding, PADDING_1D)
        if not isinstance(causal, bool):
            raise TypeError(f"{own}: causal must be a bool, but got {causal!r}")
        if causal and padding not in (0, "valid"):
            wanted = "padding must be 0 where causal, which has (kernel_size - 1) * dilation zeros on the left"
            raise ValueError(f"{own}: {wanted}, but got {padding!r}")
        if causal and padding_mode != "zeros":
            raise ValueError(f"{own}: padding_mode must be 'zeros' where causal, but got {padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device, dtype
        )
        if causal:
            self.causal = True

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if state is None:
            return self._conv_forward(input, self.weight, self.bias)
        if not self.causal:
            raise ValueError(f"{type(self).__name__}: state is for a causal convolution: give causal=True")
        return depthwise_conv1d(input, self.weight, self.bias, self.stride, 0, self.dilation, state=state)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch.fx's proxies; subclasses and modes that look for conv1d; a module that was edited.
        if (
            not isinstance(input, Tensor)
            or has_function_override(input, weight)
            or self.groups != self.in_channels
            or weight.shape[1] != 1
        ):
            if self.causal:
                input = F.pad(input, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
            return nn.Conv1d._conv_forward(self, input, weight, bias)
        if self.padding_mode == "zeros":
            return depthwise_conv1d(input, weight, bias, self.stride, self.padding, self.dilation, causal=self.causal)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return depthwise_conv1d(padded, weight, bias, self.stride, 0, self.dilation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", causal=True" if self.causal else "")

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script, which reads a class's source, is given torch's module."""
        if self.causal:
            raise TypeError(f"{type(self).__name__}: torch.jit.script has no module for a causal one")
        return as_class(nn.Conv1d, self)
