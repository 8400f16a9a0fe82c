"""Depthwise convolutions in one dimension: with the BatchNorm and the activation after them, as Conformer has them; with the
zeros before them or without the outputs at the end, as causal ones are written.

    [pad -] conv1d [- slice] [- BN] [- act]     of nn.Conv1d; and the same of a DepthwiseConv1d, which is the 2-D op between views
    conv_transpose1d [- BN] [- act]             likewise
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..nn.folded_conv1d import FoldedConv1d
from ..nn.folded_layers import folded
from ..ops.functional import DTYPES
from . import graph as g
from .training import replace_in_training

if TYPE_CHECKING:
    from .patterns import Pass


def _is_view(node: Any, name: str) -> bool:
    return g.calls(node, name) and node.args[1:] == (2,) and not node.kwargs


def _in_one_row(node: fx.Node) -> tuple[dict[str, Any], list[fx.Node]] | None:
    """Of the 2-D op over an image of one row, as our layers call it."""
    conv, after = g.convolution(node) if node.target in g.OURS else None, list(node.users)
    if conv is None or len(after) != 1 or not _is_view(after[0], "squeeze"):
        return None
    input, weight = conv["input"], conv["weight"]
    if not (_is_view(input, "unsqueeze") and _is_view(weight, "unsqueeze")):
        return None
    numbers = {name: conv[name][-1:] for name in ("stride", "dilation", "output_padding") if name in conv}
    half = len(conv["padding"]) // 2
    numbers["padding"] = conv["padding"][half:]
    if any(conv["padding"][:half]) or conv.get("output_padding", (0,))[0]:
        return None
    own = [view for view in (input, weight) if len(view.users) == 1]
    return {**conv, **numbers, "input": input.args[0], "weight": weight.args[0]}, [*own, node, after[0]]


def _of_torch(node: fx.Node) -> tuple[dict[str, Any], list[fx.Node]] | None:
    conv = g.convolution_1d(node)
    if conv is None:
        return None
    numbers = ("stride", "padding", "dilation", "output_padding")
    return {n: (v,) if n in numbers and not isinstance(v, (tuple, str)) else v for n, v in conv.items()}, [node]


def _depthwise(node: fx.Node) -> tuple[dict[str, Any], list[fx.Node]] | None:
    """The convolution's arguments and nodes, where it is depthwise and of a batch."""
    found = _in_one_row(node) or _of_torch(node)
    if found is None:
        return None
    conv, nodes = found
    input, weight, output = g.tensor_of(conv["input"]), g.tensor_of(conv["weight"]), g.tensor_of(nodes[-1])
    if input is None or weight is None or output is None or not input.dim() == output.dim() == 3 or output.dtype not in DTYPES:
        return None
    if not all(map(g.is_plain, (conv["input"], conv["weight"], conv["bias"]))) or not 1 < conv["groups"] == input.shape[1]:
        return None
    return found if "output_padding" in conv or weight.shape[1] == 1 else None


def _begins(node: fx.Node) -> bool:
    """Whether it is a slice of (N, C, L) from 0 on."""
    if node.target is torch.ops.aten.slice.Tensor:
        return len(node.args) == 4 and node.args[1:3] in ((2, 0), (-1, 0), (2, None), (-1, None))
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    *others, last = node.args[1]
    whole = others in ([...], [slice(None)] * 2, [slice(None), ...])
    return whole and isinstance(last, slice) and last.start in (None, 0) and last.step in (None, 1)


def _without_end(whole: Pass, conv: dict[str, Any], nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes with the slice ``[..., :length]`` that follows, where it leaves out what the zeros after the input gave."""
    node, pads = whole.next(nodes[-1]), conv["padding"]
    if node is None or isinstance(pads, str) or conv["stride"] != (1,) or "output_padding" in conv or not _begins(node):
        return nodes
    left_out = g.tensor_of(nodes[-1]).shape[2] - g.tensor_of(node).shape[2]
    if not whole.undisturbed([*nodes, node]) or not statically_known_true(left_out <= pads[-1]):
        return nodes
    if not isinstance(left_out, int):  # of an open length: all of them or none
        if not statically_known_true(left_out == pads[-1]):
            return nodes
        left_out = pads[-1]
    conv["padding"] = (pads[0], pads[-1] - left_out)
    return [*nodes, node]


def _zeros(node: Any) -> tuple[int, int] | None:
    """How many a pad puts before and after its input."""
    if not isinstance(node, fx.Node) or node.target not in (F.pad, torch._C._nn.pad) or len(node.users) != 1:
        return None
    how = {
        "mode": "constant",
        "value": None,
        **dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)),
        **node.kwargs,
    }
    pads = tuple(map(g.number_of, how["pad"])) if isinstance(how["pad"], (tuple, list)) else ()
    whole = len(pads) == 2 and all(type(pad) is int and pad >= 0 for pad in pads)
    return pads if whole and how["mode"] == "constant" and how["value"] in (None, 0) else None


def fuse_conv1d(whole: Pass, node: fx.Node) -> bool:
    """Whether the node is such a convolution."""
    found = _depthwise(node)
    if found is None:
        return False
    conv, own = found
    ours, nodes = own != [node], _without_end(whole, conv, own)
    layer = whole.followed(conv, nodes)
    why = ""
    if g.tensor_of(layer.nodes[-1]).requires_grad or g.tensor_of(node).requires_grad:
        why = "a gradient is required: only the convolution itself is replaced (torch.no_grad()?)"
    why = why or whole.why_not_folded(layer)
    if why:
        whole.report.refuse(node, why)
        if not ours:
            replace_in_training(whole, layer, nodes)
        return True
    pad, nodes = conv["input"], layer.nodes
    zeros = _zeros(pad) if conv["padding"] in ((0,), (0, 0), "valid") and "output_padding" not in conv else None
    if zeros is not None and whole.region[pad] == whole.region[node] and whole.undisturbed([pad, *nodes]):
        nodes = [pad, *nodes]
        conv["padding"], conv["input"] = zeros, pad.args[0] if pad.args else pad.kwargs["input"]
    whole.replace(nodes, conv["input"], None, folded(FoldedConv1d, layer.settings), layer.tensors)
    whole.report.fused["depthwise convolutions"] += 1
    return True
