"""BatchNorm folded into the convolution before it, and what is made of folded weights kept for the next call.

Modules and compiled graphs keep folded and packed weights here and nowhere else, by one rule: they hold while the tensors that
they were made of are the same objects, with the same address, shape, strides, version and sample of their content, under the
same instruction set (csrc/cpu/runtime/watched_tensors.h). Any torch operation on a weight is seen so, and what changes most of a
tensor, by whatever means; what may be missed are a few elements or rows written past torch's version counter: call
``clear_caches`` after that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _extension
from ..ops.autograd import PLAIN
from ..ops.functional import accumulation_dtype

Tensors = tuple[Tensor | None, ...]


class _Entry(NamedTuple):
    watched: Any  # _C.WatchedTensors
    made: Any
    tensors: frozenset[int]  # their ids
    end: weakref.ref  # forgets the entry when the first tensor's memory is freed


# By owner, dtype and the first tensor's address: the latest few, since what else there is may change and not the first.
_entries: dict[tuple, tuple[_Entry, ...]] = {}
_MOST = 4


# Layers of frozen graphs, whose `made` nothing looks at again.
frozen: weakref.WeakSet[Any] = weakref.WeakSet()


def clear_caches() -> None:
    """Forgets all folded and packed weights, and frees their memory and this thread's of intermediates; they are made anew at the
    next call.

    Needed only after a few elements of a weight were written past torch's version counter, through ``.data``, NumPy or another
    process; and after any change of weights in a graph compiled with ``freeze``.
    """
    _entries.clear()
    _extension._C.clear_memory()
    for layer in frozen:
        layer.made.clear()


def forget(tensors: Any) -> None:
    """What was made of any of these tensors."""
    ids = {id(t) for t in tensors if t is not None}
    for key, entries in list(_entries.items()):
        kept = tuple(entry for entry in entries if ids.isdisjoint(entry.tensors))
        if not kept:
            _entries.pop(key, None)
        elif len(kept) < len(entries):
            _entries[key] = kept


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A fused step leaves versions as they are."""
    if not torch.compiler.is_compiling() and _entries:
        forget(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_step)


def found(owner: Any, tensors: Tensors, dtype: torch.dtype) -> Any:
    """What was made for this owner of these tensors and this dtype, while they are as they were; else None."""
    for entry in _entries.get((owner, dtype, tensors[0].data_ptr()), ()):
        if entry.watched.unchanged(tensors):
            return entry.made
    return None


def keep(owner: Any, tensors: Tensors, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """make(), kept for ``found`` where the tensors can be watched."""
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    if all(map(can_be_watched, tensors)):
        key = (owner, dtype, tensors[0].data_ptr())
        end = weakref.ref(tensors[0].untyped_storage(), lambda _: _entries.pop(key, None))
        ids = frozenset(id(t) for t in tensors if t is not None)
        others = (entry for entry in _entries.get(key, ()) if entry.tensors != ids)
        _entries[key] = (_Entry(_extension._C.WatchedTensors(tensors), made, ids, end), *others)[:_MOST]
    return made


def can_be_watched(t: Tensor | None) -> bool:
    """Dense in memory that is read without waiting, and with a version."""
    if t is None:
        return True
    if type(t) not in PLAIN or t.is_inference() or not t.is_cpu or t.layout is not torch.strided:
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
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift
