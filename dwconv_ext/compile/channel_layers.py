"""LayerNorm and linear layers over the channels of an image, which models write on its pixels (ConvNeXt, arXiv:2201.03545):

    permute(0, 2, 3, 1) - layer_norm - linear [- act] - linear - permute(0, 3, 1, 2) [* scale] [+ shortcut]

Each becomes a layer of the image as it was (FoldedLayerNorm, FoldedImageLinear), in channels_last as torch's result is, and the
permutation back becomes that image. What else reads the pixels gets them by a permutation of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format

from ..nn.folded_layers import ConvSettings, Folded, folded
from ..nn.folded_linear import FoldedImageLinear, FoldedLayerNorm, FoldedLinear
from ..ops.functional import DTYPES
from . import graph as g

if TYPE_CHECKING:
    from .patterns import Pass

_TO_PIXELS, _TO_IMAGE = (0, 2, 3, 1), (0, 3, 1, 2)


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Of four dimensions."""
    if not g.calls(node, "permute") or g.tensor_of(node) is None or g.tensor_of(node).dim() != 4 or node.kwargs:
        return None
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    return tuple(d % 4 for d in dims) if all(type(d) is int for d in dims) else None


def _vector(node: Any, image: torch.Tensor) -> fx.Node | None:
    """The weight that this factor of an image is, one value a channel, where it is one in some shape."""
    value, channels = g.tensor_of(node), image.shape[1]
    if value is None or value.dtype is not image.dtype or tuple(value.shape) not in ((channels, 1, 1), (1, channels, 1, 1)):
        return None
    while g.calls(node, "reshape") or g.calls(node, "view"):
        node = node.args[0]
    own = isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr") and g.is_plain(node)
    vector = own and g.tensor_of(node).numel() == channels and g.tensor_of(node).dtype is image.dtype
    return node if vector else None


def _stays(node: fx.Node) -> bool:
    """Whether nothing is done to the tensor in place: what transposes it in place leaves its other views as they are."""
    return not any(g.may_write(user) and user.args and user.args[0] is node for user in node.users)


def _packs(weight: torch.Tensor) -> bool:
    """A linear layer's."""
    return weight.dim() == 2 and weight.is_contiguous()


