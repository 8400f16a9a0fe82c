"""Runs code that should only compute, and finds out whether it did more: draw random numbers, set attributes, write tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Changed(Exception):
    """What ran does more than compute."""


class _NothingInPlace(TorchFunctionMode):
    """Real tensors (parameters, buffers) may be read, not written."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name == "__setitem__" or name.startswith("__i")) and args and isinstance(args[0], Tensor):
            raise Changed(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def changes_nothing(module: nn.Module) -> Iterator[None]:
    """Raises Changed where what runs within draws random numbers or sets attributes, which are put back.

    torch.fx's own attributes, tensors that it found to be constants, may stay.
    """
    kept = [(holder, dict(holder)) for m in module.modules() for holder in (m.__dict__, m._buffers, m._parameters, m._modules)]
    states = random.getstate(), torch.get_rng_state()
    try:
        with _NothingInPlace():
            yield
    finally:
        changed = False
        for holder, before in kept:
            now = {name: value for name, value in holder.items() if name in before or not name.startswith("_tensor_constant")}
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                holder.clear()
                holder.update(before)
                changed = True
        if random.getstate() != states[0] or not torch.equal(torch.get_rng_state(), states[1]):
            random.setstate(states[0])
            torch.set_rng_state(states[1])
            changed = True
        if changed:
            raise Changed("forward sets attributes or draws random numbers")
