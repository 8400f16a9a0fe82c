"""Layers given a class that runs on our kernels: the same object, its parameters, hooks and names as before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.conv_transpose import DepthwiseConvTranspose1d, DepthwiseConvTranspose2d
from ..nn.depthwise import DepthwiseConv2d
from ..nn.depthwise1d import DepthwiseConv1d
from ..nn.scriptable import stand_in
from ..ops.functional import DTYPES, name_of
from .sequential import SequentialMixin, flattened, is_sequential


class Swapped:
    """Mixed into a subclass of one of torch's convolutions: its own behaviour, our kernel."""


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


OURS = {
    nn.Conv2d: DepthwiseConv2d,
    nn.Conv1d: DepthwiseConv1d,
    nn.ConvTranspose2d: DepthwiseConvTranspose2d,
    nn.ConvTranspose1d: DepthwiseConvTranspose1d,
}
_PLAIN_OF = {ours: plain for plain, ours in OURS.items()}
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose1d)
_swapped: dict[type, type] = dict(OURS)


def plain_class(conv: nn.Module) -> type:
    """Of torch's layers that are replaced, the one that this is."""
    return next(plain for plain in OURS if isinstance(conv, plain))


def is_replaced(conv: nn.Module) -> bool:
    """Whether it is one of ours, or has been made one."""
    return isinstance(conv, (*_PLAIN_OF, Swapped))


def class_for(kind: type) -> type:
    """The class that a depthwise convolution, or a sequential container, of this class is given."""
    if kind not in _swapped:
        methods: dict[str, Any] = {"__module__": __name__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce_ex}
        if issubclass(kind, nn.Sequential):
            name, mixin = f"Fusing{kind.__name__}", SequentialMixin
            methods["forward"] = SequentialMixin.forward
        else:
            name, mixin = f"Depthwise{kind.__name__}", _SamePadded if _is_timm_same(kind) else Swapped
            plain = next(plain for plain in OURS if issubclass(kind, plain))
            if plain in _TRANSPOSED:
                methods["forward"] = OURS[plain].forward
            elif plain is nn.Conv1d:
                methods |= {"_conv_forward": _depthwise_forward_1d, "causal": False}
            else:
                methods["_conv_forward"] = _depthwise_forward
        _swapped[kind] = type(name, (mixin, kind), {**methods, "__prepare_scriptable__": _prepare_scriptable})
    return _swapped[kind]


def _prepare_scriptable(self: nn.Module) -> nn.Module:
    """torch.jit.script reads a class's source: it is given the plain model."""
    from .convert import unfuse

    return stand_in(unfuse(self), self)


def _new_swapped(kind: type) -> nn.Module:
    """Without __init__, whose arguments are not known. What a pickle names may be anything: nothing else is made, or called."""
    if not isinstance(kind, type) or not issubclass(kind, (*OURS, nn.Sequential)):
        raise TypeError(f"dwconv_ext: a pickle must name a class of convolutions or of nn.Sequential here, but has {kind!r}")
    return object.__new__(class_for(kind))


def _is_ours(kind: type) -> bool:
    return kind in _PLAIN_OF or (issubclass(kind, (Swapped, SequentialMixin)) and kind.__module__ == __name__)


def _written_with(kind: type) -> type:
    """The class that one of ours stands for."""
    return _PLAIN_OF.get(kind) or kind.__bases__[-1]


def _is_timm_same(kind: type) -> bool:
    return kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")


def why_not(conv: nn.Module) -> str:
    """Why this depthwise convolution must stay what it is; empty where it need not."""
    kind, plain = type(conv), plain_class(conv)
    if is_replaced(conv):
        return ""
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
    if kind is plain or _is_timm_same(kind):
        return ""
    if plain in _TRANSPOSED:
        return f"{kind.__name__} overrides forward" if kind.forward is not plain.forward else ""
    if kind._conv_forward is not plain._conv_forward:
        return f"{kind.__name__} overrides _conv_forward"
    function = plain.__name__.lower()
    if kind.forward is not plain.forward and function in kind.forward.__code__.co_names:
        return f"{kind.__name__}.forward calls {function} itself"
    return ""


def _is_copied_by_its_state(kind: type) -> bool:
    return kind.__reduce__ is object.__reduce__ and (kind.__reduce_ex__ is object.__reduce_ex__ or _is_ours(kind))


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, tuple(OURS)) and module.groups > 1 and module.groups == module.in_channels


def fuses(module: nn.Module) -> bool:
    """Whether it is a sequential container with a convolution to fuse something with."""
    if not is_sequential(module) or not _is_copied_by_its_state(type(module)):
        return False
    fused = (nn.Conv2d, nn.ConvTranspose2d)
    return any(isinstance(layer, fused) and (is_depthwise(layer) or isinstance(layer, nn.Conv2d)) for layer in flattened(module))


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