class ChannelLayers:
    """whole: the pass that the graph is in."""

    def __init__(self, whole: Pass) -> None:
        self.whole, self.graph = whole, whole.module.graph
        self.images: dict[fx.Node, fx.Node] = {}  # by the node of its pixels
        self.own: set[fx.Node] = set()  # pixels of images made here, which nothing else has
        self.linears: dict[fx.Node, tuple[ConvSettings, list[Any]]] = {}  # layers made here, by their images

    def fuse(self) -> None:
        for node in list(self.graph.nodes):
            if node in self.whole.used:
                continue
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            permutation = _permutation(node)
            if permutation == _TO_PIXELS and g.is_plain(source) and _stays(source) and _stays(node):
                self.images[node] = source
            elif permutation == _TO_IMAGE and source in self.own and _stays(source):
                self.back(node)
            elif source in self.images and _stays(source):
                self.layer_norm(node) or self.linear(node)
        for pixels in reversed(list(self.images)):
            if not pixels.users:
                self.graph.erase_node(pixels)

    def layer_norm(self, node: fx.Node) -> bool:
        how = g.layer_norm(node)
        if how is None:
            return False
        tensors, input = [how["weight"], how["bias"]], g.tensor_of(how["input"])
        if how["weight"] is None or len(how["normalized_shape"]) != 1 or not self.computes(node, tensors):
            return False
        eps = float(g.number_of(how["eps"]))
        if g.tensor_of(node).dtype is not input.dtype or input.numel() == 0 or not eps >= 0:
            return False
        self.replace([node], self.images[node.args[0]], folded(FoldedLayerNorm, eps), tensors)
        self.whole.report.fused["LayerNorms of images"] += 1
        return True

    def linear(self, node: fx.Node) -> bool:
        arguments, source = g.linear(node), self.images[node.args[0]]
        if arguments is None or suggest_memory_format(g.tensor_of(source)) is not torch.channels_last:
            return False
        found = self.whole.activated(arguments, node)
        tensors = [arguments["weight"], arguments["bias"]]
        weight, bias = map(g.tensor_of, tensors)
        if weight is None or not _packs(weight) or (bias is not None and bias.shape != weight.shape[:1]):
            return False
        if not self.computes(found.nodes[-1], tensors) or self.whole.why_not_folded(found):
            return False
        tensors.append(None)
        image = self.replace(found.nodes, source, folded(FoldedImageLinear, found.settings), tensors)
        if found.activation == "identity":
            self.linears[image] = found.settings, tensors
        self.whole.report.fused["linear layers of images"] += 1
        return True

    def computes(self, node: fx.Node, tensors: list[Any]) -> bool:
        """Whether node is a result without a gradient of such weights."""
        value, weights = g.tensor_of(node), [t for t in tensors if t is not None]
        if value is None or value.requires_grad or value.device.type != "cpu" or value.dtype not in DTYPES:
            return False
        own = all(isinstance(t, fx.Node) and t.op in ("placeholder", "get_attr") and g.is_plain(t) for t in weights)
        return own and len({g.tensor_of(t).dtype for t in weights}) == 1

    def replace(self, nodes: list[fx.Node], source: fx.Node, layer: Folded, tensors: list[Any]) -> fx.Node:
        """The layer's image; its pixels are in the place of the last node."""
        last, value = nodes[-1], g.tensor_of(nodes[-1])
        with self.graph.inserting_before(last):
            if g.tensor_of(source).dtype != value.dtype:  # as autocast does
                source = self.whole.cast(source, value.dtype)
            image = self.whole.insert(layer, source, None, tensors)
            self.whole.placed(image, value.permute(_TO_IMAGE), last)
            pixels = self.graph.call_method("permute", (image, _TO_PIXELS))
        self.whole.swap(nodes, pixels)
        self.images[pixels] = image
        self.own.add(pixels)
        return image

    def back(self, node: fx.Node) -> None:
        """The first permutation back is the image (two are two tensors); what follows a linear layer becomes part of it."""
        pixels = node.args[0]
        image = self.images[pixels]
        self.own.remove(pixels)
        node.replace_all_uses_with(image)
        self.graph.erase_node(node)
        if not pixels.users:
            del self.images[pixels]
            self.graph.erase_node(pixels)
        if image not in self.linears:
            return
        settings, tensors = self.linears.pop(image)
        nodes, scale, factor = [image], None, None
        after = self.whole.next(image)
        factors = None if after is None else g.factors(after)
        if factors is not None and self.whole.undisturbed([image, after]):
            factor = factors[1] if factors[0] is image else factors[0]
            scale = _vector(factor, g.tensor_of(image))
            if scale is not None:
                nodes.append(after)
        nodes, residual = self.whole.with_shortcut(nodes)
        if len(nodes) > 1:
            with self.graph.inserting_before(nodes[-1]):
                whole = self.whole.insert(folded(FoldedImageLinear, settings), image.args[0], residual, [*tensors[:2], scale])
            self.whole.layers.pop(image, None)
            self.whole.swap(nodes, whole)
        while scale is not None and factor is not scale and not factor.users:
            factor, view = factor.args[0], factor
            self.graph.erase_node(view)


def fuse_linear(whole: Pass, node: fx.Node) -> None:
    arguments = g.linear(node)
    if arguments is None or g.tensor_of(node).requires_grad or g.tensor_of(node).device.type != "cpu":
        return
    layer = whole.activated(arguments, node)
    tensors = [arguments["weight"], arguments["bias"]]
    weight, bias = map(g.tensor_of, tensors)
    if not all(map(g.is_plain, (arguments["input"], *tensors))) or (bias is not None and bias.dtype != weight.dtype):
        return
    if _packs(weight) and not whole.why_not_folded(layer):
        whole.replace(layer.nodes, arguments["input"], None, folded(FoldedLinear, layer.settings), tensors)
        whole.report.fused["linear layers"] += 1
