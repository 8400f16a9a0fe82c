"""What is taken of all pixels of an image: pooling, and squeeze-and-excitation's gate (Hu et al., arXiv:1709.01507)."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..nn.fixed_layers import FoldedMaxPool, FoldedPool
from ..nn.folded_layers import folded
from ..nn.folded_linear import FoldedSqueeze
from ..nn.folded_pooled import FoldedPooled
from ..ops.functional import DTYPES
from . import graph as g

if TYPE_CHECKING:
    from .patterns import Layer, Pass

POOLED = ("cuda",)  # devices on which a depthwise convolution leaves the mean over its pixels


def fuse_poolings(whole: Pass, node: fx.Node) -> None:
    """What begins at this node, if it is a mean over the pixels or a max pooling."""
    found = g.mean_of_pixels(node)
    if found is not None and not squeeze(whole, node, *found):
        pool(whole, node, *found)
    max_pool(whole, node)


def fuse_pooled(whole: Pass, node: fx.Node) -> None:
    """The mean over the pixels of a depthwise layer's output, taken with it: squeeze-and-excitation begins so."""
    input, keepdim = g.mean_of_pixels(node) or (None, True)
    value = g.tensor_of(node)
    layer = None if input is None or value.device.type not in POOLED else _depthwise_layer(whole, input)
    if layer is None or value.requires_grad or g.tensor_of(input).requires_grad or whole.why_not_folded(layer):
        return
    nodes = [*layer.nodes, node]
    same = len({whole.region[n] for n in nodes}) == 1 and value.dtype is g.tensor_of(input).dtype
    if not same or not whole.undisturbed(nodes):
        return
    graph, fused = whole.module.graph, folded(FoldedPooled, layer.settings)
    with graph.inserting_before(input):
        both = whole.insert(fused, whole.prepared(layer.conv["input"], fused, layer.tensors, input), None, layer.tensors)
        result, mean = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
        if not keepdim:
            mean = graph.call_function(torch.flatten, (mean, 1))
    for new in (both, mean.args[0] if not keepdim else mean):
        whole.order[new], whole.region[new] = whole.order[input], whole.region[input]
    whole.swap(layer.nodes, result)
    whole.swap([node], mean)
    whole.report.fused["depthwise convolutions"] += 1
    whole.report.fused["poolings"] += 1


def _depthwise_layer(whole: Pass, last: fx.Node) -> Layer | None:
    """The one whose output this node is."""
    first: object = last
    for _ in range(4):  # a convolution, BatchNorm, an activation, one that does nothing
        if not isinstance(first, fx.Node) or first in whole.used:
            return None
        if g.convolution(first) is not None:
            layer = whole.layer(first)
            return layer if layer is not None and layer.nodes[-1] is last and layer.is_depthwise else None
        first = first.args[0] if first.args else None
    return None


def pool(whole: Pass, node: fx.Node, input: fx.Node, keepdim: bool) -> None:
    """The mean over all pixels, and the flattening that follows."""
    nodes, after = [node], whole.next(node)
    if keepdim and after is not None and g.flattened(after) is node:
        nodes, keepdim = [node, after], False
    value = g.tensor_of(node)
    if value.requires_grad or value.device.type != "cpu" or value.dtype not in DTYPES or not g.is_plain(input):
        return
    if value.dtype is g.tensor_of(input).dtype and whole.undisturbed(nodes):
        with whole.module.graph.inserting_before(nodes[-1]):
            pooled = whole.insert(folded(FoldedPool, keepdim), input, None, [])
        whole.swap(nodes, pooled)
        whole.report.fused["poolings"] += 1


def max_pool(whole: Pass, node: fx.Node) -> None:
    input, window = g.max_pool(node) or (None, ())
    value = g.tensor_of(node)
    if input is None or value.requires_grad or not g.is_plain(input):
        return
    if value.device.type != "cpu" or value.dtype not in DTYPES:
        return
    with whole.module.graph.inserting_before(node):
        pooled = whole.insert(folded(FoldedMaxPool, *window), input, None, [])
    whole.swap([node], pooled)
    whole.report.fused["poolings"] += 1


def squeeze(whole: Pass, node: fx.Node, input: fx.Node, keepdim: bool) -> bool:
    """Squeeze-and-excitation's gate, from the mean on; whether it is one."""
    nodes, convs = [node], []
    for _ in range(2):
        after = whole.next(nodes[-1])
        layer = None if after is None else whole.layer(after)
        if layer is None or layer.conv["input"] is not nodes[-1] or layer.norm is not None or not layer.is_pointwise:
            return False
        convs.append(layer)
        nodes += layer.nodes
    last = whole.next(nodes[-1])
    kind = None if last is None else g.gate(last)
    if kind is None or convs[1].activation != "identity" or not g.is_plain(input):
        return False
    nodes.append(last)
    dtypes = {g.tensor_of(n).dtype for n in (input, *nodes)}
    if len(dtypes) > 1 or g.tensor_of(last).requires_grad or g.tensor_of(input).device.type != "cpu":
        return False
    if not whole.undisturbed(nodes) or any(map(whole.why_not_folded, convs)):
        return False
    tensors = [convs[0].conv["weight"], convs[0].conv["bias"], convs[1].conv["weight"], convs[1].conv["bias"]]
    with whole.module.graph.inserting_before(last):
        layer = folded(FoldedSqueeze, convs[0].settings._replace(stride=1, padding=0, dilation=1), kind)
        gate = whole.insert(layer, input, None, tensors)
    whole.swap(nodes, gate)
    whole.report.fused["squeeze-and-excitations"] += 1
    return True
