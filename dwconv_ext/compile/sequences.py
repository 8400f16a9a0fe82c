"""Fused layers with nothing else between them become one call, which runs them without Python in between."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from ..nn.folded_layers import Folded, Frozen, folded
from ..nn.folded_sequence import FoldedSequence, Link
from ..nn.steps import Place
from ..ops.functional import DTYPES
from . import graph as g

Layers = dict[fx.Node, Folded | Frozen]


def as_function(run: Folded | Frozen) -> Callable[..., Any]:
    """A fused layer as a function of the graph: (input, shortcut or None, *tensors)."""

    def fused(input: Tensor, residual: Tensor | None, *tensors: Tensor | None, **gate: Tensor) -> Tensor:
        return run(input, tensors, residual, **gate)

    return _named(fused, run)


def _named(function: Callable[..., Any], run: Folded | Frozen) -> Callable[..., Any]:
    kind = type(run.layer if isinstance(run, Frozen) else run)
    function.__name__ = function.__qualname__ = f"dwconv_ext_{kind.__name__}"
    return function


def _operands(node: fx.Node) -> tuple[Any, ...]:
    return node.args[0], node.args[1], node.kwargs.get("gate")


def _is_step(node: fx.Node, layers: Layers) -> bool:
    run, value = layers.get(node), g.tensor_of(node)
    if run is None or value is None or value.device.type != "cpu" or value.dtype not in DTYPES:
        return False
    operands = [g.tensor_of(n) for n in _operands(node) if n is not None]
    if any(t is None or t.dtype is not value.dtype for t in operands):
        return False
    layer = run.layer if isinstance(run, Frozen) else run
    return layer.is_step(operands[0], tuple(map(g.tensor_of, node.args[2:])))


def _runs(graph: fx.Graph, layers: Layers) -> Iterator[list[fx.Node]]:
    """Steps of one dtype with nothing that is computed between them; two at least."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        step = _is_step(node, layers)
        if run and not (step and g.tensor_of(node).dtype is g.tensor_of(run[0]).dtype):
            yield run
            run = []
        if step:
            run.append(node)
    yield run


def _merge(graph: fx.Graph, run: list[fx.Node], layers: Layers) -> None:
    inputs = list(dict.fromkeys(n for node in run for n in _operands(node) if n is not None and n not in run))
    values = {node: at for at, node in enumerate([*inputs, *run])} | {None: -1}
    links: list[Link] = []
    tensors: list[Any] = []
    for node in run:
        own = node.args[2:]
        links.append(Link(layers[node], Place(*(values[n] for n in _operands(node))), len(tensors), len(own)))
        tensors += own
    outputs = [node for node in run if any(user not in run for user in node.users)]
    settings = (tuple(links), len(inputs), tuple(values[node] for node in outputs))
    sequence = Frozen(FoldedSequence(*settings)) if isinstance(links[0].layer, Frozen) else folded(FoldedSequence, *settings)

    def fused(inputs: list[Tensor], *tensors: Tensor | None) -> Any:
        return sequence(inputs, tensors)

    with graph.inserting_before(run[-1]):
        result = graph.call_function(_named(fused, sequence), (inputs, *tensors))
        for at, node in enumerate(outputs):
            new = result if len(outputs) == 1 else graph.call_function(operator.getitem, (result, at))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in run)
    for node in reversed(run):
        graph.erase_node(node)
        del layers[node]
    layers[result] = sequence


def merge(graph: fx.Graph, layers: Layers) -> None:
    """layers: the fused ones, by their nodes, whose functions are ``as_function``'s."""
    for run in list(_runs(graph, layers)):
        if len(run) > 1 and any(len(node.args) > 2 for node in run):
            _merge(graph, run, layers)
