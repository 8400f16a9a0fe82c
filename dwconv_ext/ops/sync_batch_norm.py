"""BatchNorm by the statistics of several processes' batches, with the activation after it: torch.nn.SyncBatchNorm on CUDA.

Between the two sweeps of each pass the processes exchange what the first has found (batch_norm.py): mean, variance and count
forward, the two sums backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_norm import move_statistics
from .functional import accumulation_dtype

ops = torch.ops.dwconv_ext


def _joined(mean: Tensor, variance: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of all processes, in float64 (Chan, Golub and LeVeque 1983)."""
    own = torch.cat((mean, variance, mean.new_full((1,), count))).double()
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group)
    means, variances, counts = torch.stack(every).split((len(mean), len(mean), 1), 1)
    total = counts.sum()
    joint = (counts * means).sum(0) / total
    return joint, (counts * (variances + (means - joint) ** 2)).sum(0) / total, total


class SyncBatchNormActFunction(torch.autograd.Function):
    """``act(sync_batch_norm(input))``, in which the running statistics move: ``apply(input, weight, bias, eps, act, slope,
    running, group)`` with running (mean, variance, momentum). A process's batch may be empty. Differentiable once.

    As torch's, the gradients of weight and bias are of the process's own batch.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, act: str, slope: float, running: tuple, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels, wide = x.shape[1], accumulation_dtype(x.dtype)
        nothing = x.new_zeros((channels,), dtype=wide)
        own = ops.batch_norm_statistics(x) if x.numel() else (nothing, nothing)
        mean, variance, total = _joined(*own, x.numel() // channels, group)
        move_statistics(running, mean.to(wide), (variance * (total / (total - 1))).to(wide))
        mean, variance = mean.to(wide), variance.to(wide)
        y = ops.batch_norm_act_apply(x, w, b, mean, variance, eps, act, slope) if x.numel() else torch.empty_like(x)
        return y, mean, variance, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, w, b, *how, _, ctx.group = inputs
        ctx.how = tuple(how)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, w, b, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, w, b, mean, variance, total = ctx.saved_tensors
        operands = (grad, x, w, b, mean, variance)
        own = torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():
            own = ops.batch_norm_act_backward_sums(*operands, *ctx.how)
        every = torch.cat(own)
        dist.all_reduce(every, group=ctx.group)
        shares = (every / total.to(every.dtype)).split(len(mean))
        to_x = ops.batch_norm_act_backward_apply(*operands, *shares, *ctx.how) if x.numel() else torch.empty_like(x)
        return to_x, None if w is None else own[0], None if b is None else own[1], *(None,) * 5


def train_sync_batch_norm_act(*arguments: Any) -> Tensor:
    return SyncBatchNormActFunction.apply(*arguments)[0]
