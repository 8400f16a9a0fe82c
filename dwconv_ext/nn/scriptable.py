"""What torch.jit.script, which reads a class's source, is given in a module's place."""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
_originals: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def stand_in(plain: Module, original: nn.Module) -> Module:
    """The plain module, which keeps the original alive: torch.jit.script puts the one in the other's place and remembers that by
    the original's address alone, where another module could be made and be taken for it."""
    _originals[plain] = original
    return plain


def as_class(kind: type[Module], original: nn.Module) -> Module:
    """A module of torch's class over the original's parameters and settings."""
    plain = kind.__new__(kind)
    plain.__dict__.update(original.__dict__)
    return stand_in(plain, original)
