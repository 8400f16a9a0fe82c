"""A BatchNorm module and the activation after it, in training as one operation."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.activations import IDENTITIES, OF_MODULE, activate
from ..ops.batch_norm import train_batch_norm_act

_KNOWN = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv2d, *OF_MODULE, *IDENTITIES)
_FORWARDS = {kind: kind.forward for kind in _KNOWN}  # before anybody patches a class


def is_plain_module(module: nn.Module) -> bool:
    """Whether a call of it is a call of its class's own forward: no hooks, and nothing in the place of forward or __call__."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    kind = type(module)
    if "forward" in module.__dict__ or kind.__call__ is not nn.Module.__call__:
        return False
    return kind.forward is _FORWARDS.get(kind, kind.forward)


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
