"""A BatchNorm module and the activation after it in training as one operation, and with the depthwise convolution before them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.activations import activate
from ..ops.arguments import IntOrPair
from ..ops.batch_norm import LEAST_CUDA, runs_as_op, train_batch_norm_act
from ..ops.depthwise_norm import train_depthwise_norm_act
from ..ops.functional import accumulation_dtype, as_autocast, as_weights_layout, depthwise_conv2d
from ..ops.sync_batch_norm import train_sync_batch_norm_act
from .foldable import fits, is_conv, is_plain_module, settings_of, starts_a_block
from .folded_layers import ConvSettings

DEVICES = ("cuda",)  # where the depthwise convolution's gradients are faster with BatchNorm's


def _running(bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor | None, Tensor | None, float]:
    """The running statistics and how far they move in this call, which is counted."""
    factor = bn.momentum
    if not bn.track_running_stats:
        return None, None, 0.0
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1 / float(bn.num_batches_tracked)
    return bn.running_mean, bn.running_var, factor or 0.0


class Checkpointing:
    """Mixed into a module: what its depthwise convolutions compute again in backward instead of keeping it."""

    _checkpointing: str | None = None

    @property
    def checkpointing(self) -> str | None:
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str | None) -> None:
        if value not in (None, "depthwise"):
            raise ValueError(f"{type(self).__name__}: checkpointing must be None or 'depthwise', but got {value!r}")
        object.__setattr__(self, "_checkpointing", value)


def trains_by_its_batch(bn: nn.Module) -> bool:
    return type(bn) is nn.BatchNorm2d and bn.training and is_plain_module(bn)


def norm_then_activation(bn: nn.Module, x: Tensor, act: str, slope: float) -> Tensor:
    """``act(bn(x))`` for any module bn, in any mode, by the op where that is the same."""
    if type(bn) is nn.SyncBatchNorm and _synchronises(bn, x):
        wide = accumulation_dtype(x.dtype)
        affine = (None if t is None else t.to(wide) for t in (bn.weight, bn.bias))
        return train_sync_batch_norm_act(x, *affine, bn.eps, act, slope, _running(bn), bn.process_group)
    if not trains_by_its_batch(bn) or x.dim() != 4:
        return activate(bn(x), act, slope)
    mean, var, factor = _running(bn)
    return train_batch_norm_act(x, mean, var, bn.weight, bn.bias, factor, bn.eps, act, slope)


def _synchronises(bn: nn.SyncBatchNorm, x: Tensor) -> bool:
    """Whether the statistics are of several processes' batches, and the ops compute with them."""
    if x.device.type not in DEVICES or not bn.training or not is_plain_module(bn) or type(x) is not Tensor:
        return False
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(bn.process_group) == 1:
        return False
    return runs_as_op(x, (bn.running_mean, bn.running_var, bn.weight, bn.bias), bn.eps)


def depthwise_norm_activation(
    conv: nn.Module, bn: nn.Module, x: Tensor, act: str, slope: float, checkpointing: str | None = None
) -> Tensor:
    """``act(bn(conv(x)))`` for any modules, in any mode; checkpointing: "depthwise" to compute conv(x) again for backward."""
    again = checkpointing == "depthwise"
    plain = type(x) is Tensor and (again or x.device.type in DEVICES) and trains_by_its_batch(bn)
    if not (plain and is_conv(conv) and starts_a_block(conv) and conv.bias is None and fits(x, conv)):
        return norm_then_activation(bn, conv(x), act, slope)
    weight, settings = conv._parameters["weight"], settings_of(conv, None, "identity", 0.0)
    norm = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    if not _trains_as_one(as_autocast(x), weight, settings, norm, bn.eps, again):
        return norm_then_activation(bn, conv(x), act, slope)
    x = as_weights_layout(as_autocast(x), weight)
    return _train_as_one(x, as_autocast(weight), settings, norm, _running(bn), (bn.eps, act, slope), again)


def train_depthwise_norm(
    x: Tensor, w: Tensor, stride: IntOrPair, padding: str | IntOrPair, dilation: IntOrPair, mean: Tensor | None,
    var: Tensor | None, norm_w: Tensor | None, norm_b: Tensor | None, momentum: float, eps: float, act: str, slope: float,
) -> Tensor:  # fmt: skip
    """``train_batch_norm_act(depthwise_conv2d(x, w, None, stride, padding, dilation), mean, var, ...)``, of a graph."""
    settings, norm = ConvSettings(stride, padding, dilation, len(w)), (mean, var, norm_w, norm_b)
    if type(x) is Tensor and x.dim() == 4 and _trains_as_one(x, w, settings, norm, eps, again=False):
        return _train_as_one(x, w, settings, norm, (mean, var, momentum), (eps, act, slope), again=False)
    return train_batch_norm_act(depthwise_conv2d(x, w, None, stride, padding, dilation), *norm, momentum, eps, act, slope)


def _train_as_one(
    x: Tensor, w: Tensor, settings: ConvSettings, norm: tuple, running: tuple, how: tuple, again: bool
) -> Tensor:  # fmt: skip
    wide = accumulation_dtype(x.dtype)
    affine = (None if t is None else t.to(wide) for t in norm[2:])
    return train_depthwise_norm_act(x, w, *affine, settings.geometry("depthwise_conv2d", w), how, running, again)[0]


def _trains_as_one(x: Tensor, w: Tensor, settings: ConvSettings, norm: tuple, eps: float, again: bool) -> bool:
    """Whether the Function gives what a depthwise convolution and BatchNorm in training do, and is worth it or asked for."""
    if not torch.is_grad_enabled() or not (x.requires_grad or w.requires_grad) or not runs_as_op(x, norm, eps):
        return False
    strides, (top, bottom, left, right), dilations = settings.geometry("depthwise_conv2d", w)
    sides = zip(x.shape[2:], w.shape[2:], strides, (top + bottom, left + right), dilations, strict=True)
    height, width = ((size + pads - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pads, dilation in sides)
    values = len(x) * height * width
    return height > 0 and width > 0 and values > 1 and (again or values * x.shape[1] >= LEAST_CUDA)
