"""The derivatives of the ops, as autograd Functions. registration.py makes them the ops' own.

The ops' Autograd key is the ``apply`` of a ``torch.autograd.Function`` whose forward calls the op below autograd and whose
backward calls ops, never kernels, so that every derivative is itself differentiable.

The depthwise convolution y = x * w is bilinear. With B_x(g, w) and B_w(g, x) for its two adjoints:

    vjp of y            g_x = B_x(g, w),  g_w = B_w(g, x),  g_b = sum g
    jvp of y            y' = x' * w + x * w' + b'
    vjp of (B_x, B_w)   with cotangents (u, v, z) of (g_x, g_w, g_b):
                        g <- u * w + x * v + z,   x <- B_x(g, v),   w <- B_w(g, u)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import SLOPE, activate, activation_backward
from .arguments import check_activation

ops = torch.ops.dwconv_ext


def below_autograd() -> torch._C._AutoDispatchBelowAutograd:
    return torch._C._AutoDispatchBelowAutograd()


def single_level(function: type[torch.autograd.Function], forward: Any = None) -> type:
    """The Function with the C++ apply alone; forward, where given, in the place of its own.

    torch.autograd.Function.apply binds a Function's arguments by inspect.signature at every call, 40 us on a CPU, to find the
    defaults of those left out: a Function made by this must take fewer arguments as well. Without functorch's transforms that and
    a check for them are all it does besides.
    """
    methods = {m: staticmethod(getattr(function, m)) for m in ("setup_context", "backward", "jvp")}
    methods["forward"] = staticmethod(forward or function.forward)
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def is_traced_or_transformed() -> bool:
    """Whether a compiler, torch.func or forward mode records each op that runs now."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0


PLAIN = (Tensor, torch.nn.Parameter)


def has_function_override(*tensors: Tensor) -> bool:
    """Whether a tensor subclass, or a mode other than torch.set_default_device's, sees each call of torch's functions."""
    if torch.compiler.is_compiling() or not torch.overrides.has_torch_function(tensors):
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    if any(type(mode) is not torch.utils._device.DeviceContext for mode in modes):
        return True
    kinds = {type(t) for t in tensors} - {Tensor}
    return any(kind.__torch_function__ is not torch._C._disabled_torch_function_impl for kind in kinds)


def is_training_step(x: Any, w: Tensor, b: Tensor | None) -> bool:
    """Whether a derivative is wanted of a layer of these, ordinary tensors and a batch on the CPU, and nothing but autograd looks
    at its op: then its Function need not be reached through the dispatcher, which takes 40 us beside a network's tensors."""
    if is_traced_or_transformed() or not torch.is_grad_enabled() or type(x) is not Tensor or x.dim() != 4 or not x.is_cpu:
        return False
    if type(w) not in PLAIN or (b is not None and type(b) not in PLAIN):
        return False
    if not (w.requires_grad or x.requires_grad or (b is not None and b.requires_grad)):
        return False
    return not (torch.is_autocast_enabled("cpu") or torch._C._is_tracing())


def call(op: Any, *args: Any) -> Any:
    """The op; where nothing above its kernel has anything to do, without the 60 us that the way through Python takes there."""
    if torch.is_grad_enabled() or is_traced_or_transformed():
        return op(*args)
    with below_autograd():
        return op(*args)


