"""A BatchNorm module and the activation after it, in training as one operation."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.activations import activate
from ..ops.batch_norm import train_batch_norm_act
from .foldable import is_plain_module


def norm_then_activation(bn: nn.Module, x: Tensor, act: str, slope: float) -> Tensor:
    """``act(bn(x))`` for any module bn, in any mode, by the op where that is the same."""
    if type(bn) is not nn.BatchNorm2d or not bn.training or not is_plain_module(bn) or x.dim() != 4:
        return activate(bn(x), act, slope)
    mean, var, factor = bn.running_mean, bn.running_var, bn.momentum
    if not bn.track_running_stats:
        mean = var = None
    elif bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1 / float(bn.num_batches_tracked)
    return train_batch_norm_act(x, mean, var, bn.weight, bn.bias, factor or 0.0, bn.eps, act, slope)
