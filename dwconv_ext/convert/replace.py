"""Layers given a class that runs on our kernels: the same object, its parameters, hooks and names as before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.depthwise import DepthwiseConv2d
from ..nn.depthwise1d import DepthwiseConv1d
from ..ops.functional import DTYPES, name_of
from .sequential import SequentialMixin, flattened, is_sequential


class Swapped:
    """Mixed into a subclass of nn.Conv1d or nn.Conv2d: its own behaviour, our kernel."""


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


def _depthwise_forward_1d(self: nn.Conv1d, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return DepthwiseConv1d._conv_forward(self, input, weight, bias)


def _reduce_ex(self: nn.Module, protocol: int) -> tuple:
    """Made again from the class it was written with when unpickled."""
    _, _, state, *rest = super(type(self), self).__reduce_ex__(protocol)
    return (_new_swapped, (_written_with(type(self)),), state, *rest)


OURS = {nn.Conv2d: DepthwiseConv2d, nn.Conv1d: DepthwiseConv1d}
_swapped: dict[type, type] = dict(OURS)


def class_for(kind: type) -> type:
    """The class that a depthwise convolution, or a sequential container, of this class is given."""
    if kind not in _swapped:
        methods: dict[str, Any] = {"__module__": __name__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce_ex}
        if issubclass(kind, nn.Sequential):
            name, mixin = f"Fusing{kind.__name__}", SequentialMixin
            methods["forward"] = SequentialMixin.forward
        else:
            name, mixin = f"Depthwise{kind.__name__}", _SamePadded if _is_timm_same(kind) else Swapped
            one = issubclass(kind, nn.Conv1d)
            methods["_conv_forward"] = _depthwise_forward_1d if one else _depthwise_forward
            if one:
                methods["causal"] = False
        _swapped[kind] = type(name, (mixin, kind), {**methods, "__prepare_scriptable__": _prepare_scriptable})
    return _swapped[kind]


def _prepare_scriptable(self: nn.Module) -> nn.Module:
    """torch.jit.script reads a class's source: it is given the plain model."""
    from .convert import unfuse

    return unfuse(self)


def _new_swapped(kind: type) -> nn.Module:
    return object.__new__(class_for(kind))


def _is_ours(kind: type) -> bool:
    return kind in OURS.values() or (issubclass(kind, (Swapped, SequentialMixin)) and kind.__module__ == __name__)


def _written_with(kind: type) -> type:
    """The class that one of ours stands for."""
    return next((theirs for theirs, ours in OURS.items() if ours is kind), kind.__bases__[-1])


def _is_timm_same(kind: type) -> bool:
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


def why_not(conv: nn.Conv1d | nn.Conv2d) -> str:
    """Why this depthwise convolution must stay what it is; empty where it need not."""
    kind = type(conv)
    if is_replaced(conv):
        return ""
    base = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d
    function = base.__name__.lower()
    if not _is_copied_by_its_state(kind):
        return f"{kind.__name__} overrides __reduce__"
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "its sizes are not known before the first call"
    if hasattr(conv, "parametrizations"):
        return "its weight is parametrized"
    if conv.weight.dtype not in DTYPES:
        return f"the kernels have no {name_of(conv.weight.dtype)}"
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return "its forward was replaced on the instance"
    if kind is base or _is_timm_same(kind):
        return ""
    if kind._conv_forward is not base._conv_forward:
        return f"{kind.__name__} overrides _conv_forward"
    if kind.forward is not base.forward and function in kind.forward.__code__.co_names:
        return f"{kind.__name__}.forward calls {function} itself"
    return ""


def _is_copied_by_its_state(kind: type) -> bool:
    return kind.__reduce__ is object.__reduce__ and (kind.__reduce_ex__ is object.__reduce_ex__ or _is_ours(kind))


def is_replaced(conv: nn.Module) -> bool:
    """Whether it is one of ours, or has been made one."""
    return isinstance(conv, (DepthwiseConv1d, DepthwiseConv2d, Swapped))


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1 and module.groups == module.in_channels


def fuses(module: nn.Module) -> bool:
    """Whether it is a sequential container with a convolution to fuse something with."""
    if not is_sequential(module) or not _is_copied_by_its_state(type(module)):
        return False
    return any(isinstance(layer, nn.Conv2d) for layer in flattened(module))


def restore(module: nn.Module) -> None:
    """The class that the module was written with."""
    kind = type(module)
    if getattr(module, "causal", False):
        return  # torch has no class for it
    if _is_ours(kind):
        module.__class__ = _written_with(kind)
    elif "parametrizations" in module.__dict__.get("_modules", {}) and _is_ours(kind.__bases__[0]):
        # torch.nn.utils.parametrize made a subclass of ours.
        base = _written_with(kind.__bases__[0])
        methods = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{base.__name__}", (base,), methods)
