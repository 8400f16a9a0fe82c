"""Depthwise convolution in one dimension: an image of one row to the 2-D ops, by views; causal, whole or in a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import SLOPE
from .arguments import MOST_INT64, PADDINGS_1D, IntOrSingle, at_least, check_activation, check_number, check_tensor, to_single
from .autograd import call
from .functional import DTYPES, convolve

ops = torch.ops.dwconv_ext
STEP = "depthwise_conv1d_step"


def padding_of_length(op: str, padding: str | IntOrSingle, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after."""
    if isinstance(padding, (tuple, list)) and len(padding) == 2:
        left, right = (to_single(op, "padding", pad, PADDINGS_1D) for pad in padding)
        return left, right
    if not isinstance(padding, str):
        return (to_single(op, "padding", padding, PADDINGS_1D),) * 2
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f"{op}: padding must be {PADDINGS_1D}, but got {padding!r}")
    if stride != 1:
        raise RuntimeError(f"{op}: padding='same' is not supported for strided convolutions, but got stride ({stride},)")
    total = dilation * (taps - 1)
    return total // 2, total - total // 2


def refuse(op: str, message: str) -> None:
    raise RuntimeError(f"{op}: {message}")


def check_floating(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        refuse(op, f"input must be float32, float64, bfloat16 or float16, but got {x.dtype}")


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        refuse(op, f"{name} must be on the others' device, {x.device}, but got {t.device}")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        refuse(op, f"{name}'s dtype and the others' should be the same, but got {t.dtype} and {x.dtype}")


def check_bias(op: str, b: Tensor, filters: int, x: Tensor) -> None:
    check_like(op, "bias", b, x)
    if b.dim() != 1 or b.shape[0] != filters:
        refuse(op, f"bias must be 1-dimensional with {filters} elements, but got shape {list(b.shape)}")


def _check_operands(op: str, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    if w.dim() != 3:
        refuse(op, f"weight must be 3-dimensional (C * multiplier, 1, k), but got shape {list(w.shape)}")
    check_floating(op, x)
    check_like(op, "weight", w, x)
    channels, filters = x.shape[1], w.shape[0]
    if channels == 0:
        refuse(op, f"input must have at least one channel, but got shape {list(x.shape)}")
    if w.shape[1] != 1 or filters == 0:
        refuse(op, f"weight must have shape (C * multiplier, 1, k), but got {list(w.shape)}")
    if filters % channels != 0:
        refuse(op, f"input must have the {filters} channels of weight, or a divisor of them, but got shape {list(x.shape)}")
    if w.shape[2] == 0:
        refuse(op, f"weight must have a non-empty filter, but got shape {list(w.shape)}")
    if b is not None:
        check_bias(op, b, filters, x)


def _check_length(op: str, x: Tensor, taps: int, stride: int, pads: tuple[int, int], dilation: int) -> None:
    if x.shape[2] == 0:
        refuse(op, f"input must have a non-empty length, but got shape {list(x.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", min(pads), 0), ("dilation", dilation, 1)):
        if value < least:
            refuse(op, f"{name} {at_least(least)}, but got {value}")
    if max(pads) >> 60:  # torch's bound and words; no usual length is looked at, which may be a symbol
        most = (MOST_INT64 - x.shape[2]) // 2
        if max(pads) > most:
            refuse(op, f"Given padding={max(pads)}, expected padding to be at most {most}")
    reach, padded = dilation * (taps - 1) + 1, x.shape[2] + sum(pads)
    if reach > padded:
        wanted = "weight's filter is larger than the padded input: dilation * (k - 1) + 1"
        refuse(op, f"{wanted} = {reach}, but padded input length is {padded}")


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a sample lie side by side."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(2) >= x.shape[1]


def _joined(state: Tensor, x: Tensor) -> Tensor:
    """The samples of both, in x's layout."""
    if _is_channels_last(x):
        return torch.cat((state.transpose(1, 2), x.transpose(1, 2)), 1).transpose(1, 2)
    return torch.cat((state, x), 2)


def depthwise_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrSingle = 1,
    padding: str | IntOrSingle = 0,
    dilation: IntOrSingle = 1,
    act: str = "identity",
    *,
    slope: float = SLOPE,
    causal: bool = False,
    state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise 1-D convolution: ``act(F.conv1d(input, weight, bias, stride, padding, dilation, groups=C))``; causal too.

    A long signal may be convolved block by block: given the samples before a block as ``state``, it returns those before the
    next one, and the outputs are bit for bit those of the whole, wherever it was cut.

    Args:
        input: (N, C, L) or (C, L); float32, float64, bfloat16 or float16. Both that and channels-last strides (those of a
            contiguous (N, L, C)) are native, and the output has the input's layout; other strides are accepted.
        weight: (C * multiplier, 1, k), of input's dtype and device; any filter size. Output channel ``c * multiplier + m`` is
            filter m of input channel c.
        bias: (C * multiplier,) or None.
        stride: int or 1-tuple, positive.
        padding: zeros added on each side, int or 1-tuple, or two ints (left, right); ``'valid'`` (none) or ``'same'`` (output
            length = input length, stride 1). 0 where causal.
        dilation: spacing of the filter's taps in samples, int or 1-tuple, positive.
        act: applied to the sums before they are rounded and written, one of ``depthwise_conv2d``'s.
        slope: negative slope where act is leaky_relu; 0.01 by default, as torch's.
        causal: (k - 1) * dilation zeros on the left alone: no output reads a later sample.
        state: (N, C, (k - 1) * dilation), or without N, the samples before the input, zeros at a signal's beginning; causal is
            implied. At a stride, a signal is cut at multiples of it.

    Returns:
        (N, C * multiplier, outL) with outL = floor((L + padding on both sides - dilation (k - 1) - 1) / stride) + 1, or without
        N. With state, that and the next block's state, of state's shape.

    Raises:
        RuntimeError: wrong rank, channels, dtype, device, a filter larger than the padded input, an output beyond 64 bits or
            memory, or an unknown activation.
        TypeError: input, weight, bias or state that is no Tensor; stride, padding or dilation that is no int or tuple as
            above; slope that is no number; causal that is no bool.
        ValueError: padding is another string than those above, or not 0 where causal; numbers beyond 64 bits.

    Examples:
        >>> x, weight = torch.randn(8, 512, 4096), torch.randn(512, 1, 4)
        >>> y = depthwise_conv1d(x, weight, act="silu", causal=True)
        >>> first, state = depthwise_conv1d(x[..., :1000], weight, act="silu", state=torch.zeros(8, 512, 3))
        >>> second, state = depthwise_conv1d(x[..., 1000:], weight, act="silu", state=state)
        >>> torch.equal(torch.cat((first, second), 2), y)
        True

    Source: van den Oord et al., "WaveNet", arXiv:1609.03499, section 2.1.
    """
    op = "depthwise_conv1d"
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    check_tensor(op, "bias", bias, optional=True)
    check_tensor(op, "state", state, optional=True)
    check_activation(op, "act", act)
    check_number(op, "slope", slope)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, but got {causal!r}")
    unbatched = input.dim() == 2
    x = input.unsqueeze(0) if unbatched else input
    if x.dim() != 3:
        refuse(op, f"input must be 2-dimensional (C, L) or 3-dimensional (N, C, L), but got shape {list(input.shape)}")
    _check_operands(op, x, weight, bias)
    stride, dilation = to_single(op, "stride", stride), to_single(op, "dilation", dilation)
    pads = padding_of_length(op, padding, weight.shape[2], stride, dilation)
    if causal or state is not None:
        if any(pads) or padding == "same":
            wanted = "padding must be 0 where causal, which has (k - 1) * dilation zeros on the left"
            raise ValueError(f"{op}: {wanted}, but got {padding!r}")
        pads = max((weight.shape[2] - 1) * dilation, 0), 0
    _check_length(op, x, weight.shape[2], stride, pads, dilation)
    after = None
    if state is not None:
        x, after = _with_state(op, x, state, pads[0], unbatched)
        pads = 0, 0
    # Views of one row.
    row, filters = x.unsqueeze(2), weight.unsqueeze(2)
    y = convolve(row, filters, bias, (1, stride), (0, 0, *pads), (1, dilation), act, slope).squeeze(2)
    y = y.squeeze(0) if unbatched else y
    return y if after is None else (y, after)


def _with_state(op: str, x: Tensor, state: Tensor, length: int, unbatched: bool) -> tuple[Tensor, Tensor]:
    """The input after the samples of the state, and the next one."""
    check_like(op, "state", state, x)
    shape = (*x.shape[:2], length)
    found = tuple(state.shape)
    if found != (shape[1:] if unbatched else shape):
        refuse(op, f"state must have shape {list(shape[1:] if unbatched else shape)}, but got {list(found)}")
    x = _joined(state.unsqueeze(0) if unbatched else state, x)
    # A copy: the view would keep all of the block, and be in the caller's buffer.
    after = x[:, :, x.shape[2] - length :].clone(memory_format=torch.contiguous_format)
    return x, after.squeeze(0) if unbatched else after


def _wants_derivative(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def depthwise_conv1d_step(
    input: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "identity",
    dilation: int = 1,
    *,
    slope: float = SLOPE,
) -> Tensor:
    """One output of a causal ``depthwise_conv1d`` whose input comes sample by sample, as in decoding; moves the state on.

    Bit for bit that output of the whole. Without derivatives.

    Args:
        input: (N, C), the next sample; float32, float64, bfloat16 or float16.
        state: (N, C, (k - 1) * dilation), the samples before it, zeros at the beginning; in place, those before the next.
        weight: (C, 1, k), of input's dtype and device.
        bias: (C,) or None.
        act: applied to the sums, one of ``depthwise_conv2d``'s.
        dilation: spacing of the filter's taps in samples, positive.
        slope: negative slope where act is leaky_relu; 0.01 by default, as torch's.

    Returns:
        (N, C).

    Raises:
        RuntimeError: wrong rank, channels, dtype or device, a state of another shape or expanded, an unknown activation; a
            tensor that requires a gradient where gradients are recorded.
        TypeError: a tensor argument that is no Tensor; dilation that is no int; slope that is no number.

    Examples:
        >>> state, weight = torch.zeros(1, 1536, 3), torch.randn(1536, 1, 4)
        >>> depthwise_conv1d_step(torch.randn(1, 1536), state, weight, act="silu").shape
        torch.Size([1, 1536])

    Source: van den Oord et al., "WaveNet", arXiv:1609.03499, section 2.1.
    """
    for name, tensor in (("input", input), ("state", state), ("weight", weight)):
        check_tensor(STEP, name, tensor)
    check_tensor(STEP, "bias", bias, optional=True)
    check_number(STEP, "slope", slope)
    dilation = to_single(STEP, "dilation", dilation)
    if _wants_derivative(input, state, weight, bias):
        refuse(STEP, "it has no derivative, but a tensor requires one: call it under torch.no_grad()")
    return call(ops.depthwise_conv1d_step.default, input, state, weight, bias, dilation, act, slope)


def check_step(x: Tensor, state: Tensor, w: Tensor, b: Tensor | None, dilation: Any, act: str) -> None:
    """The checks of csrc/common/step_checks.h, in the same order and words."""
    from .checks import MOST_INT64, Checks

    check = Checks(STEP)
    check.that(x.dim() == 2, f"input must be 2-dimensional (N, C), but got shape {list(x.shape)}")
    check.dtype("input", x)
    channels = x.shape[1]
    check.that(channels > 0, f"input must have at least one channel, but got shape {list(x.shape)}")
    check.like_input("weight", w, x)
    check.shape("weight", w, (channels, 1, None), f"have shape ({channels}, 1, k), but got")
    check.that(dilation > 0, f"dilation {at_least(1)}, but got {dilation}")
    length = (w.shape[2] - 1) * dilation
    fits = not isinstance(length, int) or length <= MOST_INT64
    check.that(fits, f"dilation must fit 64 bits with the filter, but got {dilation}")
    check.shaped("state", state, (x.shape[0], channels, length), x)
    for dim, (size, stride) in enumerate(zip(state.shape, state.stride(), strict=True)):
        message = f"state must not be expanded: it is written, and the stride of its dimension {dim} is 0"
        check.that(size <= 1 or stride != 0, message)
    check.vector("bias", b, channels, x)
    check.activation("act", act)
