"""The functions: what a caller may write, brought into the form the ops take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import SLOPE
from .arguments import PADDINGS, IntOrPair, check_activation, check_number, check_tensor, to_padding, to_pair
from .autograd import DepthwiseConv2dFunction, call, is_training_step, single_level

ops = torch.ops.dwconv_ext

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # that have kernels


_DepthwiseConv2d = single_level(DepthwiseConv2dFunction)


def name_of(dtype: torch.dtype) -> str:
    """As C++ has it."""
    return str(dtype).removeprefix("torch.")


def as_autocast(t: Tensor | None) -> Tensor | None:
    """In the dtype that autocast would run a convolution in: float64 and integers are left alone."""
    if t is None or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    device = t.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def batched_image(op: str, input: Tensor) -> tuple[Tensor, bool]:
    if input.dim() == 3:
        return input.unsqueeze(0), True
    if input.dim() != 4:
        raise RuntimeError(
            f"{op}: input must be 3-dimensional (C, H, W) or 4-dimensional (N, C, H, W), but got shape {list(input.shape)}"
        )
    return input, False


def padding_of(
    op: str, padding: str | IntOrPair, filter_size: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, ...]:
    """As the ops take it: of height and width, or of four ends."""
    if not isinstance(padding, str):
        return to_padding(op, padding)
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f"{op}: padding must be {PADDINGS}, but got {padding!r}")
    if tuple(stride) != (1, 1):
        raise RuntimeError(f"{op}: padding='same' is not supported for strided convolutions, but got stride {tuple(stride)}")
    if len(filter_size) != 2:
        return 0, 0  # the op has the message
    height, width = (d * (k - 1) for d, k in zip(dilation, filter_size, strict=True))
    if height % 2 == width % 2 == 0:
        return height // 2, width // 2
    return height // 2, height - height // 2, width // 2, width - width // 2


def convolve(
    x: Tensor, w: Tensor, b: Tensor | None, stride: tuple, padding: tuple, dilation: tuple, act: str, slope: float
) -> Tensor:
    """The op, by the shortest way."""
    if act == "identity" and is_training_step(x, w, b):
        return _DepthwiseConv2d.apply(x, w, b, stride, padding, dilation)
    return call(ops.depthwise_conv2d.default, x, w, b, stride, padding, dilation, act, slope)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    act: str = "identity",
    *,
    slope: float = SLOPE,
) -> Tensor:
    """Depthwise 2-D convolution: ``act(F.conv2d(input, weight, bias, stride, padding, dilation, groups=C))``.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16. NCHW and channels_last are both native,
            and the output has the input's layout; other strides are accepted.
        weight: (C * multiplier, 1, kH, kW), of input's dtype and device; any filter size. Output channel
            ``c * multiplier + m`` is filter m of input channel c.
        bias: (C * multiplier,) or None.
        stride: int or pair (height, width), positive.
        padding: zeros added on each side, int or pair, or four ints (top, bottom, left, right); ``'valid'`` (none) or ``'same'``
            (output size = input size, stride 1).
        dilation: spacing of the filter's taps in pixels, int or pair, positive.
        act: applied to the sums before they are rounded and written: ``identity``, ``relu``, ``relu6``, ``silu``,
            ``hardswish``, ``gelu``, ``gelu_tanh``, ``leaky_relu``. Where a derivative is wanted it runs by itself, as torch's.
        slope: negative slope where act is leaky_relu; 0.01 by default, as torch's.

    Returns:
        (N, C * multiplier, outH, outW) with outH = floor((H + 2 padding - dilation (kH - 1) - 1) / stride) + 1, or without N.
        Sums are taken in float32 (float64 for float64), in an order that does not depend on the number of threads.

    Raises:
        RuntimeError: wrong rank, channels, dtype, device, a filter larger than the padded input, an output beyond 64 bits or
            memory, or an unknown activation.
        TypeError: input, weight or bias that is no Tensor; stride, padding or dilation that is neither an int nor a pair of ints;
            slope that is no number.
        ValueError: padding is another string than those above; stride, padding or dilation beyond 64 bits.

    Examples:
        >>> x = torch.randn(8, 32, 112, 112)
        >>> depthwise_conv2d(x, torch.randn(32, 1, 3, 3), padding=1).shape
        torch.Size([8, 32, 112, 112])

    Source: Howard et al., "MobileNets", arXiv:1704.04861, section 3.1.
    """
    op = "depthwise_conv2d"
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    check_tensor(op, "bias", bias, optional=True)
    check_activation(op, "act", act)
    check_number(op, "slope", slope)
    batched, unbatched = batched_image(op, input)
    stride, dilation = to_pair(op, "stride", stride), to_pair(op, "dilation", dilation)
    padding = padding_of(op, padding, weight.shape[2:], stride, dilation)
    output = convolve(batched, weight, bias, stride, padding, dilation, act, slope)
    return output.squeeze(0) if unbatched else output


def as_weights_layout(input: Tensor, weight: Tensor) -> Tensor:
    """The input in channels_last where the weight is, as nn.Conv2d's output is in either case."""
    if weight.dim() != 4 or weight.stride(1) != 1 or input.dim() != 4:
        return input
    _, c, h, w = weight.shape
    strides = weight.stride()[1:]
    if strides == (1, w * c, c) and strides != (h * w, w, 1):
        input = input.contiguous(memory_format=torch.channels_last)
        if input.shape[1] == 1 and input.stride(1) != 1:
            # One channel is contiguous in both layouts: only the strides can say that the output is to be channels_last.
            input = input.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2)
    return input