def _backward(grad: Tensor, x: Tensor, w: Tensor, conv: tuple, mask: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """depthwise_conv2d_backward with None for what the mask leaves out."""
    if not any(mask):
        return [None, None, None]
    to_x, to_w, to_b = call(ops.depthwise_conv2d_backward.default, grad, x, w, *conv, mask)
    return [to_x if mask[0] else None, to_w if mask[1] else None, to_b if mask[2] else None]


def in_its_dtypes(backward: Callable) -> Callable:
    """A backward pass computes in the forward pass's dtypes, whatever autocast says where it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    if not present:
        return None
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


def _as_channel_bias(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(1, -1, 1, 1).expand_as(like)


class DepthwiseConv2dFunction(torch.autograd.Function):
    """``depthwise_conv2d`` as an autograd Function: ``apply(input, weight, bias, stride, padding, dilation)`` with pairs.

    Backward, double backward and forward mode; each gradient is computed only when needed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Tensor:
        with below_autograd():
            return ops.depthwise_conv2d.default(x, w, b, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, b, *conv = inputs
        ctx.conv = tuple(conv)
        ctx.has_bias = b is not None
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    @in_its_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = (needs[0], needs[1], ctx.has_bias and needs[2])
        return (*_backward(grad, x, w, ctx.conv, mask), None, None, None)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: Any) -> Tensor | None:
        x, w = ctx.saved_tensors
        terms = [
            None if dx is None else ops.depthwise_conv2d(dx, w, db, *ctx.conv),
            None if dw is None else ops.depthwise_conv2d(x, dw, db if dx is None else None, *ctx.conv),
        ]
        if dx is None and dw is None and db is not None:
            terms.append(ops.depthwise_conv2d(torch.zeros_like(x), w, db, *ctx.conv))
        return _sum(*terms)


class DepthwiseConv2dBackwardFunction(torch.autograd.Function):
    """The backward op as a Function of grad_output, input and weight, for double backward and forward over reverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, mask: Any) -> tuple:
        with below_autograd():
            return ops.depthwise_conv2d_backward.default(grad, x, w, stride, padding, dilation, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad, x, w, *conv, mask = inputs
        ctx.conv = tuple(conv)
        ctx.mask = tuple(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, w)
        ctx.save_for_forward(grad, x, w)

    @staticmethod
    @in_its_dtypes
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, z: Tensor | None) -> tuple:
        grad, x, w = ctx.saved_tensors
        u, v, z = (t if wanted else None for t, wanted in zip((u, v, z), ctx.mask, strict=True))
        to_grad = to_x = to_w = None
        if ctx.needs_input_grad[0]:
            to_grad = _sum(
                None if u is None else ops.depthwise_conv2d(u, w, z, *ctx.conv),
                None if v is None else ops.depthwise_conv2d(x, v, z if u is None else None, *ctx.conv),
                _as_channel_bias(z, grad) if z is not None and u is None and v is None else None,
            )
        if ctx.needs_input_grad[1] and v is not None:
            to_x = _backward(grad, x, v, ctx.conv, (True, False, False))[0]
        if ctx.needs_input_grad[2] and u is not None:
            to_w = _backward(grad, u, w, ctx.conv, (False, True, False))[1]
        return to_grad, to_x, to_w, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dgrad: Tensor | None, dx: Tensor | None, dw: Tensor | None, *_: Any) -> tuple:
        grad, x, w = ctx.saved_tensors
        to_x, to_w, to_b = [], [], []
        if dgrad is not None:
            along = _backward(dgrad, x, w, ctx.conv, ctx.mask)
            to_x.append(along[0])
            to_w.append(along[1])
            to_b.append(along[2])
        if dw is not None:
            to_x.append(_backward(grad, x, dw, ctx.conv, (ctx.mask[0], False, False))[0])
        if dx is not None:
            to_w.append(_backward(grad, dx, w, ctx.conv, (False, ctx.mask[1], False))[1])
        sizes = (x.shape, w.shape, (w.shape[0],))
        tangents = []
        for terms, wanted, size in zip((to_x, to_w, to_b), ctx.mask, sizes, strict=True):
            total = _sum(*terms)
            tangents.append(x.new_zeros(size if wanted else (0,)) if total is None else total)
        return tuple(tangents)


# --- the fused block -------------------------------------------------------------------------------------------------


def separable_by_parts(
    x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, dw_slope=SLOPE, pw_slope=SLOPE, allow_tf32=False
):
    """``separable_conv2d`` in two operations: what forward mode and torch.func take apart."""
    check_activation("separable_conv2d", "dw_act", dw_act)
    check_activation("separable_conv2d", "pw_act", pw_act)
    middle = activate(ops.depthwise_conv2d(x, dw, db, stride, padding, dilation), dw_act, dw_slope)
    output = activate(F.conv2d(middle, pw, pb), pw_act, pw_slope)
    return output if residual is None else output + residual


class SeparableConv2dFunction(torch.autograd.Function):
    """``separable_conv2d`` as an autograd Function; arguments in the op's order.

    The forward pass keeps nothing but its operands; backward recomputes the intermediate, which the fused forward never
    writes. Differentiable twice. The function itself has forward mode and torch.func's transforms too.
    """

    @staticmethod
    def forward(
        x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, dw_slope=SLOPE, pw_slope=SLOPE,
        allow_tf32=False,
    ):  # fmt: skip
        with below_autograd():
            return ops.separable_conv2d(
                x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual, dw_slope, pw_slope, allow_tf32
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act = inputs[:10]
        residual, dw_slope, pw_slope = (*inputs[10:13], *(None, SLOPE, SLOPE)[len(inputs) - 10 :])
        ctx.conv = (stride, padding, dilation)
        ctx.activations = (dw_act, dw_slope, pw_act, pw_slope)
        ctx.present = (db is not None, pb is not None, residual is not None)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(x, dw, db, pw, pb)

    @staticmethod
    @in_its_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, dw, db, pw, pb = ctx.saved_tensors
        dw_act, dw_slope, pw_act, pw_slope = ctx.activations
        need = ctx.needs_input_grad
        need_residual = len(need) > 10 and need[10]
        need_db, need_pb = ctx.present[0] and need[2], ctx.present[1] and need[4]
        grads = [None] * ctx.arguments
        if need_residual:
            grads[10] = grad
        if any((need[0], need[1], need_db, need[3], need_pb)):
            z = ops.depthwise_conv2d(x, dw, db, *ctx.conv)
            a = activate(z, dw_act, dw_slope)
            if pw_act != "identity":
                grad = activation_backward(grad, F.conv2d(a, pw, pb), pw_act, pw_slope)
            need_a = need[0] or need[1] or need_db
            bias_sizes = [pw.shape[0]] if need_pb else None
            to_a, grads[3], to_pb = torch.ops.aten.convolution_backward(
                grad, a, pw, bias_sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [need_a, need[3], bool(need_pb)]
            )
            if need_pb:
                grads[4] = to_pb
            if need_a:
                to_z = activation_backward(to_a, z, dw_act, dw_slope)
                grads[0:3] = _backward(to_z, x, dw, ctx.conv, (need[0], need[1], bool(need_db)))
        return tuple(grads)
