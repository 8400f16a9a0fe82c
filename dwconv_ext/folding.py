"""BatchNorm folded into the convolution before it, and kept for the next call while neither has changed."""

from __future__ import annotations

import operator
from typing import Any

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


_PLAIN = {Tensor, nn.Parameter}
_version = operator.attrgetter("_version")


def _in_graph(sources: list[Tensor]) -> bool:
    """Whether folding these tensors is part of what is traced or differentiated, so that gradients in eval mode reach them."""
    return taken_apart() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources))


def _may_keep(sources: list[Tensor]) -> bool:
    """Whether a change of any of these tensors would be noticed: plain tensors with version counters."""
    return set(map(type, sources)) <= _PLAIN and not any(map(Tensor.is_inference, sources))


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

    def clear_cache(self) -> None:
        """Forgets the folded weights; the next forward in eval mode folds anew."""
        self._folded: tuple[list, list[Tensor], tuple] | None = None  # key, from what, result

    def train(self, mode: bool = True) -> Folding:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Folding:
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}

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
        sources = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        kept = self._folded
        same = kept is not None and len(kept[1]) == len(sources) and all(map(operator.is_, kept[1], sources))
        if _in_graph(sources) or not (same or _may_keep(sources)):
            return (*self._fold_all(parts), None)
        # eps and the instruction set are part of what was folded and packed; the tensors themselves are kept, so that an
        # address can't be taken for another.
        eps = [bn.eps for bn in parts[1::2]]
        key = [_C.selected_isa(), *self._settings(), *eps, *map(_version, sources), *map(Tensor.data_ptr, sources)]
        if not same or kept[0] != key:
            with torch.no_grad():
                folded = self._fold_all(parts)
                kept = self._folded = key, sources, (*folded, self._pack(folded))
        return kept[2]

    @staticmethod
    def _fold_all(parts: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        return tuple(t for conv, bn in zip(parts[::2], parts[1::2], strict=True) for t in fold(conv, bn))
