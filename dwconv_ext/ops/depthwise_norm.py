"""A depthwise convolution, BatchNorm in training mode and the activation after it as one Function.

On CUDA its backward pass gives the gradients of input and filters in one kernel, which takes BatchNorm's gradient as it reads; on
any device it may compute the convolution again instead of keeping its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import below_autograd, call, in_its_dtypes, single_level
from .batch_norm import by_parts, move_by_batch

ops = torch.ops.dwconv_ext


class DepthwiseNormActFunction(torch.autograd.Function):
    """``act(batch_norm(depthwise_conv2d(input, weight, None, *conv)))``, in which the running statistics move:
    ``apply(input, weight, norm_weight, norm_bias, conv, how, running, recompute)`` with conv (stride, padding, dilation), how
    (eps, act, slope), running (mean, variance, momentum). Only the first result has a derivative.

    Keeps input, statistics and, unless it is to be computed again, the convolution's output.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        norm_w: Tensor | None,
        norm_b: Tensor | None,
        conv: tuple,
        how: tuple,
        running: tuple,
        recompute: bool,
    ) -> tuple:
        with below_autograd():
            y, middle, mean, variance = ops.depthwise_norm_act.default(x, w, norm_w, norm_b, *conv, *how)
        move_by_batch(running, middle, mean, variance)
        return y, middle, mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.conv, ctx.how, _, recompute = inputs
        _, middle, *statistics = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *statistics, None if recompute else middle)

    @staticmethod
    @in_its_dtypes
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        x, w, norm_w, norm_b, mean, variance, middle = ctx.saved_tensors
        rest = (None,) * 4
        if grad is None:
            return (None, None, None, None, *rest)
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, grad, x, w, norm_w, norm_b), *rest
        if middle is None:
            middle = call(ops.depthwise_conv2d.default, x, w, None, *ctx.conv)
        mask = tuple(ctx.needs_input_grad[:2])
        arguments = (grad, middle, x, w, norm_w, norm_b, mean, variance, *ctx.conv, *ctx.how, mask)
        grads = call(ops.depthwise_norm_act_backward.default, *arguments)
        return *(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad, strict=False)), *rest


def _differentiable_backward(
    ctx: Any, grad: Tensor, x: Tensor, w: Tensor, norm_w: Tensor | None, norm_b: Tensor | None
) -> list[Tensor | None]:
    operands = [t if wanted else None for t, wanted in zip((x, w, norm_w, norm_b), ctx.needs_input_grad, strict=False)]
    y = by_parts(ops.depthwise_conv2d(x, w, None, *ctx.conv), norm_w, norm_b, *ctx.how)[0]
    grads = iter(torch.autograd.grad(y, [t for t in operands if t is not None], grad, create_graph=True))
    return [None if t is None else next(grads) for t in operands]


train_depthwise_norm_act = single_level(DepthwiseNormActFunction).apply
