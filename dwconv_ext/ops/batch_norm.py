"""BatchNorm in training mode and the activation after it as one op, which neither writes nor keeps what lies between.

torch's two modules go over the activations some sixteen times in a training step, the op eight times, and three of these find
them in a CPU's cache in NCHW (docs/design/training.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extension import _C_cuda
from .activations import SLOPE, activate
from .arguments import check_activation
from .autograd import below_autograd, call, is_traced_or_transformed, single_level
from .functional import DTYPES, accumulation_dtype

ops = torch.ops.dwconv_ext

# Elements below which torch's modules are faster, forward and backward: an autograd Function in Python costs 0.1 ms more a step
# than theirs in C++ (docs/design/training.md). On CUDA reckoned, not measured: what four launches more take is two sweeps' time.
LEAST_NCHW, LEAST_CHANNELS_LAST, LEAST_CUDA = 1 << 17, 1 << 19, 1 << 22


def by_parts(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, act: str, slope: float = SLOPE) -> tuple:
    """``batch_norm_act`` in torch's operations: what forward mode, torch.func and double backward take apart."""
    check_activation("batch_norm_act", "act", act)
    variance, mean = torch.var_mean(x.detach().to(accumulation_dtype(x.dtype)), (0, 2, 3), correction=0)
    return activate(F.batch_norm(x, None, None, w, b, True, 0.0, eps), act, slope), mean, variance


def differentiable_backward(
    grad: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, variance: Tensor, eps: float, act: str,
    slope: float = SLOPE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``batch_norm_act_backward``, differentiable itself. The statistics are x's own."""
    wide = accumulation_dtype(x.dtype)
    with torch.enable_grad():
        w = torch.ones_like(mean) if w is None else w
        b = torch.zeros_like(mean) if b is None else b
        operands = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, w, b)]
        output = by_parts(operands[0].to(wide), *operands[1:], eps, act, slope)[0]
        return torch.autograd.grad(output, operands, grad.to(wide), create_graph=True)


class BatchNormActFunction(torch.autograd.Function):
    """``batch_norm_act`` as an autograd Function: ``apply(input, weight, bias, eps, act, slope)``.

    Keeps the input and the statistics; the statistics themselves have no gradient, as torch's have none.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, act: str, slope: float = SLOPE) -> tuple:
        with below_autograd():
            return ops.batch_norm_act.default(x, w, b, eps, act, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, w, b = inputs[:3]
        ctx.how, ctx.count = inputs[3:6], len(inputs)
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, b, mean, variance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        x, w, b, mean, variance = ctx.saved_tensors
        rest = (None,) * (ctx.count - 3)
        if grad is None:
            return (None, None, None, *rest)
        arguments = (grad, x, w, b, mean, variance, *ctx.how)
        grad_input, grad_weight, grad_bias = call(ops.batch_norm_act_backward.default, *arguments)
        return (grad_input, None if w is None else grad_weight, None if b is None else grad_bias, *rest)


def forward_in_training(
    x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, act: str, slope: float, running: tuple
) -> tuple:
    """The forward pass in training. The running statistics move in it: where a checkpoint's second pass ends early, which it does
    when the last tensor is saved, they have moved as torch's have."""
    output = BatchNormActFunction.forward(x, w, b, eps, act, slope)
    move_by_batch(running, x, *output[1:])
    return output


_BatchNormAct = single_level(BatchNormActFunction, forward_in_training)


def norm_fits(channels: int, dtype: torch.dtype, norm: tuple[Tensor | None, ...]) -> bool:
    """Whether F.batch_norm takes these mean, variance, weight and bias for so many channels of this dtype."""
    there = [t for t in norm if t is not None]
    dtypes = {t.dtype for t in there}
    if any(tuple(t.shape) != (channels,) for t in there) or len(dtypes) > 1:
        return False
    return not dtypes or dtypes == {dtype} or (dtypes == {torch.float32} and dtype in (torch.bfloat16, torch.float16))


def runs_as_op(x: Tensor, norm: tuple[Tensor | None, ...], eps: float) -> bool:
    """Whether the op computes what BatchNorm in training mode would of x.

    It does not where torch takes the computation apart by itself: torch.compile fuses BatchNorm and activation too, and
    torch.func's transforms know torch's.
    """
    if not (x.is_cpu or (x.is_cuda and _C_cuda is not None)) or x.dtype not in DTYPES or x.dim() != 4:
        return False
    if not norm_fits(x.shape[1], x.dtype, norm) or (norm[0] is None) is not (norm[1] is None) or not eps > 0:
        return False
    if any(t is not None and (t.requires_grad or not t.is_contiguous()) for t in norm[:2]):
        return False
    return not is_traced_or_transformed() and not torch.jit.is_tracing()


def is_faster_as_one_op(x: Tensor, act: str) -> bool:
    """Not a small input; nor one without an activation in channels_last or on CUDA, where torch's own is as fast."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    if x.numel() < (LEAST_CUDA if x.is_cuda else LEAST_CHANNELS_LAST if channels_last else LEAST_NCHW):
        return False
    return act != "identity" or not (channels_last or x.is_cuda)


def train_batch_norm_act(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float, eps: float, act: str = "identity", slope: float = SLOPE,
) -> Tensor:  # fmt: skip
    """``act(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps))``; the running statistics move."""
    fits = type(x) is Tensor and x.dim() == 4 and x.numel() > x.shape[1]  # torch has the message for others
    # First: small layers feel every check.
    if not (fits and is_faster_as_one_op(x, act) and runs_as_op(x, (running_mean, running_var, weight, bias), eps)):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        return activate(y, act, slope)
    wide = accumulation_dtype(x.dtype)
    w, b = (t if t is None or t.dtype == wide else t.to(wide) for t in (weight, bias))
    # Not by way of the dispatcher, which would come back to Python for the Function.
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    running = (running_mean, running_var, momentum)
    return (_BatchNormAct.apply if needed else forward_in_training)(x, w, b, eps, act, slope, running)[0]


def move_by_batch(running: tuple, x: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The running statistics towards those of x."""
    if running[0] is not None:
        n = x.numel() // x.shape[1]
        move_statistics(running, mean, variance * (n / (n - 1)))


def move_statistics(running: tuple, mean: Tensor, variance: Tensor) -> None:
    """Running mean and variance by momentum towards these; running: (mean or None, variance or None, momentum)."""
    *statistics, momentum = running
    with torch.no_grad():
        for moving, value in zip(statistics, (mean, variance), strict=True):
            if moving is None:
                continue
            if moving.dtype == value.dtype:
                moving.lerp_(value, momentum)
            else:
                moving.copy_(moving.to(value.dtype).lerp(value, momentum))
