"""BatchNorm folded into the convolution before it, and kept for the next call while neither has changed."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _C
from .autograd import taken_apart
from .functional import accumulation_dtype


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals bn(conv(x)) in eval mode, computed in at least float32."""
    dtype = conv.weight.dtype
    wide = accumulation_dtype(dtype)
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    shift = -bn.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - bn.running_mean.to(wide)
    bias = shift * scale
    if bn.bias is not None:
        bias = bias + bn.bias.to(wide)
    return (conv.weight.to(wide) * scale.reshape(-1, 1, 1, 1)).to(dtype), bias.to(dtype)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


_FOLDED = {"weight", "bias", "running_mean", "running_var"}
_PLAIN = {Tensor, nn.Parameter}
_requires_grad = operator.attrgetter("requires_grad")


def _differentiated(sources: tuple[Tensor, ...]) -> bool:
    """Whether gradients in eval mode are to reach these tensors through the folding."""
    return torch.is_grad_enabled() and any(map(_requires_grad, sources))


def _may_keep(parts: tuple[nn.Module, ...], sources: tuple[Tensor, ...]) -> bool:
    """Whether a change of any of these tensors would be noticed: plain tensors with version counters, not computed anew."""
    if not all("weight" in part._parameters for part in parts):  # parametrized
        return False
    return set(map(type, sources)) <= _PLAIN and not any(map(Tensor.is_inference, sources))


class Kept(NamedTuple):
    """What was folded, and from what."""

    snapshot: tuple  # of all that decided it: csrc/snapshot.h
    settings: tuple
    folded: tuple  # weight and bias of each convolution, and what _pack made of them

    def is_of(self, snapshot: tuple, settings: tuple) -> bool:
        """Whether it would be the same for another snapshot: the modules may have changed in what does not matter."""
        tensors, states = self.snapshot[1:3]
        return self.settings == settings and states == snapshot[2] and all(map(operator.is_, tensors, snapshot[1]))


class Folding(nn.Module):
    """A module that runs convolutions with the BatchNorms after them folded in, in eval mode."""

    def _parts(self) -> tuple[nn.Module, ...]:
        """Convolutions and their BatchNorms in turn."""
        raise NotImplementedError

    def _pack(self, folded: tuple[Tensor, ...]) -> Any:
        """A form of the folded weights that is worth keeping beside them."""
        return None

    def _settings(self) -> tuple:
        """What that form depends on besides the weights."""
        return ()

    def _watched(self) -> list[nn.Module]:
        """The modules on which it depends whether the folded form is what forward computes."""
        return [self, *self._parts()]

    def clear_cache(self) -> None:
        """Forgets the folded weights; the next forward in eval mode folds anew."""
        self._kept: Kept | None = None

    def train(self, mode: bool = True) -> Folding:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Folding:
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _ready(self) -> tuple | None:
        """What _folded_weights gives, where the folded form is what forward computes."""
        if not taken_apart():
            kept = self._kept
            if kept is not None and _C.is_current(kept.snapshot) and not _differentiated(kept.snapshot[1]):
                return kept.folded
        return self._folded_weights() if self._can_fold() else None

    def _can_fold(self) -> bool:
        """Whether every BatchNorm is a fixed scale and shift now, and nothing waits for what lies between the parts."""
        parts = self._parts()
        if not (self._undisturbed(parts) and self._takes(parts[0])):  # first: a part may have been replaced by something else
            return False
        return all(bn._buffers["running_mean"] is not None and bn._buffers["running_var"] is not None for bn in parts[1::2])

    def _undisturbed(self, parts: tuple[nn.Module, ...]) -> bool:
        """No BatchNorm in training, no hooks."""
        for bn in parts[1::2]:
            if bn.training:
                return False
        return not any(map(has_hooks, parts))

    def _takes(self, conv: nn.Conv2d) -> bool:
        """Whether the first convolution is one that the folded form computes."""
        return True

    def _folded_weights(self) -> tuple:
        """Weight and bias of each convolution and, where they are kept for the next call too, what _pack makes of them."""
        parts = self._parts()
        if taken_apart():
            return (*self._fold_all(parts), None)
        named = [item for part in parts for item in (*part._parameters.items(), *part._buffers.items())]
        sources = tuple(t for name, t in named if name in _FOLDED and t is not None)
        if _differentiated(sources) or not _may_keep(parts, sources):
            return (*self._fold_all(parts), None)
        kept, snapshot = self._kept, _C.snapshot(self._watched(), sources)
        settings = (*self._settings(), *(bn.eps for bn in parts[1::2]))
        if kept is not None and kept.is_of(snapshot, settings):
            folded = kept.folded
        else:
            with torch.no_grad():
                folded = self._fold_all(parts)
                folded = (*folded, self._pack(folded))
        self._kept = Kept(snapshot, settings, folded)
        return folded

    @staticmethod
    def _fold_all(parts: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        return tuple(t for conv, bn in zip(parts[::2], parts[1::2], strict=True) for t in fold(conv, bn))
