"""BatchNorm folded into the convolution before it, and what is made of folded weights kept for the next call.

Modules and compiled graphs keep folded and packed weights here and nowhere else, by one rule: they hold while the tensors that
they were made of are the same objects, at the same address, of the same version, with the same sample of their content
(csrc/watched_tensors.h), under the same instruction set. Any torch operation on a weight is seen so, and what changes most of a
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


_entries: dict[tuple, _Entry] = {}


def clear_caches() -> None:
    """Forgets all folded and packed weights, and frees their memory; they are made anew at the next call.

    Needed only after a few elements of a weight were written past torch's version counter, through ``.data``, NumPy or another
    process.
    """
    _entries.clear()


def forget(tensors: Any) -> None:
    """What was made of any of these tensors."""
    ids = {id(t) for t in tensors if t is not None}
    for key, entry in list(_entries.items()):
        if not ids.isdisjoint(entry.tensors):
            _entries.pop(key, None)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A fused step leaves versions as they are."""
    if not torch.compiler.is_compiling() and _entries:  # a compiled step counts its writes
        forget(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_step)


def found(owner: Any, tensors: Tensors, dtype: torch.dtype) -> Any:
    """What was made for this owner of these tensors and this dtype, while they are as they were; else None."""
    entry = _entries.get((owner, dtype, id(tensors[0]), id(tensors[-1])))
    return entry.made if entry is not None and entry.watched.unchanged(tensors) else None


def keep(owner: Any, tensors: Tensors, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """make(), kept for ``found``. Not while a compiler or functorch looks on."""
    key = (owner, dtype, id(tensors[0]), id(tensors[-1]))
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    if all(map(can_be_watched, tensors)):
        end = weakref.ref(tensors[0].untyped_storage(), lambda _: _entries.pop(key, None))
        ids = frozenset(id(t) for t in tensors if t is not None)
        _entries[key] = _Entry(_extension._C.WatchedTensors(tensors), made, ids, end)
    else:
        _entries.pop(key, None)
    return made


def can_be_watched(t: Tensor | None) -> bool:
    """Dense in memory that is read without waiting, and with a version."""
    if t is None:
        return True
    if type(t) not in PLAIN or t.is_inference() or not t.is_cpu or t.layout is not torch.strided:
        return False
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def norm_fits(channels: int, dtype: torch.dtype, norm: Tensors) -> bool:
    """Whether F.batch_norm takes these mean, variance, weight and bias for so many channels of this dtype."""
    there = [t for t in norm if t is not None]
    dtypes = {t.dtype for t in there}
    if any(tuple(t.shape) != (channels,) for t in there) or len(dtypes) > 1:
        return False
    return not dtypes or dtypes == {dtype} or (dtypes == {torch.float32} and dtype in (torch.bfloat16, torch.float16))


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
