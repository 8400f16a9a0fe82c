"""Arguments as callers write them, checked and brought into the form the ops take.

Each message names the op or class, the argument, what is wanted and what it was.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS

IntOrPair = int | Sequence[int]
IntOrSingle = int | Sequence[int]
MOST_INT64 = 2**63 - 1
PADDING = "'same', 'valid', an int or a pair of ints"
PADDING_1D = "'same', 'valid', an int or a 1-tuple"
PADDINGS_1D = "'same', 'valid', an int, a 1-tuple or two ints"
PADDINGS = "'same', 'valid', an int, a pair or four ints"


def _integer(value: object) -> int | None:
    """An int of Python's, numpy's or a compiler's, as the ops take it; None for anything else."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return None if isinstance(value, Tensor) else operator.index(value)  # numpy's bool has no index
    except TypeError:
        return None


def to_pair(op: str, name: str, value: IntOrPair, wanted: str = "an int or a pair of ints") -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:
        height, width = value
        if type(height) is type(width) is int and 0 <= height <= MOST_INT64 and 0 <= width <= MOST_INT64:
            return value  # a module's: no time lost
    values = [_integer(v) for v in (value if isinstance(value, (tuple, list)) else (value,))]
    if any(v is None for v in values) or len(values) not in (1, 2):
        raise TypeError(f"{op}: {name} must be {wanted}, but got {value!r}")
    if any(isinstance(v, int) and abs(v) > MOST_INT64 for v in values):
        raise ValueError(f"{op}: {name} must fit 64 bits, but got {value!r}")
    return values[0], values[-1]


def to_single(op: str, name: str, value: IntOrSingle, wanted: str = "an int or a 1-tuple") -> int:
    if type(value) is int and 0 <= value <= MOST_INT64:
        return value
    values = [_integer(v) for v in (value if isinstance(value, (tuple, list)) else (value,))]
    if any(v is None for v in values) or len(values) != 1:
        raise TypeError(f"{op}: {name} must be {wanted}, but got {value!r}")
    if isinstance(values[0], int) and abs(values[0]) > MOST_INT64:
        raise ValueError(f"{op}: {name} must fit 64 bits, but got {value!r}")
    return values[0]


def at_least(least: int) -> str:
    """What an error says is wanted of a number: for one from 1 on, nn.Conv2d's words."""
    return "should be greater than zero" if least else "must be non-negative"


def to_padding(op: str, value: IntOrPair) -> tuple[int, ...]:
    """Height and width, or four ends: top, bottom, left and right."""
    if isinstance(value, (tuple, list)) and len(value) == 4:
        ends = [to_pair(op, "padding", end, PADDINGS)[0] for end in value if _integer(end) is not None]
        if len(ends) == 4:
            return tuple(ends)
    return to_pair(op, "padding", value, PADDINGS)


def four_paddings(padding: Sequence[int]) -> tuple[int, ...]:
    """Of two or four."""
    return tuple(padding) if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def positive_pair(op: str, name: str, value: IntOrPair) -> tuple[int, int]:
    pair = to_pair(op, name, value)
    if min(pair) < 1:
        raise ValueError(f"{op}: {name} must be positive, but got {value!r}")
    return pair


def positive_int(op: str, name: str, value: object) -> int:
    integer = _integer(value)
    if integer is None or integer < 1:
        raise ValueError(f"{op}: {name} must be a positive int, but got {value!r}")
    return to_pair(op, name, integer)[0]


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def positive(op: str, name: str, value: object) -> float:
    if not _is_real(value) or not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be a positive number, but got {value!r}")
    return float(value)


def check_probability(op: str, name: str, value: object) -> None:
    if not _is_real(value) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a number between 0 and 1, but got {value!r}")


def check_number(op: str, name: str, value: object) -> None:
    """What the ops take for a float: numpy's and a compiler's numbers too."""
    if type(value) is not float and not hasattr(type(value), "__float__"):
        raise TypeError(f"{op}: {name} must be a number, but got {value!r}")


def check_kind(op: str, name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{op}: {name} must be {wanted}, but got {type(value).__name__}")


def check_tensor(op: str, name: str, value: object, optional: bool = False) -> None:
    if not optional or value is not None:
        check_kind(op, name, value, Tensor, "a Tensor")


def check_one_of(op: str, name: str, value: object, names: Collection[str], error: type[Exception] = ValueError) -> None:
    if not isinstance(value, str) or value not in names:
        got = f"'{value}'" if isinstance(value, str) else repr(value)  # as C++ quotes it
        raise error(f"{op}: {name} must be one of {', '.join(names)}, but got {got}")


def check_activation(op: str, name: str, value: object) -> None:
    check_one_of(op, name, value, ACTIVATIONS, RuntimeError)


def shape_of(op: str, name: str, value: object) -> tuple[int, ...]:
    """A tensor's shape written out."""
    sizes = tuple(map(_integer, value)) if isinstance(value, Iterable) else (None,)
    if any(size is None or size < 0 for size in sizes):
        error = TypeError if None in sizes else ValueError
        raise error(f"{op}: {name} must be a Tensor or a shape, but got {value!r}")
    return sizes
