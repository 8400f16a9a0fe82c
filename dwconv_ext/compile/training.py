"""In training: depthwise convolutions on this package's kernels, and BatchNorm - act as one operation; on CUDA all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..nn import batch_norm_act
from ..nn.batch_norm_act import train_depthwise_norm
from ..ops.batch_norm import train_batch_norm_act
from ..ops.conv1d import depthwise_conv1d
from ..ops.conv_transpose import depthwise_conv_transpose1d, depthwise_conv_transpose2d
from ..ops.functional import depthwise_conv2d
from . import graph as g

if TYPE_CHECKING:
    from .patterns import Layer, Pass

_FUNCTIONS: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (3, False): depthwise_conv1d,
    (3, True): depthwise_conv_transpose1d,
    (4, False): depthwise_conv2d,
    (4, True): depthwise_conv_transpose2d,
}
NORM = ("running_mean", "running_var", "weight", "bias", "momentum", "eps")


def replace_in_training(whole: Pass, layer: Layer, nodes: list[fx.Node]) -> None:
    """The depthwise convolution alone, which these nodes are, differentiable."""
    conv, node = layer.conv, nodes[-1]
    with whole.module.graph.inserting_before(node):
        operands = []
        for name in ("input", "weight", "bias"):
            operand = conv[name]
            if operand is not None and g.tensor_of(operand).dtype != g.tensor_of(node).dtype:
                operand = whole.cast(operand, g.tensor_of(node).dtype)
            operands.append(operand)
        operands[0] = whole.in_layout(operands[0], conv["weight"], node)
        transposed = layer.settings.is_transposed
        names = ("stride", "padding", *(["output_padding"] if transposed else []), "dilation")
        function = _FUNCTIONS[g.tensor_of(node).dim(), transposed]
        new = whole.module.graph.call_function(function, (*operands, *(conv[name] for name in names)))
    whole.swap(nodes, new)
    if function is depthwise_conv2d:
        whole.training[new] = layer
    whole.report.fused["depthwise convolutions"] += 1


def training_norm(whole: Pass, node: fx.Node) -> None:
    """A BatchNorm in training mode, and the activation after it."""
    norm = g.batch_norm(node)
    if norm is None or norm["training"] is not True:
        return
    conv = norm["input"]
    input = g.tensor_of(conv)
    if input is None or input.dim() != 4 or input.device.type not in ("cpu", "cuda"):
        return
    layer = whole.activated({}, node)
    if not whole.undisturbed(layer.nodes):
        layer = replace(layer, nodes=[node], activation="identity")
    nodes, function, operands = layer.nodes, train_batch_norm_act, (conv,)
    if _is_joined(whole, conv, layer):
        nodes, function = [conv, *nodes], train_depthwise_norm
        operands = (*conv.args[:2], *conv.args[3:])
    with whole.module.graph.inserting_before(node):  # what reads the running statistics after it still does
        arguments = (*operands, *(norm[name] for name in NORM), layer.activation, layer.slope)
        new = whole.module.graph.call_function(function, arguments)
    whole.swap(nodes, new)
    whole.report.fused["training BatchNorms"] += 1


def _is_joined(whole: Pass, conv: fx.Node, norm: Layer) -> bool:
    """Whether BatchNorm's convolution is one whose gradients its kernel takes in."""
    layer = whole.training.get(conv)
    if layer is None or not layer.starts_a_block or conv.args[2] is not None or whole.next(conv) is not norm.nodes[0]:
        return False
    if g.tensor_of(conv).device.type not in batch_norm_act.DEVICES or not whole.undisturbed(norm.nodes):
        return False
    first, last = whole.order[conv], whole.order[norm.nodes[0]]
    between = [n for n in whole.module.graph.nodes if first < whole.order.get(n, -1) < last]
    return not any(g.may_write(n) and not _counts_batches(n) for n in between)


def _counts_batches(node: fx.Node) -> bool:
    """Whether the node is BatchNorm's counter of its calls, which a module moves between the convolution and BatchNorm."""
    target = node.args[0] if node.args else None
    value = g.tensor_of(target) if isinstance(target, fx.Node) and target.op in ("placeholder", "get_attr") else None
    return value is not None and value.dtype is torch.int64 and value.dim() == 0
