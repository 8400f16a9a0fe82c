"""What torch knows of the ops besides their kernels: shapes without data, autograd, vmap, autocast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._prims_common import suggest_memory_format

from .activations import SLOPE, activate
from .autograd import (
    DepthwiseConv2dBackwardFunction,
    DepthwiseConv2dFunction,
    SeparableConv2dFunction,
    below_autograd,
    is_traced_or_transformed,
    separable_by_parts,
    single_level,
)
from .batch_norm import BatchNormActFunction, by_parts, differentiable_backward
from .checks import Checks, block_bytes, check_depthwise, check_depthwise_norm, check_depthwise_norm_forward
from .conv1d import check_step
from .conv_transpose import DepthwiseConvTranspose2dFunction
from .functional import accumulation_dtype, as_autocast

ops = torch.ops.dwconv_ext
_library = torch.library.Library("dwconv_ext", "IMPL")


def _like(x: Tensor, shape: Any) -> Tensor:
    """Without data, in x's dtype and layout."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))


def _like_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two values of a channel, in the accumulation type."""
    mean = x.new_empty((x.shape[1],), dtype=accumulation_dtype(x.dtype))
    return mean, torch.empty_like(mean)


@torch.library.register_fake("dwconv_ext::depthwise_conv2d")
def _(x, w, b, stride, padding, dilation, act="identity", slope=SLOPE):
    return _like(x, check_depthwise("depthwise_conv2d", x, w, b, stride, padding, dilation, act))


@torch.library.register_fake("dwconv_ext::depthwise_conv2d_pooled")
def _(x, w, b, stride, padding, dilation, act="identity", slope=SLOPE):
    shape = check_depthwise("depthwise_conv2d_pooled", x, w, b, stride, padding, dilation, act)
    return _like(x, shape), x.new_empty((*shape[:2], 1, 1))


def _depthwise_conv2d_pooled(x, w, b, stride, padding, dilation, act="identity", slope=SLOPE):
    """On the CPU, where it has no kernel of its own."""
    check_depthwise("depthwise_conv2d_pooled", x, w, b, stride, padding, dilation, act)
    y = ops.depthwise_conv2d.default(x, w, b, stride, padding, dilation, act, slope)
    return y, y.mean((2, 3), keepdim=True)


_library.impl("depthwise_conv2d_pooled", _depthwise_conv2d_pooled, "CPU")


@torch.library.register_fake("dwconv_ext::depthwise_conv2d_backward")
def _(grad, x, w, stride, padding, dilation, mask):
    check = Checks("depthwise_conv2d_backward")
    size = check.convolution(x, "weight", w, stride, padding, dilation)
    check.of_output_shape("grad_output", grad, x, (x.shape[0], w.shape[0], *size))
    check.that(len(mask) == 3, f"output_mask must have 3 values, but got {len(mask)}")
    return (
        _like(x, x.shape) if mask[0] else x.new_empty((0,)),
        x.new_empty(w.shape) if mask[1] else x.new_empty((0,)),
        x.new_empty((w.shape[0],)) if mask[2] else x.new_empty((0,)),
    )


@torch.library.register_fake("dwconv_ext::depthwise_conv_transpose2d")
def _(x, w, b, stride, padding, output_padding, dilation, act="identity", slope=SLOPE):
    check = Checks("depthwise_conv_transpose2d")
    shape = check.transposed(x, w, b, stride, padding, output_padding, dilation)
    check.activation("act", act)
    return _like(x, shape)


@torch.library.register_fake("dwconv_ext::separable_conv2d")
def _(x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, *rest):
    check = Checks("separable_conv2d")
    size = check.convolution(x, "dw_weight", dw, stride, padding, dilation)
    wanted = f"dw_weight must have one filter per channel of input ({x.shape[1]})"
    check.that(dw.shape[0] == x.shape[1], f"{wanted}, but got shape {list(dw.shape)}")
    check.pointwise(db, pw, pb, x.shape[1], x)
    shape = (x.shape[0], pw.shape[0], *size)
    check.output(x, shape, padding)
    if residual is not None:
        check.of_output_shape("residual", residual, x, shape)
    check.activation("dw_act", dw_act)
    check.activation("pw_act", pw_act)
    return _like(x, shape)


@torch.library.register_fake("dwconv_ext::separable_conv2d_pack")
def _(dw, db, pw, pb, isa, input_dtype=""):
    check = Checks("separable_conv2d_pack")
    check.isa(isa, dw)
    check.shape("dw_weight", dw, (None, 1, None, None), "have shape (C, 1, kH, kW), but got")
    check.dtype("dw_weight", dw)
    dtype = check.input_dtype(input_dtype, dw)
    check.pointwise(db, pw, pb, dw.shape[0], dw)
    return dw.new_empty((block_bytes(dw, dtype, dw.shape[0], pw.shape[0], *dw.shape[2:]),), dtype=torch.uint8)


@torch.library.register_fake("dwconv_ext::separable_conv2d_packed")
def _(x, packed, block, slopes, residual=None, allow_tf32=False):
    check = Checks("separable_conv2d_packed")
    check.rank(x)
    check.dtype("input", x)
    return _like(x, check.block(x, x.shape[1], packed, block, slopes, residual))


@torch.library.register_fake("dwconv_ext::inverted_residual")
def _(x, expand, hidden, expand_act, expand_slope, packed, block, slopes, residual=None, allow_tf32=False):
    check = Checks("inverted_residual")
    check.rank(x)
    check.dtype("input", x)
    check.activation_number("expand_act", expand_act)
    check.packed("expand", "pointwise_conv2d", expand, x, x.shape[1], hidden)
    return _like(x, check.block(x, hidden, packed, block, slopes, residual))


@torch.library.register_fake("dwconv_ext::depthwise_conv2d_pack")
def _(w, b, isa, input_dtype=""):
    check = Checks("depthwise_conv2d_pack")
    check.isa(isa, w)
    check.shape("weight", w, (None, 1, None, None), "have shape (out_channels, 1, kH, kW), but got")
    check.dtype("weight", w)
    dtype = check.input_dtype(input_dtype, w)
    check.vector("bias", b, w.shape[0], w)
    return w.new_empty((block_bytes(w, dtype, w.shape[0], 0, *w.shape[2:]),), dtype=torch.uint8)


@torch.library.register_fake("dwconv_ext::depthwise_conv2d_packed")
def _(x, packed, filter, act, slope=SLOPE):
    check = Checks("depthwise_conv2d_packed")
    check.rank(x)
    check.dtype("input", x)
    check.activation_number("act", act)
    return _like(x, check.depthwise(x, packed, filter))


@torch.library.register_fake("dwconv_ext::pointwise_conv2d_pack")
def _(w, b, isa, input_dtype=""):
    check = Checks("pointwise_conv2d_pack")
    check.isa(isa, w)
    check.shape("weight", w, (None, None, 1, 1), "have shape (out_channels, C, 1, 1), but got")
    check.dtype("weight", w)
    dtype = check.input_dtype(input_dtype, w)
    check.vector("bias", b, w.shape[0], w)
    return w.new_empty((block_bytes(w, dtype, w.shape[1], w.shape[0], 0, 0),), dtype=torch.uint8)


@torch.library.register_fake("dwconv_ext::pointwise_conv2d")
def _(x, packed, out_channels, stride, act, slope=SLOPE, residual=None, gate=None, allow_tf32=False):
    check = Checks("pointwise_conv2d")
    check.rank(x)
    check.dtype("input", x)
    check.activation_number("act", act)
    check.packed("packed", "pointwise_conv2d", packed, x, x.shape[1], out_channels)
    size = check.filter(x, "packed", (1, 1), (stride, stride), (0, 0), (1, 1))
    shape = (x.shape[0], out_channels, *size)
    check.output(x, shape, (0, 0))
    if residual is not None:
        check.of_output_shape("residual", residual, x, shape)
    check.shaped("gate", gate, (*x.shape[:2], 1, 1), x)
    return _like(x, shape)


@torch.library.register_fake("dwconv_ext::patch_conv2d")
def _(x, packed, filter, act, slope=SLOPE, channels_last=False):
    check = Checks("patch_conv2d")
    check.rank(x)
    check.dtype("input", x)
    check.activation_number("act", act)
    shape = check.patches(x, packed, filter)
    last = channels_last or suggest_memory_format(x) is torch.channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.register_fake("dwconv_ext::linear")
def _(x, packed, out_features, act, slope=SLOPE):
    check = Checks("linear")
    check.that(x.dim() > 0 and x.numel() > 0, f"input must have shape (..., features) and not be empty, but got {list(x.shape)}")
    check.dtype("input", x)
    check.activation_number("act", act)
    check.packed("packed", "pointwise_conv2d", packed, x, x.shape[-1], out_features)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("dwconv_ext::depthwise_conv1d_step")
def _(x, state, w, b, dilation=1, act="identity", slope=SLOPE):
    check_step(x, state, w, b, dilation, act)
    return x.new_empty(x.shape)


@torch.library.register_fake("dwconv_ext::interleave_channels")
def _(first, second):
    check = Checks("interleave_channels")
    message = f"first must be 4-dimensional (N, C, H, W), but got shape {list(first.shape)}"
    check.that(first.dim() == 4, message)
    check.dtype("first", first)
    check.like_input("second", second, first)
    check.shape("second", second, first.shape, f"have first's shape {list(first.shape)}, but got")
    n, c, h, w = first.shape
    return _like(first, (n, 2 * c, h, w))


@torch.library.register_fake("dwconv_ext::global_average_pool")
def _(x, keepdim):
    Checks("global_average_pool").pixels(x)
    return x.new_empty((*x.shape[:2], 1, 1) if keepdim else x.shape[:2])


@torch.library.register_fake("dwconv_ext::max_pool2d")
def _(x, kernel_size, stride, padding, dilation):
    return _like(x, Checks("max_pool2d").pool(x, kernel_size, stride, padding, dilation))


@torch.library.register_fake("dwconv_ext::layer_norm2d")
def _(x, w, b, eps=1e-5):
    Checks("layer_norm2d").layer_norm(x, w, b, eps)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("dwconv_ext::squeeze_excitation")
def _(x, reduce, first, expand, second, act, gate, slope=SLOPE):
    Checks("squeeze_excitation").squeeze_excitation(x, reduce, first, expand, second, act, gate)
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@torch.library.register_fake("dwconv_ext::batch_norm_act")
def _(x, w, b, eps, act, slope=SLOPE):
    Checks("batch_norm_act").batch_norm(x, w, b, eps, act)
    return _like(x, x.shape), *_like_statistics(x)


@torch.library.register_fake("dwconv_ext::batch_norm_act_backward")
def _(grad, x, w, b, mean, variance, eps, act, slope=SLOPE):
    Checks("batch_norm_act_backward").batch_norm_backward(grad, x, w, b, mean, variance, eps, act)
    return _like(x, x.shape), *_like_statistics(x)


@torch.library.register_fake("dwconv_ext::batch_norm_statistics")
def _(x):
    Checks("batch_norm_statistics").pixels(x)
    return _like_statistics(x)


@torch.library.register_fake("dwconv_ext::batch_norm_act_apply")
def _(x, w, b, mean, variance, eps, act, slope=SLOPE):
    check = Checks("batch_norm_act_apply")
    check.batch_norm(x, w, b, eps, act)
    check.statistics(mean, variance, x)
    return _like(x, x.shape)


@torch.library.register_fake("dwconv_ext::batch_norm_act_backward_sums")
def _(grad, x, w, b, mean, variance, eps, act, slope=SLOPE):
    Checks("batch_norm_act_backward_sums").batch_norm_backward(grad, x, w, b, mean, variance, eps, act)
    return _like_statistics(x)


@torch.library.register_fake("dwconv_ext::batch_norm_act_backward_apply")
def _(grad, x, w, b, mean, variance, mean_grad_weight, mean_grad_bias, eps, act, slope=SLOPE):
    check = Checks("batch_norm_act_backward_apply")
    check.batch_norm_backward(grad, x, w, b, mean, variance, eps, act)
    check.wide("mean_grad_weight", mean_grad_weight, x.shape[1:2], x)
    check.wide("mean_grad_bias", mean_grad_bias, x.shape[1:2], x)
    return _like(x, x.shape)


@torch.library.register_fake("dwconv_ext::depthwise_norm_act")
def _(x, w, norm_w, norm_b, stride, padding, dilation, eps, act, slope):
    middle = _like(x, check_depthwise_norm_forward(x, w, norm_w, norm_b, stride, padding, dilation, eps, act))
    return torch.empty_like(middle), middle, *_like_statistics(middle)


def _depthwise_norm_act(x, w, norm_w, norm_b, stride, padding, dilation, eps, act, slope):
    """On the CPU, where it has no kernel of its own."""
    check_depthwise_norm_forward(x, w, norm_w, norm_b, stride, padding, dilation, eps, act)
    middle = ops.depthwise_conv2d.default(x, w, None, stride, padding, dilation)
    y, *statistics = ops.batch_norm_act.default(middle, norm_w, norm_b, eps, act, slope)
    return y, middle, *statistics


_library.impl("depthwise_norm_act", _depthwise_norm_act, "CPU")


@torch.library.register_fake("dwconv_ext::depthwise_norm_act_backward")
def _(grad, middle, x, w, norm_w, norm_b, mean, variance, stride, padding, dilation, eps, act, slope, mask):
    check_depthwise_norm(grad, middle, x, w, norm_w, norm_b, mean, variance, stride, padding, dilation, eps, act, mask)
    grads = (_like(x, x.shape) if mask[0] else x.new_empty((0,)), x.new_empty(w.shape) if mask[1] else x.new_empty((0,)))
    return *grads, *_like_statistics(middle)


def _depthwise_norm_act_backward(
    grad, middle, x, w, norm_w, norm_b, mean, variance, stride, padding, dilation, eps, act, slope, mask
):
    """On the CPU, where it has no kernel of its own."""
    check_depthwise_norm(grad, middle, x, w, norm_w, norm_b, mean, variance, stride, padding, dilation, eps, act, mask)
    norm = ops.batch_norm_act_backward.default(grad, middle, norm_w, norm_b, mean, variance, eps, act, slope)
    conv = ops.depthwise_conv2d_backward.default(norm[0], x, w, stride, padding, dilation, (*mask, False))
    return *conv[:2], *norm[1:]


_library.impl("depthwise_norm_act_backward", _depthwise_norm_act_backward, "CPU")


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
        if len(args) > taken and (needed or is_traced_or_transformed()):
            output = op(*args[:taken])
            Checks(name).activation("act", args[taken])
            return activate(output, *args[taken:])
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


_register_autograd("depthwise_conv2d", DepthwiseConv2dFunction, 3)
_register_autograd("depthwise_conv2d_backward", DepthwiseConv2dBackwardFunction, 3)
_register_autograd("depthwise_conv_transpose2d", DepthwiseConvTranspose2dFunction, 3)
_register_autograd("separable_conv2d", SeparableConv2dFunction, 11, separable_by_parts)
_register_autograd("batch_norm_act", BatchNormActFunction, 3, by_parts)


def _batch_norm_act_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel, or where a derivative of it is wanted torch's operations."""
    tensors = [t for t in (grad, x, *rest[:2]) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        Checks("batch_norm_act_backward").batch_norm_backward(grad, x, *rest[:6])
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


def _register_vmap(name: str) -> None:
    """Of a convolution of input, weight and bias, whose weights' first dimension is of input channels."""
    op = getattr(ops, name)

    @torch.library.register_vmap(f"dwconv_ext::{name}")
    def _(info, in_dims, x, w, b, *rest):
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            y = op(_fold(x, in_dims[0], size), w, b, *rest)
            return y.unflatten(0, (size, -1)), 0
        wide_b = None if b is None else _fold(b, in_dims[2], size)
        y = op(_fold_channels(x, in_dims[0], size), _fold(w, in_dims[1], size), wide_b, *rest)
        return y.unflatten(1, (size, -1)), 1


_register_vmap("depthwise_conv2d")
_register_vmap("depthwise_conv_transpose2d")


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


def _register_autocast(key: str) -> None:
    """What autocast does to conv2d: floating-point operands in the autocast dtype, float64 left alone."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(op: Any, tensors: int) -> Any:
        def run(*args: Any) -> Any:
            # First: autocast is off below.
            args = tuple(as_autocast(a) if i < tensors and isinstance(a, Tensor) else a for i, a in enumerate(args))
            with torch._C._ExcludeDispatchKeyGuard(below):
                return op(*args)

        return run

    _library.impl("depthwise_conv2d", cast(ops.depthwise_conv2d, 3), key)
    _library.impl("depthwise_conv_transpose2d", cast(ops.depthwise_conv_transpose2d, 3), key)
    _library.impl("separable_conv2d", cast(ops.separable_conv2d, 11), key)


_register_autocast("AutocastCPU")
_register_autocast("AutocastCUDA")
