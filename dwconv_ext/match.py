"""What a traced graph has after a convolution: a depthwise-separable block, or at least its BatchNorm and activation."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from .chain import Chain, FoldedConv, FusedChain, Norm
from .modules import DepthwiseConv2d, activation_of


class Open(Exception):
    """The data leaves the traced module: what follows is seen from further up."""


class Closed(Exception):
    """Something follows that is no part of the block: says what."""


_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish",
}  # fmt: skip

_NONE = ("identity", 0.01)


class _Walk:
    """Steps from a node to the only one that uses its result."""

    def __init__(self, owner: nn.Module, node: fx.Node) -> None:
        self.owner = owner
        self.node = node
        self.nodes = [node]
        self.steps = [node.target]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.owner.get_submodule(node.target) if node.op == "call_module" else None

    def peek(self) -> fx.Node:
        """The next node that does something in eval mode."""
        users = list(self.node.users)
        if len(users) != 1:
            what = ", ".join(map(self.describe, users))
            raise Closed(f"the result of {self.node.target} is used {len(users)} times" + (f": {what}" if what else ""))
        if users[0].op == "output":
            raise Open
        if isinstance(self.module(users[0]), (nn.Identity, nn.modules.dropout._DropoutNd)):
            self.take(users[0])
            return self.peek()
        return users[0]

    def take(self, node: fx.Node, step: str | None = None) -> int:
        self.node = node
        self.nodes.append(node)
        self.steps.append(node.target if step is None else step)
        return len(self.steps) - 1

    def describe(self, node: fx.Node) -> str:
        module = self.module(node)
        return getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__

    def batch_norm(self) -> Norm:
        """The BatchNorm, and the activation that it has built in (timm's BatchNormAct2d) or that follows."""
        node = self.peek()
        bn = self.module(node)
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise Closed(f"{self.describe(node)} follows, not BatchNorm")
        if bn.running_mean is None:
            raise Closed("the BatchNorm after it keeps no running statistics")
        act = None
        if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            if type(bn).__name__ != "BatchNormAct2d" or not isinstance(bn.drop, nn.Identity):
                raise Closed(f"{type(bn).__name__} follows, not BatchNorm2d")
            act = self.known(bn.act)
            if act is None:
                raise Closed(f"{type(bn.act).__name__} has no fused form")
        step = self.take(node)
        if act not in (None, _NONE):
            return Norm(step, *act, steps=1)
        act = self.activation()
        between = len(self.steps) - step - 2
        return Norm(step, *act, steps=2 if between == 0 else 1, apart=between > 0)

    @staticmethod
    def known(module: nn.Module | None) -> tuple[str, float] | None:
        try:
            return None if module is None else activation_of("activation", module)
        except ValueError:
            kinds = {"Swish": "silu", "HardSwish": "hardswish", "GELU": "gelu"}  # timm's own modules of the same functions
            if type(module).__module__.startswith("timm.") and type(module).__name__ in kinds:
                return kinds[type(module).__name__], 0.01
            return None

    def activation(self) -> tuple[str, float]:
        """The activation that follows, taken; identity where none does."""
        try:
            node = self.peek()
        except (Open, Closed):
            return _NONE
        act = self.known(self.module(node))
        if act is not None:
            self.take(node)
            return act
        if node.op == "call_function" and node.target in _FUNCTIONS and len(node.args) == 1:
            name = _FUNCTIONS[node.target]
            self.take(node, f":{name}")
            return name, 0.01
        return _NONE

    def pointwise(self) -> int:
        node = self.peek()
        conv = self.module(node)
        if type(conv) is not nn.Conv2d:
            raise Closed(f"{self.describe(node)} follows, not a pointwise convolution")
        if (conv.kernel_size, conv.stride, conv.groups) != ((1, 1), (1, 1), 1) or conv.padding not in ((0, 0), "valid", "same"):
            raise Closed("the convolution that follows is not pointwise")
        return self.take(node)

    def shortcut(self) -> fx.Node | None:
        """The addition that follows, of another tensor: an inverted residual's shortcut."""
        try:
            node = self.peek()
        except (Open, Closed):
            return None
        if node.op != "call_function" or node.target not in (operator.add, operator.iadd, torch.add):
            return None
        two_tensors = not node.kwargs and all(isinstance(a, fx.Node) for a in node.args) and len(set(node.args)) == 2
        return node if two_tensors else None


@dataclass
class Found:
    """A chain found in a module's graph."""

    conv: nn.Module
    chain: Chain
    nodes: list[fx.Node]  # in order
    shortcut: bool = False  # the last node adds another tensor
    leaves: bool = False  # its result leaves the module: the shortcut or the last activation may follow further up

    @property
    def extras(self) -> tuple[bool, bool]:
        return self.shortcut, self.chain.activation != "identity"


def find(owner: nn.Module, node: fx.Node) -> Found:
    """The block that starts at this depthwise convolution's node; where something keeps it apart, no more than its BatchNorm.

    For any other nn.Conv2d the BatchNorm that follows.
    """
    walk = _Walk(owner, node)
    conv = walk.module(node)
    if type(conv) not in (nn.Conv2d, DepthwiseConv2d):
        raise Closed(f"{type(conv).__name__} is a subclass of nn.Conv2d")
    norm = walk.batch_norm()
    steps, nodes = tuple(walk.steps), list(walk.nodes)
    try:
        return _block(walk, conv, norm)
    except Closed as reason:
        return Found(conv, FoldedConv(owner, steps, norm, str(reason)), nodes)


def _block(walk: _Walk, conv: nn.Module, norm1: Norm) -> Found:
    """The rest of a block, from the depthwise convolution's activation on."""
    if type(conv) is not DepthwiseConv2d or conv.out_channels != conv.in_channels or conv.padding_mode != "zeros":
        raise Closed("a channel multiplier or a padding mode keeps it apart")
    pointwise = walk.pointwise()
    norm2 = walk.batch_norm()
    shortcut = walk.shortcut()
    steps = tuple(walk.steps)
    if shortcut is not None:
        walk.take(shortcut)
    leaves = shortcut is None and any(user.op == "output" for user in walk.node.users)
    chain = FusedChain(walk.owner, steps, (0, pointwise), (norm1, norm2))
    return Found(conv, chain, walk.nodes, shortcut is not None, leaves)


def locate(graph: fx.Graph, chain: Chain) -> list[fx.Node] | None:
    """A chain's nodes, without its shortcut, in another graph of the same module; None where they don't follow one another."""

    def is_step(node: fx.Node, step: str) -> bool:
        if step.startswith(":"):
            return node.op == "call_function" and _FUNCTIONS.get(node.target) == step[1:]
        return node.op == "call_module" and node.target == step

    starts = [node for node in graph.nodes if is_step(node, chain.steps[0])]
    if len(starts) != 1:
        return None
    nodes = starts
    for step in chain.steps[1:]:
        users = list(nodes[-1].users)
        if len(users) != 1 or not is_step(users[0], step):
            return None
        nodes.append(users[0])
    return nodes
