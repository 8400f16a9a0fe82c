"""Depthwise transposed convolution: the functions and the derivatives of their op.

The transposed convolution y = T(x, w) is the convolution's adjoint in its input, x the gradient of an output, y that of an input.
With the convolution g * w and its weight's adjoint B_w:

    vjp of y     g_x = g * w,  g_w = B_w(x, g),  g_b = sum g
    jvp of y     y' = T(x', w) + T(x, w') + b'

Both are other ops' passes, which have derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import SLOPE
from .arguments import IntOrPair, at_least, check_activation, check_number, check_tensor, to_pair, to_single
from .autograd import DepthwiseConv2dFunction, below_autograd, call, in_its_dtypes, is_training_step, single_level
from .conv1d import check_bias, check_floating, check_like, refuse
from .functional import batched_image

ops = torch.ops.dwconv_ext


def _beyond(conv: tuple, output_padding: Sequence[int]) -> list[int]:
    """How many rows and columns the convolution of y has beyond those of x: where output_padding is not below the stride."""
    return [pad // stride for pad, stride in zip(output_padding, conv[0], strict=True)]


def _convolution(grad: Tensor, w: Tensor, x: Tensor, conv: tuple, output_padding: Sequence[int]) -> Tensor:
    """g * w, of x's size."""
    y = call(ops.depthwise_conv2d.default, grad, w, None, *conv)
    return y[:, :, : x.shape[2], : x.shape[3]] if any(_beyond(conv, output_padding)) else y


def _to_weight(grad: Tensor, w: Tensor, x: Tensor, conv: tuple, output_padding: Sequence[int]) -> Tensor:
    """B_w(x, g)."""
    height, width = _beyond(conv, output_padding)
    if height or width:
        x = F.pad(x, (0, width, 0, height))
    return call(ops.depthwise_conv2d_backward.default, x, grad, w, *conv, (False, True, False))[1]


