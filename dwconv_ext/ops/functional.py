"""The functions: what a caller may write, brought into the form the ops take."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, SLOPE
from .autograd import DepthwiseConv2dFunction, call, is_training_step, single_level

ops = torch.ops.dwconv_ext

IntOrPair = int | Sequence[int]
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


def _integer(value: object) -> int | None:
    """An int of Python's, numpy's or a compiler's, as the ops take it; None for anything else."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return None if isinstance(value, Tensor) else operator.index(value)  # numpy's bool has no index
    except TypeError:
        return None


def to_pair(name: str, value: IntOrPair) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:  # a module's: no time lost
        return value
    values = [_integer(v) for v in (value if isinstance(value, (tuple, list, torch.Size)) else (value,))]
    if any(v is None for v in values) or len(values) not in (1, 2):
        raise TypeError(f"{name} must be an int or a pair of ints, but got {value!r}")
    return values[0], values[-1]


def _tensor(name: str, value: object, optional: bool = False) -> None:
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")


def _batched(name: str, input: Tensor) -> tuple[Tensor, bool]:
    if input.dim() == 3:
        return input.unsqueeze(0), True
    if input.dim() != 4:
        raise RuntimeError(
            f"{name}: input must be 3-dimensional (C, H, W) or 4-dimensional (N, C, H, W), but got shape {list(input.shape)}"
        )
    return input, False


def padding_of(
    padding: str | IntOrPair, filter_size: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros on each side, and how many more at the end: one where 'same' is lopsided (even filters)."""
    if not isinstance(padding, str):
        return to_pair("padding", padding), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid', an int or a pair of ints, but got {padding!r}")
    if tuple(stride) != (1, 1):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions (stride is {tuple(stride)})")
    height, width = (d * (k - 1) for d, k in zip(dilation, filter_size, strict=True))
    return (height // 2, width // 2), (height % 2, width % 2)


def resolve_padding(
    input: Tensor, weight: Tensor, padding: str | IntOrPair, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input, with what is more at its end, and the symmetric padding left to the op."""
    if padding == "same" and weight.dim() != 4:
        raise RuntimeError(f"weight must be 4-dimensional (C * multiplier, 1, kH, kW), but got shape {list(weight.shape)}")
    both, more = padding_of(padding, weight.shape[2:], stride, dilation)
    return F.pad(input, (0, more[1], 0, more[0])) if any(more) else input, both


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
        padding: zeros added on each side, int or pair; ``'valid'`` (none) or ``'same'`` (output size = input size, stride 1).
        dilation: spacing of the filter's taps in pixels, int or pair, positive.
        act: applied to the sums before they are rounded and written: ``identity``, ``relu``, ``relu6``, ``silu``,
            ``hardswish``, ``gelu``, ``gelu_tanh``, ``leaky_relu``. Where a derivative is wanted it runs by itself, as torch's.
        slope: negative slope where act is leaky_relu; 0.01 by default, as torch's.

    Returns:
        (N, C * multiplier, outH, outW) with outH = floor((H + 2 padding - dilation (kH - 1) - 1) / stride) + 1, or without N.
        Sums are taken in float32 (float64 for float64), in an order that does not depend on the number of threads.

    Raises:
        RuntimeError: wrong rank, channels, dtype, device, a filter larger than the padded input, a padding or an output beyond 64
            bits or memory, or an unknown activation.
        TypeError: stride, padding or dilation that is neither an int nor a pair of ints.
        ValueError: padding is another string than those above.

    Examples:
        >>> x = torch.randn(8, 32, 112, 112)
        >>> depthwise_conv2d(x, torch.randn(32, 1, 3, 3), padding=1).shape
        torch.Size([8, 32, 112, 112])

    Source: Howard et al., "MobileNets", arXiv:1704.04861, section 3.1.
    """
    _tensor("input", input)
    _tensor("weight", weight)
    _tensor("bias", bias, optional=True)
    if act not in ACTIVATIONS:
        raise RuntimeError(f"depthwise_conv2d: act must be one of {', '.join(ACTIVATIONS)}, but got {act!r}")
    batched, unbatched = _batched("depthwise_conv2d", input)
    stride, dilation = to_pair("stride", stride), to_pair("dilation", dilation)
    batched, padding = resolve_padding(batched, weight, padding, stride, dilation)
    if act == "identity" and is_training_step(batched, weight, bias):
        output = _DepthwiseConv2d.apply(batched, weight, bias, stride, padding, dilation)
    else:
        output = call(ops.depthwise_conv2d.default, batched, weight, bias, stride, padding, dilation, act, slope)
    return output.squeeze(0) if unbatched else output


def as_weights_layout(input: Tensor, weight: Tensor) -> Tensor:
    """The input in channels_last where the weight is, as nn.Conv2d's output is in either case."""
    if weight.dim() != 4 or weight.stride(1) != 1 or input.dim() != 4:
        return input
    _, c, h, w = weight.shape
    strides = weight.stride()[1:]
    if strides == (1, w * c, c) and strides != (h * w, w, 1):
        return input.contiguous(memory_format=torch.channels_last)
    return input


def _allow_tf32(input: Tensor) -> bool:
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
        dw_act: after the depthwise stage: ``identity``, ``relu``, ``relu6``, ``silu``, ``hardswish``, ``gelu``, ``gelu_tanh``,
            ``leaky_relu``.
        pw_act: after the pointwise stage, one of the same.
        residual: added after pw_act; of the output's shape.
        dw_slope: negative slope where dw_act is leaky_relu; 0.01 by default, as torch's.
        pw_slope: negative slope where pw_act is leaky_relu.

    Returns:
        (N, out_channels, outH, outW), in the input's layout.

    Raises:
        RuntimeError: as in ``depthwise_conv2d``; an unknown activation; a residual of another shape.
    """
    _tensor("input", input)
    _tensor("dw_weight", dw_weight)
    _tensor("dw_bias", dw_bias, optional=True)
    _tensor("pw_weight", pw_weight)
    _tensor("pw_bias", pw_bias, optional=True)
    _tensor("residual", residual, optional=True)
    batched, unbatched = _batched("separable_conv2d", input)
    if unbatched and residual is not None:
        residual = residual.unsqueeze(0)
    stride, dilation = to_pair("stride", stride), to_pair("dilation", dilation)
    batched, padding = resolve_padding(batched, dw_weight, padding, stride, dilation)
    output = call(
        ops.separable_conv2d.default,
        batched, dw_weight, dw_bias, pw_weight, pw_bias, stride, padding, dilation, dw_act, pw_act, residual, dw_slope, pw_slope,
        _allow_tf32(input),
    )  # fmt: skip
    return output.squeeze(0) if unbatched else output
