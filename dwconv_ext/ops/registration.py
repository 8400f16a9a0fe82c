"""What torch knows of the ops besides their kernels: shapes without data, autograd, vmap, autocast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._prims_common import suggest_memory_format

from .._extension import _C
from .activations import activate
from .autograd import (
    DepthwiseConv2dBackwardFunction,
    DepthwiseConv2dFunction,
    SeparableConv2dFunction,
    below_autograd,
    single_level,
    taken_apart,
)
from .batch_norm import BatchNormActFunction, by_parts, differentiable_backward
from .functional import DTYPES, accumulation_dtype

ops = torch.ops.dwconv_ext
_library = torch.library.Library("dwconv_ext", "IMPL")


def _like(x: Tensor, shape: Any) -> Tensor:
    """Without data, in x's dtype and layout."""
    return x.new_empty(shape).contiguous(memory_format=suggest_memory_format(x))


def _fake_convolution(
    op: str, x: Tensor, weight_name: str, w: Tensor, channels: Any, conv: tuple, others: dict[str, Tensor | None]
) -> Tensor:
    """The output without its data, after csrc/common/checks.h's checks in the same words."""

    def check(condition: Any, message: str) -> None:
        torch._check(condition, lambda: f"{op}: {message}")

    check(x.dim() == 4, f"input must be 4-dimensional (N, C, H, W), but got shape {list(x.shape)}")
    check(w.dim() == 4, f"{weight_name} must be 4-dimensional (C * multiplier, 1, kH, kW), but got shape {list(w.shape)}")
    check(x.dtype in DTYPES, f"input must be float32, float64, bfloat16 or float16 (got {x.dtype})")
    for name, t in {weight_name: w, **others}.items():
        if t is not None:
            check(t.device == x.device, f"{name} must be on the same device as input (got {t.device} and {x.device})")
            check(t.dtype == x.dtype, f"{name} must have the same dtype as input (got {t.dtype} and {x.dtype})")
    check(x.shape[1] > 0, f"input must have at least one channel, but got shape {list(x.shape)}")
    for size in x.shape[2:]:
        check(size > 0, f"input must have a non-empty height and width, but got shape {list(x.shape)}")
    wanted = f"shape (C * multiplier, 1, kH, kW) with C = {x.shape[1]} channels of input"
    depthwise = w.shape[1] == 1 and w.shape[0] > 0 and w.shape[0] % x.shape[1] == 0
    check(depthwise, f"{weight_name} must have {wanted}, but got {list(w.shape)}")
    size = []
    for i, side in ((0, "height"), (1, "width")):
        stride, padding, dilation = (pair[i] for pair in conv)
        check(stride > 0, f"stride must be positive, but got {tuple(conv[0])}")
        check(padding >= 0, f"padding must be non-negative, but got {tuple(conv[1])}")
        check(dilation > 0, f"dilation must be positive, but got {tuple(conv[2])}")
        if isinstance(padding, int) and padding >= 2**61:  # no guard on a symbolic size for what nobody writes
            most = (2**63 - 1 - x.shape[i + 2]) // 2
            check(padding <= most, f"Given padding={padding} at dimension {i}, expected padding to be at most {most}")
        check(w.shape[i + 2] > 0, f"{weight_name} must have a non-empty filter, but got shape {list(w.shape)}")
        room = x.shape[i + 2] + 2 * padding - dilation * (w.shape[i + 2] - 1) - 1
        check(room >= 0, f"{weight_name}'s filter is larger than the padded input along {side}")
        size.append(room // stride + 1)
    return _like(x, (x.shape[0], channels, *size))


@torch.library.register_fake("dwconv_ext::depthwise_conv2d")
def _(x, w, b, stride, padding, dilation, act="identity", slope=0.01):
    return _fake_convolution("depthwise_conv2d", x, "weight", w, w.shape[0], (stride, padding, dilation), {"bias": b})


@torch.library.register_fake("dwconv_ext::depthwise_conv2d_backward")
def _(grad, x, w, stride, padding, dilation, mask):
    return (
        _like(x, x.shape) if mask[0] else x.new_empty((0,)),
        x.new_empty(w.shape) if mask[1] else x.new_empty((0,)),
        x.new_empty((w.shape[0],)) if mask[2] else x.new_empty((0,)),
    )


@torch.library.register_fake("dwconv_ext::separable_conv2d")
def _(x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, *rest):
    others = {"dw_bias": db, "pw_weight": pw, "pw_bias": pb, "residual": residual}
    return _fake_convolution("separable_conv2d", x, "dw_weight", dw, pw.shape[0], (stride, padding, dilation), others)


def _check_channels(op: str, x: Tensor, channels: dict[str, Tensor | None]) -> torch.dtype:
    """csrc/cpu/ops/batch_norm.cpp's checks; the accumulation type."""
    torch._check(x.dim() == 4, lambda: f"{op}: input must be 4-dimensional (N, C, H, W), but got shape {list(x.shape)}")
    torch._check(x.dtype in DTYPES, lambda: f"{op}: input must be float32, float64, bfloat16 or float16 (got {x.dtype})")
    wide = accumulation_dtype(x.dtype)
    for name, t in channels.items():
        if t is not None:
            wanted = f"{op}: {name} must have {x.shape[1]} elements of {wide}"
            torch._check(t.dim() == 1 and t.dtype == wide, lambda wanted=wanted: wanted)
            torch._check(t.shape[0] == x.shape[1], lambda wanted=wanted: wanted)
    return wide


@torch.library.register_fake("dwconv_ext::batch_norm_act")
def _(x, w, b, eps, act, slope=0.01):
    wide = _check_channels("batch_norm_act", x, {"weight": w, "bias": b})
    channels = x.new_empty((x.shape[1],), dtype=wide)
    return _like(x, x.shape), channels, torch.empty_like(channels)


@torch.library.register_fake("dwconv_ext::batch_norm_act_backward")
def _(grad, x, w, b, mean, variance, eps, act, slope=0.01):
    channels = {"weight": w, "bias": b, "mean": mean, "variance": variance}
    wide = _check_channels("batch_norm_act_backward", x, channels)
    grad_weight = x.new_empty((x.shape[1],), dtype=wide)
    return _like(x, x.shape), grad_weight, torch.empty_like(grad_weight)


def _register_autograd(
    name: str, function: type[torch.autograd.Function], tensors: int, parts: Callable[..., Any] | None = None
) -> None:
    """The Function at the op's Autograd key; where nothing needs a derivative, the op below without the Function's cost.

    `tensors`: how many of the leading arguments can be tensors. An activation's name and slope may follow the Function's
    arguments: where a derivative is wanted it runs after the op, since backward wants what lies between. `parts`: what
    forward mode and torch.func are given of a Function that has no rules of its own for them.
    """
    taken = len(inspect.signature(function.forward).parameters)
    op = getattr(ops, name).default

    # Under torch.func the dispatcher comes here once a transform, with that transform's tensors: one level of autograd each.
    def forward(*args: Any) -> Any:
        with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):  # of the levels below
            return function.forward(*args)

    eager, transformed = single_level(function), single_level(function, forward)

    def autograd(*args: Any) -> Any:
        transformed_op = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
        if parts is not None and transformed_op:
            return parts(*args)
        needed = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args[:tensors])
        if len(args) > taken and (needed or taken_apart()):
            return activate(op(*args[:taken]), *args[taken:])
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return transformed.apply(*args)
        if torch.compiler.is_compiling():
            return function.apply(*args)
        if needed or torch.autograd.forward_ad._current_level >= 0:
            return eager.apply(*unwrap_dead_wrappers(args))
        with below_autograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")


