"""DepthwiseConvTranspose2d and 1d: nn.ConvTranspose2d and 1d with groups=in_channels on this package's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.arguments import IntOrPair, positive_int, to_pair, to_single
from ..ops.autograd import has_function_override
from ..ops.conv_transpose import depthwise_conv_transpose1d, depthwise_conv_transpose2d
from ..ops.functional import as_weights_layout
from .scriptable import as_class


def is_ours(module: nn.Module, input: object) -> bool:
    """Whether the call is one for our kernels: torch.fx's proxies, subclasses and modes that look for conv_transpose, and modules
    that were edited are torch's."""
    weight = module.weight
    if not isinstance(input, Tensor) or has_function_override(input, weight):
        return False
    return module.groups == module.in_channels == weight.shape[0] and module.padding_mode == "zeros"


class _Transposed(nn.Module):
    """What the two have in common; `_sizes` brings a number or several into torch's form."""

    _sizes: Callable[[str, str, Any], Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        output_padding: IntOrPair = 0,
        bias: bool = True,
        dilation: IntOrPair = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        own = type(self).__name__
        in_channels = positive_int(own, "in_channels", in_channels)
        kernel_size, stride, padding, output_padding, dilation = (
            self._sizes(own, name, value)
            for name, value in (
                ("kernel_size", kernel_size),
                ("stride", stride),
                ("padding", padding),
                ("output_padding", output_padding),
                ("dilation", dilation),
            )
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, in_channels, bias, dilation, padding_mode,
            device, dtype,
        )  # fmt: skip

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script, which reads a class's source, is given torch's module."""
        return as_class(nn.ConvTranspose2d if isinstance(self, nn.ConvTranspose2d) else nn.ConvTranspose1d, self)


class DepthwiseConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels.

    Same arguments less ``groups``, same ``state_dict``, and a backward pass of its own.

    Args:
        in_channels: C.
        out_channels: a multiple of C (the channel multiplier).
        kernel_size: int or pair (height, width).
        stride: int or pair.
        padding: int or pair.
        output_padding: int or pair.
        bias: whether there is one.
        dilation: int or pair.
        padding_mode: ``zeros``.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C, H, W) or (C, H, W) -> (N, out_channels, outH, outW) or without N, as of nn.ConvTranspose2d, in the input's layout.
        ``output_size`` may be given in the forward pass, in the place of output_padding.

    Raises:
        ValueError: in_channels that is not a positive int, out_channels that is no multiple of it, another mode; in the forward
            pass an output_size that the input cannot have.
        TypeError: kernel_size, stride, padding, output_padding or dilation that is neither an int nor a pair of ints.
        RuntimeError: in the forward pass, an input that does not fit, as in ``depthwise_conv_transpose2d``.

    Examples:
        >>> import torch
        >>> layer = DepthwiseConvTranspose2d(32, 32, 3, stride=2, padding=1)
        >>> layer(torch.randn(1, 32, 28, 28), output_size=(56, 56)).shape
        torch.Size([1, 32, 56, 56])

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, chapter 4.
    """

    _sizes = staticmethod(to_pair)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if not is_ours(self, input):
            return nn.ConvTranspose2d.forward(self, input, output_size)
        padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        input = as_weights_layout(input, self.weight)
        return depthwise_conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, tuple(padding), self.dilation
        )  # fmt: skip


class DepthwiseConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels.

    Same arguments less ``groups``, same ``state_dict``, and a backward pass of its own.

    Args:
        in_channels: C.
        out_channels: a multiple of C (the channel multiplier).
        kernel_size: int or 1-tuple.
        stride: int or 1-tuple.
        padding: int or 1-tuple.
        output_padding: int or 1-tuple.
        bias: whether there is one.
        dilation: int or 1-tuple.
        padding_mode: ``zeros``.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C, L) or (C, L) -> (N, out_channels, outL) or without N, as of nn.ConvTranspose1d, contiguous or with the strides of
        (N, L, C) as the input. ``output_size`` may be given in the forward pass, in the place of output_padding.

    Raises:
        ValueError: as of ``DepthwiseConvTranspose2d``.
        TypeError: kernel_size, stride, padding, output_padding or dilation that is neither an int nor a 1-tuple.
        RuntimeError: as of ``DepthwiseConvTranspose2d``.

    Examples:
        >>> import torch
        >>> DepthwiseConvTranspose1d(32, 32, 4, stride=2, padding=1)(torch.randn(1, 32, 100)).shape
        torch.Size([1, 32, 200])

    Source: Dumoulin and Visin, arXiv:1603.07285, chapter 4.
    """

    _sizes = staticmethod(to_single)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if not is_ours(self, input):
            return nn.ConvTranspose1d.forward(self, input, output_size)
        padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 1, self.dilation)
        return depthwise_conv_transpose1d(
            input, self.weight, self.bias, self.stride, self.padding, tuple(padding), self.dilation
        )  # fmt: skip
