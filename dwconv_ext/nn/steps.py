"""What a folded layer becomes: an op with its arguments; and several of them as one call, ``run_steps``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.functional import allows_tf32

ops = torch.ops.dwconv_ext


class Step:
    """An op and its arguments after the input.

    more: how many of a residual and a gate it takes after these. Those that have kernels for CUDA take allow_tf32 too.
    """

    __slots__ = ("arguments", "more", "op")

    def __init__(self, op: torch._ops.OpOverload, *arguments: Any, more: int = 0) -> None:
        self.op, self.arguments, self.more = op, arguments, more

    def __call__(self, input: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        if input.is_cuda:
            return self.op(input, *self.arguments, *(residual, gate)[: self.more], allow_tf32=allows_tf32(input))
        return self.op(input, *self.arguments, *(residual, gate)[: self.more])


class Place(NamedTuple):
    """Where a step finds its operands: the number of a value, inputs first and then the steps' results; -1 for none."""

    input: int
    residual: int = -1
    gate: int = -1


class Program:
    """Steps as csrc/cpu/ops/steps.cpp reads them: each its op's name, its place, whether its result leaves, its arguments in the
    schema's order, and the values that nothing after it uses."""

    def __init__(self, steps: Sequence[Step], places: Sequence[Place], inputs: int, outputs: Sequence[int]) -> None:
        self.weights: list[Tensor] = []
        self.words: list[str] = []
        self.outputs = list(outputs)
        integers: list[int] = []
        numbers: list[float] = []

        def write(value: Any) -> None:
            if isinstance(value, (list, tuple)):
                for each in value:
                    write(each)
            elif isinstance(value, Tensor):
                integers.append(len(self.weights))
                self.weights.append(value)
            elif isinstance(value, str):
                if value not in self.words:
                    self.words.append(value)
                integers.append(self.words.index(value))
            elif isinstance(value, float):
                numbers.append(value)
            else:
                integers.append(-1 if value is None else int(value))

        leaving = set(outputs)
        for at in reversed(range(len(steps))):
            if steps[at].op is torch.ops.aten.narrow.default and inputs + at in leaving:  # a view
                leaving.add(places[at].input)
        last = {value: at for at, place in enumerate(places) for value in place if value >= 0}
        for at, (step, place) in enumerate(zip(steps, places, strict=True)):
            done = [value for value, use in last.items() if use == at and value not in outputs]
            name, leaves = step.op._schema.name.split("::")[1], inputs + at in leaving
            write((name, place, leaves, step.arguments, len(done), done))
        self.steps = torch.tensor(integers, dtype=torch.int64)
        self.numbers = torch.tensor(numbers, dtype=torch.float64)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return ops.run_steps.default(inputs, self.weights, self.steps, self.numbers, self.words, self.outputs)