@torch.library.register_fake("dwconv_ext::separable_conv2d_pack")
def _(dw, db, pw, pb, isa, input_dtype=""):
    wanted = "separable_conv2d_pack: dw_weight and pw_weight must be 4-dimensional"
    torch._check(dw.dim() == 4 and pw.dim() == 4, lambda: f"{wanted}, but got {list(dw.shape)} and {list(pw.shape)}")
    dtype = input_dtype or str(dw.dtype).removeprefix("torch.")
    return dw.new_empty((_C.block_bytes(dtype, dw.shape[0], pw.shape[0], *dw.shape[2:]),), dtype=torch.uint8)


@torch.library.register_fake("dwconv_ext::separable_conv2d_packed")
def _(x, packed, block, slopes, residual=None, gate=None):
    op, conv = "separable_conv2d_packed", (block[3:5], block[5:7], block[7:9])
    torch._check(x.dim() == 4, lambda: f"{op}: input must be 4-dimensional (N, C, H, W), but got shape {list(x.shape)}")
    dw_weight = x.new_empty((x.shape[1], 1, *block[1:3]))
    return _fake_convolution(op, x, "packed", dw_weight, block[0], conv, {"residual": residual})


@torch.library.register_fake("dwconv_ext::squeeze_excitation")
def _(x, reduce, first, expand, second, act, gate, slope=0.01):
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