def allows_tf32(input: Tensor) -> bool:
    """Whether torch lets its own convolutions round float32 operands to tf32 on this tensor's device."""
    return input.is_cuda and input.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def separable_conv2d(
    input: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    stride: IntOrPair = 1,
    padding: str | IntOrPair = 0,
    dilation: IntOrPair = 1,
    dw_act: str = "relu",
    pw_act: str = "relu",
    residual: Tensor | None = None,
    *,
    dw_slope: float = SLOPE,
    pw_slope: float = SLOPE,
) -> Tensor:
    """Depthwise-separable convolution in one pass, the intermediate never written to memory.

    Equals ``pw_act(F.conv2d(dw_act(F.conv2d(input, dw_weight, dw_bias, ..., groups=C)), pw_weight, pw_bias)) + residual``;
    on the CPU the intermediate is kept in the accumulation type (float32; float64 for float64), and the weights are packed at
    every call (``FusedDSConv`` keeps them packed); on CUDA it is in the input's type, as tensor cores read it. float32 on
    CUDA uses tf32 where ``torch.backends.cudnn.allow_tf32`` lets nn.Conv2d use it, and the kernel is a pair of kernels where the
    plan expects that to be faster. BatchNorm is expected folded into the weights and biases, as ``FusedDSConv`` does.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, NCHW or channels_last.
        dw_weight: (C, 1, kH, kW).
        dw_bias: (C,) or None.
        pw_weight: (out_channels, C, 1, 1).
        pw_bias: (out_channels,) or None.
        stride: of the depthwise convolution, as in ``depthwise_conv2d``.
        padding: of the depthwise convolution, too.
        dilation: of the depthwise convolution, too.
        dw_act: after the depthwise stage, one of ``depthwise_conv2d``'s ``act``.
        pw_act: after the pointwise stage, one of the same.
        residual: added after pw_act; of the output's shape.
        dw_slope: negative slope where dw_act is leaky_relu; 0.01 by default, as torch's.
        pw_slope: negative slope where pw_act is leaky_relu.

    Returns:
        (N, out_channels, outH, outW), in the input's layout; without N where input is.

    Raises:
        RuntimeError: as in ``depthwise_conv2d``; a residual of another shape.
        TypeError: as in ``depthwise_conv2d``.
        ValueError: as in ``depthwise_conv2d``.

    Examples:
        >>> x, dw_weight, pw_weight = torch.randn(8, 32, 56, 56), torch.randn(32, 1, 3, 3), torch.randn(64, 32, 1, 1)
        >>> separable_conv2d(x, dw_weight, None, pw_weight, None, padding=1).shape
        torch.Size([8, 64, 56, 56])

    Source: Howard et al., "MobileNets", arXiv:1704.04861, section 3.1.
    """
    op = "separable_conv2d"
    for name, tensor in (("input", input), ("dw_weight", dw_weight), ("pw_weight", pw_weight)):
        check_tensor(op, name, tensor)
    for name, tensor in (("dw_bias", dw_bias), ("pw_bias", pw_bias), ("residual", residual)):
        check_tensor(op, name, tensor, optional=True)
    for stage, act, slope in (("dw", dw_act, dw_slope), ("pw", pw_act, pw_slope)):
        check_activation(op, f"{stage}_act", act)
        check_number(op, f"{stage}_slope", slope)
    batched, unbatched = batched_image(op, input)
    if unbatched and residual is not None:
        if residual.dim() != 3:
            wanted = "3-dimensional (out_channels, outH, outW), as input is"
            raise RuntimeError(f"{op}: residual must be {wanted}, but got shape {list(residual.shape)}")
        residual = residual.unsqueeze(0)
    stride, dilation = to_pair(op, "stride", stride), to_pair(op, "dilation", dilation)
    padding = padding_of(op, padding, dw_weight.shape[2:], stride, dilation)
    output = call(
        ops.separable_conv2d.default,
        batched, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, dw_act, pw_act, residual, dw_slope, pw_slope,
        allows_tf32(input),
    )  # fmt: skip
    return output.squeeze(0) if unbatched else output
