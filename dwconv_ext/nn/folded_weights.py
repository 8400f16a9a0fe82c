"""BatchNorm folded into the convolution before it, and what is made of folded weights kept for the next call.

Modules and compiled graphs keep folded and packed weights here and nowhere else, by one rule: they hold while the tensors that
they were made of are the same objects, at the same address, of the same version, with the same sample of their content
(csrc/watched_tensors.h), under the same instruction set. Any torch operation on a weight is seen so, and every write of a whole
tensor, by whatever means; what may be missed is single elements written through ``.data``: call :func:`clear_caches` after that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._extension import _C
from ..ops.functional import accumulation_dtype

Tensors = tuple[Tensor | None, ...]
_PLAIN = (Tensor, nn.Parameter)


def clear_caches() -> None:
    """Forgets all folded and packed weights; they are made anew at the next call.

    Needed only after a few elements of a weight were written past torch's version counter, through ``.data`` or by another
    process.
    """
    _C.WatchedTensors.forget_all()


register_optimizer_step_post_hook(lambda *_: clear_caches())  # a fused step leaves versions as they are


class Kept:
    """What was made of some tensors, while they are as they were; nothing in a copy or from a pickle.

    One for each first tensor: equal layers may share their code, as Dynamo has them share a graph.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple] = {}

    def get(self, tensors: Tensors, settings: Any, make: Callable[[], Any]) -> Any:
        """make(), or what it gave before; settings: what else it depends on. Not while a compiler or functorch looks on."""
        key = id(tensors[0])
        entry = self._entries.get(key)
        if entry is not None and settings == entry[1] and entry[0].unchanged(tensors):
            return entry[2]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if all(map(_can_be_watched, tensors)):
            entries = self._entries
            end = weakref.ref(tensors[0], lambda _: entries.pop(key, None))
            entries[key] = _C.WatchedTensors(tensors), settings, made, end
        else:
            self._entries.pop(key, None)
        return made

    def clear(self) -> None:
        self._entries.clear()

    def __reduce__(self) -> tuple:
        return Kept, ()

    def __deepcopy__(self, memo: dict) -> Kept:
        return Kept()


def _can_be_watched(t: Tensor | None) -> bool:
    """Dense in memory that is read without waiting, and with a version."""
    if t is None:
        return True
    if type(t) not in _PLAIN or t.is_inference() or not t.is_cpu or t.layout is not torch.strided:
        return False
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Weight and bias of the one convolution that equals BatchNorm in eval mode after conv(x); mean None for no BatchNorm.

    In the accumulation type, float32 where the weights are bfloat16 or float16: mean * scale of a channel that is always zero
    need not fit float16.
    """
    wide = accumulation_dtype(weight.dtype)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if mean is None or var is None:
        return weight, bias
    scale = torch.rsqrt(var.to(wide) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(wide)
    shift = -mean.to(wide) if bias is None else bias - mean.to(wide)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(wide)
    return weight * scale.reshape(-1, 1, 1, 1), shift
