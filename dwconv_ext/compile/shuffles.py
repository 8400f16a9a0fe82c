"""ShuffleNet's units (Ma et al., arXiv:1807.11164): the channel shuffle of two tensors, and the halves that are taken of it.

    cat((a, b), 1).view(N, 2, C, H, W).transpose(1, 2).contiguous().view(N, 2C, H, W)     FoldedInterleave
    a chunk of that, where fused layers alone read it                                     FoldedNarrow

torch's shuffle leaves NCHW whatever it was given, and in a channels_last model the convolutions after it transpose that back.
Ours keeps the layout. That may be seen by nothing but such convolutions and the next shuffle; else torch's stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import suggest_memory_format

from ..nn.fixed_layers import FoldedInterleave, FoldedNarrow, FoldedPool
from ..nn.folded_layers import Folded, folded
from ..ops.functional import DTYPES, as_weights_layout
from . import graph as g


def _shuffle(last: fx.Node) -> list[fx.Node] | None:
    """The nodes of the shuffle that ends here, the concatenation first."""
    nodes = [last]
    for name in ("contiguous", "transpose", "view", "cat"):
        before = nodes[0].args[0] if nodes[0].args else None
        if not g.calls(before, name) or len(before.users) != 1:
            return None
        nodes.insert(0, before)
    cat, _, swapped, contiguous, _ = nodes
    dim = {**dict(enumerate(cat.args)), **cat.kwargs}
    values = [g.tensor_of(node) for node in nodes]
    if contiguous.kwargs or len(contiguous.args) > 1 or dim.get(1, dim.get("dim", 0)) != 1 or any(t is None for t in values):
        return None
    if not isinstance(cat.args[0], (tuple, list)) or len(cat.args[0]) != 2 or swapped.args[1:] not in ((1, 2), (2, 1)):
        return None
    a, b = map(g.tensor_of, cat.args[0])
    if a is None or b is None or a.dim() != 4 or a.shape != b.shape or a.dtype is not b.dtype or a.dtype not in DTYPES:
        return None
    n, c, h, w = a.shape
    shapes = [tuple(t.shape) for t in values]
    right = shapes == [(n, 2 * c, h, w), (n, 2, c, h, w), (n, c, 2, h, w), (n, c, 2, h, w), (n, 2 * c, h, w)]
    return nodes if right else None


def _halves(node: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """What is taken of a chunk along the channels: node, first channel, how many; None where the node is none."""
    arguments = {**dict(enumerate(node.args)), **node.kwargs}
    parts = g.value_of(node)
    if not g.calls(node, "chunk") or arguments.get(2, arguments.get("dim", 0)) != 1 or not isinstance(parts, (tuple, list)):
        return None
    found = []
    for user in node.users:
        if user.target is not operator.getitem or type(user.args[1]) is not int:
            return None
        start = sum(part.shape[1] for part in parts[: user.args[1]])
        found.append((user, start, parts[user.args[1]].shape[1]))
    return found


def fuse_shuffles(graph: fx.Graph, layers: dict[fx.Node, Any], insert: Callable, swap: Callable, undisturbed: Callable) -> int:
    """How many. insert, swap, undisturbed: the pass's."""
    found = {nodes[0]: nodes for node in graph.nodes if g.calls(node, "view") and (nodes := _shuffle(node)) is not None}

    def keeps_layout(user: fx.Node) -> bool:
        run = layers.get(user)
        return user.target is as_weights_layout or user in found or isinstance(getattr(run, "layer", run), FoldedPool)

    fused = 0
    for nodes in list(found.values()):
        a, b = nodes[0].args[0]
        last, values = nodes[-1], [g.tensor_of(a), g.tensor_of(b)]
        if any(t.requires_grad or t.device.type != "cpu" for t in values) or not all(map(g.is_plain, (a, b))):
            continue
        if not undisturbed(nodes):
            continue
        chunks = {user: halves for user in last.users if (halves := _halves(user)) is not None}
        readers = [(user, last) for user in last.users if user not in chunks]
        readers += [(user, half) for halves in chunks.values() for half, *_ in halves for user in half.users]
        changes = suggest_memory_format(values[0]) is torch.channels_last
        if changes and not all(keeps_layout(user) for user, _ in readers):
            continue
        with graph.inserting_before(last):
            new = insert(folded(FoldedInterleave), a, b, [])
        swap(nodes, new)
        fused += 1
        if changes:
            new.meta["example_value"] = g.tensor_of(new).contiguous(memory_format=torch.channels_last)
            for user, node in readers:
                if user.target is as_weights_layout:
                    user.replace_all_uses_with(new if node is last else node)
                    graph.erase_node(user)
        for chunk, halves in chunks.items():
            if all(user in layers or user in found for half, *_ in halves for user in half.users):
                _narrow(graph, new, chunk, halves, insert)
    return fused


def _narrow(graph: fx.Graph, whole: fx.Node, chunk: fx.Node, halves: list[tuple[fx.Node, int, int]], insert: Callable) -> None:
    for half, start, length in halves:
        with graph.inserting_before(half):
            layer: Folded = folded(FoldedNarrow, start, length)
            new = insert(layer, whole, None, [])
        value: Tensor = g.tensor_of(whole)
        new.meta["example_value"] = value[:, start : start + length]
        half.replace_all_uses_with(new)
        graph.erase_node(half)
    graph.erase_node(chunk)