_register_autograd("depthwise_conv2d", DepthwiseConv2dFunction, 3)
_register_autograd("depthwise_conv2d_backward", DepthwiseConv2dBackwardFunction, 3)
_register_autograd("separable_conv2d", SeparableConv2dFunction, 11)
_register_autograd("batch_norm_act", BatchNormActFunction, 3, by_parts)


def _batch_norm_act_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel, or where a derivative of it is wanted torch's operations."""
    tensors = [t for t in (grad, x, *rest[:2]) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return differentiable_backward(grad, x, *rest)
    with below_autograd():
        return ops.batch_norm_act_backward.default(grad, x, *rest)


_library.impl("batch_norm_act_backward", _batch_norm_act_backward, "Autograd")


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, N, ...) or an unbatched tensor repeated, as (B * N, ...)."""
    t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
    return t.flatten(0, 1)


def _fold_channels(t: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, N, C, H, W) as (N, B * C, H, W): each sample's channels are channels of one wide problem."""
    t = t.movedim(dim, 1) if dim is not None else t.unsqueeze(1).expand(t.shape[0], size, *t.shape[1:])
    return t.flatten(1, 2)


@torch.library.register_vmap("dwconv_ext::depthwise_conv2d")
def _(info, in_dims, x, w, b, *rest):
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        y = ops.depthwise_conv2d(_fold(x, in_dims[0], size), w, b, *rest)
        return y.unflatten(0, (size, -1)), 0
    wide_b = None if b is None else _fold(b, in_dims[2], size)
    y = ops.depthwise_conv2d(_fold_channels(x, in_dims[0], size), _fold(w, in_dims[1], size), wide_b, *rest)
    return y.unflatten(1, (size, -1)), 1


@torch.library.register_vmap("dwconv_ext::depthwise_conv2d_backward")
def _(info, in_dims, grad, x, w, stride, padding, dilation, mask):
    size = info.batch_size
    gx, gw, gb = ops.depthwise_conv2d_backward(
        _fold_channels(grad, in_dims[0], size),
        _fold_channels(x, in_dims[1], size),
        _fold(w, in_dims[2], size),
        stride,
        padding,
        dilation,
        mask,
    )
    outputs = (
        gx.unflatten(1, (size, -1)) if mask[0] else gx,
        gw.unflatten(0, (size, -1)) if mask[1] else gw,
        gb.unflatten(0, (size, -1)) if mask[2] else gb,
    )
    return outputs, (1 if mask[0] else None, 0 if mask[1] else None, 0 if mask[2] else None)


@torch.library.register_vmap("dwconv_ext::separable_conv2d")
def _(info, in_dims, x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, *rest):
    size = info.batch_size
    tensors = [x, dw, db, pw, pb, residual]
    dims = [*in_dims[:5], in_dims[10] if len(in_dims) > 10 else None]
    if all(d is None for d in dims[1:5]):
        wide_residual = None if residual is None else _fold(residual, dims[5], size)
        y = ops.separable_conv2d(
            _fold(x, dims[0], size), dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, wide_residual, *rest
        )
        return y.unflatten(0, (size, -1)), 0
    outputs = []
    for i in range(size):
        one = [t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
        outputs.append(ops.separable_conv2d(*one[:5], stride, padding, dilation, dw_act, pw_act, one[5], *rest))
    return torch.stack(outputs), 0


def _register_autocast(device_type: str, key: str) -> None:
    """What autocast does to conv2d: floating-point operands in the autocast dtype, float64 left alone."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype == torch.float64 or not t.is_floating_point() or t.device.type != device_type:
            return t
        return t.to(torch.get_autocast_dtype(device_type))

    def depthwise(x, w, b, *rest):
        with torch._C._ExcludeDispatchKeyGuard(below):
            return ops.depthwise_conv2d(cast(x), cast(w), cast(b), *rest)

    def separable(x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, *rest):
        with torch._C._ExcludeDispatchKeyGuard(below):
            return ops.separable_conv2d(
                *map(cast, (x, dw, db, pw, pb)), stride, padding, dilation, dw_act, pw_act, cast(residual), *rest
            )

    _library.impl("depthwise_conv2d", depthwise, key)
    _library.impl("separable_conv2d", separable, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
