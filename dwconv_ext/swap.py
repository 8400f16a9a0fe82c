"""Depthwise convolutions given a class that runs on our kernels: the same object, its parameters, hooks and names as before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .functional import DTYPES
from .modules import DepthwiseConv2d
from .onednn import PackedLinear


class Swapped:
    """Mixed into a subclass of nn.Conv2d: its own behaviour, our kernel. Found again by its original when unpickled."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, state, *rest = super().__reduce_ex__(protocol)
        return (_new_swapped, (type(self).__bases__[-1],), state, *rest)


class _SamePadded(Swapped):
    """timm's Conv2dSame: TensorFlow's padding, which depends on the input's size, then the convolution."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, k, s, d in zip(input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        if any(pads):
            input = F.pad(input, pads)
        return _depthwise_forward(self, input, self.weight, self.bias)


def _depthwise_forward(self: nn.Conv2d, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return DepthwiseConv2d._conv_forward(self, input, weight, bias)


_swapped: dict[type, type] = {nn.Conv2d: DepthwiseConv2d}


def class_for(kind: type) -> type:
    """The class that a depthwise convolution of this class is given."""
    if kind not in _swapped:
        mixin = _SamePadded if _is_timm_same(kind) else Swapped
        methods = {"_conv_forward": _depthwise_forward, "__module__": __name__, "__doc__": kind.__doc__}
        _swapped[kind] = type(f"Depthwise{kind.__name__}", (mixin, kind), methods)
    return _swapped[kind]


def _new_swapped(kind: type) -> nn.Module:
    return object.__new__(class_for(kind))


def _is_timm_same(kind: type) -> bool:
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


def why_not(conv: nn.Conv2d) -> str:
    """Why this depthwise convolution must stay what it is; empty where it need not."""
    kind = type(conv)
    if kind is DepthwiseConv2d or isinstance(conv, Swapped):
        return ""
    if conv.weight.dtype not in DTYPES:
        return f"the kernels have no {str(conv.weight.dtype).removeprefix('torch.')}"
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "its sizes are not known before the first call"
    if hasattr(conv, "parametrizations"):
        return "its weight is parametrized"
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return "its forward was replaced on the instance"
    if kind is nn.Conv2d or _is_timm_same(kind):
        return ""
    if kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} computes its convolution in its own way"
    if kind.forward is not nn.Conv2d.forward and "conv2d" in kind.forward.__code__.co_names:
        return f"{kind.__name__}.forward calls conv2d itself"
    return ""


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def restore(module: nn.Module) -> None:
    """The class that the module was written with."""
    if type(module) is DepthwiseConv2d:
        module.__class__ = nn.Conv2d
    elif type(module) is PackedLinear:
        module.__class__ = nn.Linear
        module.__dict__.pop("_kept", None)
    elif isinstance(module, Swapped):
        module.__class__ = type(module).__bases__[-1]
