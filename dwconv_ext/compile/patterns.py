"""The pass: convolutions, BatchNorms and activations in Dynamo's graph become this package's fused operations.

In inference (the result wants no derivative):

    depthwise [- BN] [- act] - pointwise [- BN] [- act] [+ shortcut]     FoldedBlock
    pointwise [- BN] [- act] - such a block                              FoldedInvertedResidual
    convolution [- BN] [- act] [+ shortcut, where it is pointwise]       FoldedConv
    depthwise transposed convolution [- BN] [- act]                      FoldedConv
    either in one dimension [- BN] [- act]                               FoldedConv1d (conv1d.py)
    linear [- act]                                                       FoldedLinear
    LayerNorm, linear [- act] over an image's channels                   FoldedLayerNorm, FoldedImageLinear (channel_layers.py)
    mean over the pixels [- flatten], max pooling                        FoldedPool, FoldedMaxPool
    mean over the pixels - pointwise [- act] - pointwise - (hard)sigmoid FoldedSqueeze
    a channel shuffle of two tensors, and its halves                     FoldedInterleave, FoldedNarrow (shuffles.py)
    input * gate, where a pointwise convolution follows                  read so by FoldedConv
    on CUDA a depthwise convolution and the mean over its pixels         FoldedPooled

In training: a depthwise convolution becomes this package's function of its kind, and BatchNorm - act one operation where the base
is eager.

A pattern's inner values have no other user; its nodes lie in one grad and autocast mode, and nothing between the first and the
last may write a tensor; its weights are inputs of the graph (parameters, buffers), not results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..nn.folded_layers import (
    ConvSettings,
    Folded,
    FoldedBlock,
    FoldedConv,
    FoldedInvertedResidual,
    Frozen,
    folded,
)
from ..ops.activations import SLOPE
from ..ops.functional import DTYPES, as_weights_layout
from . import graph as g
from .aten import as_torch
from .channel_layers import ChannelLayers, fuse_linear
from .conv1d import fuse_conv1d
from .poolings import fuse_pooled, fuse_poolings
from .report import Report
from .sequences import Layers, as_function, merge
from .shuffles import fuse_shuffles
from .training import replace_in_training, training_norm

_TENSORS = ("running_mean", "running_var", "weight", "bias")


@dataclass
class Layer:
    """A convolution, and the BatchNorm and the activation that follow it alone."""

    conv: dict[str, Any]
    nodes: list[fx.Node]
    norm: dict[str, Any] | None = None
    activation: str = "identity"
    slope: float = SLOPE

    @property
    def tensors(self) -> list[Any]:
        norm = self.norm or {}
        return [self.conv["weight"], self.conv["bias"], *(norm.get(name) for name in _TENSORS)]

    @property
    def settings(self) -> ConvSettings:
        names = ("stride", "padding", "dilation", "groups", "output_padding")
        how = {name: self.conv[name] for name in names if name in self.conv}
        eps = 0.0 if self.norm is None else float(g.number_of(self.norm["eps"]))
        return ConvSettings(**how, activation=self.activation, slope=self.slope, eps=eps)

    @property
    def is_depthwise(self) -> bool:
        return self.settings.is_depthwise(g.tensor_of(self.conv["weight"]))

    @property
    def is_pointwise(self) -> bool:
        return self.settings.is_pointwise(g.tensor_of(self.conv["weight"]))

    @property
    def is_product(self) -> bool:
        """Pointwise, of any stride."""
        return self.settings.product_stride(g.tensor_of(self.conv["weight"])) is not None

    @property
    def starts_a_block(self) -> bool:
        one_each = self.conv["groups"] == g.tensor_of(self.conv["weight"]).shape[0]
        return self.is_depthwise and one_each and not self.settings.is_transposed


@dataclass
class Pass:
    """packed: whether fused layers may keep packed weights; not where the next backend takes them apart. frozen: once for all.
    sequences: whether fused layers that follow each other become one call."""

    module: fx.GraphModule
    packed: bool
    frozen: bool
    sequences: bool
    report: Report
    order: dict[fx.Node, int] = field(default_factory=dict)
    region: dict[fx.Node, int] = field(default_factory=dict)
    writes: list[int] = field(default_factory=list)
    used: set[fx.Node] = field(default_factory=set)
    pointwise: dict[fx.Node, Layer] = field(default_factory=dict)  # fused ones, without shortcut or gate
    in_last: dict[tuple[fx.Node, int], tuple[fx.Node, int]] = field(default_factory=dict)  # by node and region: see in_layout
    layers: Layers = field(default_factory=dict)  # all fused ones that may keep packed weights
    training: dict[fx.Node, Layer] = field(default_factory=dict)  # depthwise layers that want a derivative

    def run(self) -> None:
        graph, region = self.module.graph, 0
        as_torch(graph)
        for node in list(graph.nodes):
            same = g.unchanged(node)
            if same is not None:
                node.replace_all_uses_with(same)
            if same is not None or g.is_telemetry(node):
                graph.erase_node(node)
        for at, node in enumerate(graph.nodes):
            region += g.changes_mode(node)
            self.order[node], self.region[node] = at, region
            if g.may_write(node):
                self.writes.append(at)
        nodes = list(graph.nodes)
        for node in nodes:
            if node not in self.used:
                fuse_pooled(self, node)
            if self.packed and node not in self.used:
                fuse_poolings(self, node)
        for node in nodes:
            if node not in self.used and fuse_conv1d(self, node):
                continue
            if node not in self.used and g.convolution(node) is not None:
                self.convolution(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self.report.refuse(node, "a subgraph (checkpoint, condition) is left unchanged")
        if self.packed:
            ChannelLayers(self).fuse()
        for node in nodes:
            if node not in self.used and self.packed:
                fuse_linear(self, node)
                training_norm(self, node)
        if self.packed:
            self.report.fused["channel shuffles"] += fuse_shuffles(graph, self.layers, self.insert, self.swap, self.undisturbed)
        if self.sequences:
            merge(graph, self.layers)
        graph.lint()
        self.module.recompile()
        self.report.fused = +self.report.fused  # without what became part of something else

    # --- what follows what -------------------------------------------------------------------------------------------

    def next(self, node: fx.Node) -> fx.Node | None:
        """The only user, in the same mode."""
        return None if self.why_nothing_follows(node) else next(iter(node.users))

    def why_nothing_follows(self, node: fx.Node) -> str:
        users = list(node.users)
        if len(users) != 1:
            return f"its result has {len(users)} users"
        if users[0].op == "output":
            return "its result leaves the graph"
        if self.region[users[0]] != self.region[node]:
            return "a grad or autocast mode, or a subgraph, begins or ends before its result is used"
        return ""

    def undisturbed(self, nodes: list[fx.Node]) -> bool:
        """Nothing that may write lies between, but the nodes themselves."""
        own = {self.order[node] for node in nodes}
        first, last = min(own), max(own)
        return not any(first < at < last and at not in own for at in self.writes)

    def layer(self, node: fx.Node) -> Layer | None:
        """What starts at this node, if it is a 2-D convolution of a batch."""
        conv = g.convolution(node)
        if conv is None:
            return None
        input, output = g.tensor_of(conv["input"]), g.tensor_of(node)
        if input is None or output is None or input.dim() != 4 or output.dtype not in DTYPES:
            return None
        if g.tensor_of(conv["weight"]) is None or not all(map(g.is_plain, (conv["input"], conv["weight"], conv["bias"]))):
            return None
        return self.followed(conv, [node])

    def followed(self, conv: dict[str, Any], nodes: list[fx.Node]) -> Layer:
        """The convolution, of these nodes, with the BatchNorm and the activation after it."""
        layer, node = Layer(conv, list(nodes)), nodes[-1]
        after = self.next(node)
        norm = None if after is None else g.batch_norm(after)
        if norm is not None and norm["input"] is node and norm["training"] is False and norm["running_mean"] is not None:
            layer.norm = norm
            layer.nodes.append(after)
        self.activate(layer)
        return layer

    def activated(self, arguments: dict[str, Any], node: fx.Node) -> Layer:
        """Of a linear layer or a BatchNorm."""
        layer = Layer(arguments, [node])
        self.activate(layer)
        return layer

    def activate(self, layer: Layer) -> None:
        node = self.next(layer.nodes[-1])
        while node is not None and node.args and node.args[0] is layer.nodes[-1]:
            found = g.activation(node)
            if found is None or (found[0] != "identity" and layer.activation != "identity"):
                return
            layer.nodes.append(node)
            if found[0] != "identity":
                layer.activation, layer.slope = found
            node = self.next(node)

    def with_shortcut(self, nodes: list[fx.Node]) -> tuple[list[fx.Node], fx.Node | None]:
        """The nodes with the sum that follows, and its other operand, of the same shape and dtype, where there is one."""
        last = nodes[-1]
        node = self.next(last)
        operands = None if node is None else g.addition(node)
        if operands is None or operands[0] is operands[1] or not self.undisturbed([*nodes, node]):
            return nodes, None
        if g.adds_in_place(node) and operands[0] is not last:  # written into the shortcut, which others may see
            return nodes, None
        other = operands[1] if operands[0] is last else operands[0]
        a, b, c = (g.tensor_of(n) for n in (last, other, node))
        if a.shape != b.shape or not a.dtype == b.dtype == c.dtype or a.device != b.device or a.stride() != c.stride():
            return nodes, None
        return [*nodes, node], other

    # --- inference ---------------------------------------------------------------------------------------------------

    def convolution(self, node: fx.Node) -> None:
        layer = self.layer(node)
        if layer is None:
            return
        if g.tensor_of(layer.nodes[-1]).requires_grad or g.tensor_of(node).requires_grad:
            if layer.is_depthwise:
                self.report.refuse(node, "a gradient is required: only the convolution itself is replaced (torch.no_grad()?)")
                replace_in_training(self, layer, [node])
            return
        why = self.why_not_folded(layer)
        if why:
            if layer.is_depthwise or layer.is_product or layer.norm is not None:
                self.report.refuse(node, why)
            if layer.is_depthwise:
                replace_in_training(self, layer, [node])
            return
        if layer.starts_a_block:
            why = self.block(layer)
            if not why:
                return
            self.report.refuse(node, why)
        elif layer.norm is None and layer.activation == "identity" and not (layer.is_product or layer.is_depthwise):
            return  # torch's own, as it is
        self.single(layer)

    def why_not_folded(self, layer: Layer) -> str:
        if any(isinstance(t, fx.Node) and t.op not in ("placeholder", "get_attr") for t in layer.tensors):
            return "its weights are computed"
        dtypes = {g.tensor_of(n).dtype for n in layer.nodes}
        if len(dtypes) != 1:
            return "its dtype changes on the way"
        if not self.undisturbed(layer.nodes):
            return "something may be written in between"
        if layer.settings.is_transposed and g.tensor_of(layer.conv["weight"]).shape[1] > 1:
            return "its channels have several filters each: only the convolution itself is replaced"
        return ""

    def block(self, first: Layer) -> str:
        """The block that starts with this depthwise layer, fused; else why not."""
        last = first.nodes[-1]
        node = self.next(last)
        if node is None:
            return self.why_nothing_follows(last)
        second = self.layer(node)
        if second is None or second.conv["input"] is not last:
            return f"{getattr(node.target, '__name__', node.target)} follows, not a pointwise convolution"
        if not second.is_pointwise:
            return "the convolution that follows is not pointwise"
        nodes = [*first.nodes, *second.nodes]
        output = g.tensor_of(second.nodes[-1])
        why = self.why_not_folded(second)
        if not why and output.requires_grad:
            why = "a gradient of its pointwise convolution is required"
        if not why and (output.dtype != g.tensor_of(last).dtype or not self.undisturbed(nodes)):
            why = "something may be written in between, or the dtype changes"
        if why:
            return why
        nodes, residual = self.with_shortcut(nodes)
        input, settings, tensors = first.conv["input"], [first.settings, second.settings], [*first.tensors, *second.tensors]
        kind: type[Folded] = FoldedBlock
        if self.is_expansion(input, nodes, first.conv["weight"]):
            layer = self.pointwise[input]
            kind, settings, tensors = FoldedInvertedResidual, [layer.settings, *settings], [*layer.tensors, *tensors]
            nodes, input = [input, *nodes], input.args[0]
            self.report.fused["pointwise convolutions"] -= 1
            self.report.fused["expansions"] += 1
        self.replace(nodes, input, residual, folded(kind, *settings), tensors)
        self.report.fused["blocks"] += 1
        return ""

    def is_expansion(self, node: fx.Node, nodes: list[fx.Node], weight: fx.Node) -> bool:
        """Whether the node is a fused pointwise convolution that this block alone reads, as it is."""
        if node not in self.pointwise or self.next(node) is not nodes[0] or not self.undisturbed([node, *nodes]):
            return False
        value = g.tensor_of(node)
        return value.dtype == g.tensor_of(nodes[-1]).dtype and as_weights_layout(value, g.tensor_of(weight)) is value

    def single(self, layer: Layer) -> None:
        nodes, residual = self.with_shortcut(layer.nodes) if layer.is_product else (layer.nodes, None)
        input, gate = self.gated(layer) if layer.is_product and self.packed else (layer.conv["input"], None)
        if gate is not None:
            nodes = [layer.conv["input"], *nodes]
        fused = self.replace(nodes, input, residual, folded(FoldedConv, layer.settings), layer.tensors, gate)
        if layer.is_pointwise and residual is None and gate is None and self.packed:
            self.pointwise[fused] = layer
        kind = "depthwise" if layer.is_depthwise else "pointwise" if layer.is_product else "other"
        self.report.fused[f"{kind} convolutions"] += 1

    def gated(self, layer: Layer) -> tuple[fx.Node, fx.Node | None]:
        """The input of a pointwise layer, and what it is multiplied by, where that is all that is done with the product."""
        node = layer.conv["input"]
        found = g.product(node)
        if found is None or self.next(node) is not layer.nodes[0] or not self.undisturbed([node, *layer.nodes]):
            return node, None
        plain = all(map(g.is_plain, found)) and g.tensor_of(node).dtype is g.tensor_of(layer.nodes[0]).dtype
        return found if plain else (node, None)

    def replace(
        self, nodes: list[fx.Node], input: fx.Node, residual: fx.Node | None, layer: Folded, tensors: list[Any],
        gate: fx.Node | None = None,
    ) -> fx.Node:  # fmt: skip
        with self.module.graph.inserting_before(nodes[-1]):
            input = self.prepared(input, layer, tensors, nodes[-1])
            fused = self.insert(layer, input, residual, tensors, gate)
        self.swap(nodes, fused)
        return fused

    def prepared(self, input: fx.Node, layer: Folded, tensors: list[Any], last: fx.Node) -> fx.Node:
        """A layer's input in the dtype and the layout that its last node has."""
        if g.tensor_of(input).dtype != g.tensor_of(last).dtype:  # as autocast does
            input = self.cast(input, g.tensor_of(last).dtype)
        if isinstance(layer, FoldedConv) and layer.settings.has_few_channels(g.tensor_of(tensors[0])):
            return input  # patches are read in any
        return self.in_layout(input, tensors[0], last)

    def insert(
        self, layer: Folded, input: fx.Node, residual: fx.Node | None, tensors: list[Any], gate: fx.Node | None = None
    ) -> fx.Node:
        """A call of the layer."""
        run = Frozen(layer) if self.packed and self.frozen else layer
        function = as_function(run if self.packed else layer.functional)
        node = self.module.graph.call_function(function, (input, residual, *tensors), {} if gate is None else {"gate": gate})
        if self.packed:
            self.layers[node] = run
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        cast = self.module.graph.call_method("to", (node, dtype))
        return self.placed(cast, g.tensor_of(node).to(dtype), node)

    def placed(self, new: fx.Node, value: Tensor, like: fx.Node) -> fx.Node:
        """A node that was put in, with what Dynamo would know of it, and the place of another."""
        new.meta["example_value"] = value
        self.order[new], self.region[new] = self.order[like], self.region[like]
        return new

    def in_layout(self, node: fx.Node, weight: fx.Node, before: fx.Node) -> fx.Node:
        """The input as nn.Conv2d's output will be laid out, for what stands before that node; once while nothing is written."""
        value, at = g.tensor_of(node), self.order[before]
        if as_weights_layout(value, g.tensor_of(weight)) is value:
            return node
        known, since = self.in_last.get((node, self.region[before]), (None, at))
        if known is None or since > at or any(since < write < at for write in self.writes):
            known = self.module.graph.call_function(as_weights_layout, (node, weight))
            self.placed(known, as_weights_layout(value, g.tensor_of(weight)), node)
            self.in_last[node, self.region[before]] = known, at
        return known

    def swap(self, nodes: list[fx.Node], new: fx.Node) -> None:
        """The new node in the place of these, the last of which has its value."""
        last = nodes[-1]
        new.meta.update({key: last.meta[key] for key in ("example_value", "stack_trace", "nn_module_stack") if key in last.meta})
        self.order[new], self.region[new] = self.order[last], self.region[last]
        last.replace_all_uses_with(new)
        for node in sorted(nodes, key=self.order.__getitem__, reverse=True):
            self.used.add(node)
            self.module.graph.erase_node(node)


def fuse(module: fx.GraphModule, packed: bool, frozen: bool, sequences: bool, report: Report) -> Layers:
    """Puts the fused operations into the graph; packed, frozen, sequences: see ``Pass``. Those that may keep packed weights."""
    whole = Pass(module, packed, frozen, sequences, report)
    whole.run()
    return whole.layers
