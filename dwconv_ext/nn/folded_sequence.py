"""Folded layers that follow each other in a graph, as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .folded_layers import Folded, Frozen, Kept, wants_derivative
from .folded_weights import Tensors
from .steps import Place, Program, Step


class Link(NamedTuple):
    """A layer, where it finds its operands, and which of the sequence's tensors are its own."""

    layer: Folded | Frozen
    place: Place
    first: int
    count: int

    def of(self, tensors: Tensors) -> Tensors:
        return tensors[self.first : self.first + self.count]


class FoldedSequence(Folded):
    """Layers whose operands are inputs of the sequence and one another's results; all of one dtype, on the CPU.

    inputs: how many there are; outputs: the values to return, inputs counted first.
    """

    def __init__(self, links: Sequence[Link], inputs: int, outputs: Sequence[int]) -> None:
        self.links, self.inputs, self.outputs = tuple(links), inputs, tuple(outputs)

    def __call__(self, inputs: Sequence[Tensor], tensors: Tensors, *, kept: Kept | None = None) -> Any:
        """The output, or a list of them."""
        run = None
        if not wants_derivative(inputs[0], None, (*inputs, *tensors)) and self.fits(inputs):
            run = (kept or self.kept)(tensors, inputs[0].dtype)
        return self.results(run(inputs) if run else self.one_by_one(inputs, tensors))

    def results(self, values: list[Tensor]) -> Any:
        return values[0] if len(self.outputs) == 1 else values

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        dtype = inputs[0].dtype
        return all(type(x) is Tensor and x.is_cpu and x.dtype is dtype and x.numel() > 0 for x in inputs)

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Program | None:
        steps = [link.layer.kept(link.of(tensors), dtype) for link in self.links]
        if not all(isinstance(step, Step) for step in steps):
            return None
        return Program(steps, [link.place for link in self.links], self.inputs, self.outputs)

    def one_by_one(self, inputs: Sequence[Tensor], tensors: Tensors) -> list[Tensor]:
        values = list(inputs)
        for link in self.links:
            input, residual, gate = (values[at] if at >= 0 else None for at in link.place)
            values.append(link.layer(input, link.of(tensors), residual, gate))
        return [values[at] for at in self.outputs]