class DepthwiseConvTranspose2dFunction(torch.autograd.Function):
    """``depthwise_conv_transpose2d`` as an autograd Function:
    ``apply(input, weight, bias, stride, padding, output_padding, dilation)`` with pairs.

    Backward, double backward and forward mode; each gradient is computed only when needed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, dilation: Any
    ) -> Tensor:  # fmt: skip
        with below_autograd():
            return ops.depthwise_conv_transpose2d.default(x, w, b, stride, padding, output_padding, dilation)

    setup_context = staticmethod(DepthwiseConv2dFunction.setup_context)

    @staticmethod
    @in_its_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        stride, padding, output_padding, dilation = ctx.conv
        conv, multiplier = (stride, padding, dilation), w.shape[1]
        to_x = to_w = to_b = None
        # Each of a channel's filters by itself: together they would be no depthwise convolution.
        parts = [(grad, w)] if multiplier == 1 else [(grad[:, m::multiplier], w[:, m : m + 1]) for m in range(multiplier)]
        if ctx.needs_input_grad[0]:
            to_x = [_convolution(g, f, x, conv, output_padding) for g, f in parts]
            to_x = to_x[0] if multiplier == 1 else sum(to_x[1:], to_x[0])
        if ctx.needs_input_grad[1]:
            to_w = [_to_weight(g, f, x, conv, output_padding) for g, f in parts]
            to_w = to_w[0] if multiplier == 1 else torch.cat(to_w, 1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_b = grad.sum((0, 2, 3))
        return to_x, to_w, to_b, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: Any) -> Tensor | None:
        x, w = ctx.saved_tensors
        op = ops.depthwise_conv_transpose2d
        along_w = None if dw is None else op(x, dw, db, *ctx.conv)
        if dx is None and dw is None:
            return None if db is None else op(torch.zeros_like(x), w, db, *ctx.conv)
        if dx is None:
            return along_w
        along_x = op(dx, w, db if dw is None else None, *ctx.conv)
        return along_x if along_w is None else along_x + along_w


_Function = single_level(DepthwiseConvTranspose2dFunction)


def _transposed(op: str, x: Tensor, w: Tensor, b: Tensor | None, conv: tuple, act: str, slope: float) -> Tensor:
    if act == "identity" and is_training_step(x, w, b):
        return _Function.apply(x, w, b, *conv)
    return call(ops.depthwise_conv_transpose2d.default, x, w, b, *conv, act, slope)


def _check(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, act: str, slope: float) -> None:
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    check_tensor(op, "bias", bias, optional=True)
    check_activation(op, "act", act)
    check_number(op, "slope", slope)


def depthwise_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    act: str = "identity",
    *,
    slope: float = SLOPE,
) -> Tensor:
    """Depthwise transposed 2-D convolution:
    ``act(F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups=C, dilation))``.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16. NCHW and channels_last are both native,
            and the output has the input's layout; other strides are accepted.
        weight: (C, multiplier, kH, kW), of input's dtype and device; any filter size. Output channel ``c * multiplier + m`` is
            filter m of input channel c. Kernels are made for a multiplier of 1.
        bias: (C * multiplier,) or None.
        stride: int or pair (height, width), positive: how far apart the input's pixels lie in the output.
        padding: int or pair; how much of the output is cut off on each side.
        output_padding: int or pair; how much is added to it at the end of each side, smaller than stride or dilation.
        dilation: spacing of the filter's taps in pixels, int or pair, positive.
        act: applied to the sums before they are rounded and written, as ``depthwise_conv2d``'s.
        slope: negative slope where act is leaky_relu; 0.01 by default, as torch's.

    Returns:
        (N, C * multiplier, outH, outW) with outH = (H - 1) stride - 2 padding + dilation (kH - 1) + output_padding + 1, or
        without N. Sums are taken in float32 (float64 for float64), in an order that does not depend on the number of threads.

    Raises:
        RuntimeError: wrong rank, channels, dtype, device, an output that is empty or beyond memory, an output_padding that is
            not smaller than stride or dilation, or an unknown activation.
        TypeError: input, weight or bias that is no Tensor; stride, padding, output_padding or dilation that is neither an int nor
            a pair of ints; slope that is no number.
        ValueError: stride, padding, output_padding or dilation beyond 64 bits.

    Examples:
        >>> x = torch.randn(8, 32, 28, 28)
        >>> depthwise_conv_transpose2d(x, torch.randn(32, 1, 4, 4), stride=2, padding=1).shape
        torch.Size([8, 32, 56, 56])

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, chapter 4.
    """
    op = "depthwise_conv_transpose2d"
    _check(op, input, weight, bias, act, slope)
    batched, unbatched = batched_image(op, input)
    given = (("stride", stride), ("padding", padding), ("output_padding", output_padding), ("dilation", dilation))
    output = _transposed(op, batched, weight, bias, tuple(to_pair(op, *each) for each in given), act, slope)
    return output.squeeze(0) if unbatched else output


def _check_row(op: str, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """What the op would tell of an image."""
    if x.dim() != 3:
        refuse(op, f"input must be 2-dimensional (C, L) or 3-dimensional (N, C, L), but got shape {list(x.shape)}")
    if w.dim() != 3:
        refuse(op, f"weight must be 3-dimensional (C, multiplier, K), but got shape {list(w.shape)}")
    check_floating(op, x)
    check_like(op, "weight", w, x)
    channels, filters = x.shape[1], w.shape[0] * w.shape[1]
    if channels == 0 or x.shape[2] == 0:
        refuse(op, f"input must have at least one channel and a non-empty length, but got shape {list(x.shape)}")
    if w.shape[0] != channels or filters == 0 or w.shape[2] == 0:
        wanted = f"(C, multiplier, K) with C = {channels}, input's channels, and a non-empty filter"
        refuse(op, f"weight must have shape {wanted}, but got {list(w.shape)}")
    if b is not None:
        check_bias(op, b, filters, x)


def _check_row_numbers(op: str, length: int, taps: int, stride: int, padding: int, more: int, dilation: int) -> None:
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("output_padding", more, 0),
        ("dilation", dilation, 1),
    ):
        if value < least:
            refuse(op, f"{name} {at_least(least)}, but got {value}")
    if more >= max(stride, dilation):
        wanted = "output_padding must be smaller than either stride or dilation"
        refuse(op, f"{wanted}, but got output_padding {more}, stride {stride} and dilation {dilation}")
    out = (length - 1) * stride - 2 * padding + dilation * (taps - 1) + more + 1
    if out <= 0:
        formula = "(input - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1"
        refuse(op, f"the output is too small: {formula} must be positive, but is {out}")


def depthwise_conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    act: str = "identity",
    *,
    slope: float = SLOPE,
) -> Tensor:
    """Depthwise transposed 1-D convolution:
    ``act(F.conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups=C, dilation))``.

    The same as the 2-D one of an image of one row.

    Args:
        input: (N, C, L) or (C, L), contiguous or with the strides of (N, L, C), which the output has too.
        weight: (C, multiplier, K).
        bias: (C * multiplier,) or None.
        stride: int or 1-tuple.
        padding: int or 1-tuple.
        output_padding: int or 1-tuple.
        dilation: int or 1-tuple.
        act: as ``depthwise_conv_transpose2d``'s.
        slope: as ``depthwise_conv_transpose2d``'s.

    Returns:
        (N, C * multiplier, outL) with outL = (L - 1) stride - 2 padding + dilation (K - 1) + output_padding + 1, or without N.

    Raises:
        RuntimeError: as in ``depthwise_conv_transpose2d``.
        TypeError: input, weight or bias that is no Tensor; a number that is neither an int nor a 1-tuple.
        ValueError: as in ``depthwise_conv_transpose2d``.

    Examples:
        >>> depthwise_conv_transpose1d(torch.randn(8, 32, 100), torch.randn(32, 1, 4), stride=2, padding=1).shape
        torch.Size([8, 32, 200])

    Source: Dumoulin and Visin, arXiv:1603.07285, chapter 4.
    """
    op = "depthwise_conv_transpose1d"
    _check(op, input, weight, bias, act, slope)
    x = input.unsqueeze(0) if input.dim() == 2 else input
    _check_row(op, x, weight, bias)
    given = (("stride", stride), ("padding", padding), ("output_padding", output_padding), ("dilation", dilation))
    numbers = tuple(to_single(op, *each) for each in given)
    _check_row_numbers(op, x.shape[2], weight.shape[2], *numbers)
    conv = tuple(zip((1, 0, 0, 1), numbers, strict=True))
    output = _transposed(op, x.unsqueeze(2), weight.unsqueeze(2), bias, conv, act, slope).squeeze(2)
    return output if x is input else output.squeeze(0)
