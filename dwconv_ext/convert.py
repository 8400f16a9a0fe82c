"""convert and unfuse: existing models onto this package's kernels and back, their trees, keys and parameters untouched."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .chain import Chain, FoldedConv, FusedChain, resolve
from .match import Closed, Found, Open, find, locate
from .measure import chain_speedup, depthwise_speedup, inputs_of
from .modules import DepthwiseConv2d, FusedDSConv
from .onednn import PackedLinear
from .steady import Steadiness
from .swap import Swapped, class_for, is_depthwise, restore, why_not
from .trace import FusedForward, Traced, trace

SLOWER = 0.97  # a layer below this share of torch's speed is left alone
FUSED = "fused"  # a chain is the child of this name of its first convolution


# --- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What became of one depthwise convolution."""

    name: str  # its path in the model
    layer: str  # its class, channels, filter and stride
    became: str  # "FusedDSConv", "DepthwiseConv2d" or "left alone"
    why: str  # what it was fused with; else why it is no more than it is


@dataclass
class ConversionReport:
    """One entry for each depthwise convolution of the model; prints as a table.

    folded: how many of the model's other convolutions have the BatchNorm after them folded in, in eval mode.
    packed: how many linear layers keep their weights packed.
    """

    entries: list[Entry] = field(default_factory=list)
    folded: int = 0
    packed: int = 0

    def count(self, became: str) -> int:
        return sum(entry.became == became for entry in self.entries)

    def __str__(self) -> str:
        counts = Counter(entry.became for entry in self.entries)
        total = f"{len(self.entries)} depthwise convolution{'s' if len(self.entries) != 1 else ''}"
        head = total + (": " + ", ".join(f"{n} {what}" for what, n in counts.most_common()) if counts else "")
        if self.folded:
            head += f"; BatchNorm folded into {self.folded} other{'s' if self.folded != 1 else ''}"
        if self.packed:
            head += f"; {self.packed} linear layer{'s' if self.packed != 1 else ''} packed"
        rows = [(e.name or "(the model)", e.layer, e.became, e.why) for e in self.entries]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows)
        return "\n".join([head, *lines])


def _describe(conv: nn.Conv2d) -> str:
    size, stride = ("x".join(map(str, pair)) for pair in (conv.kernel_size, conv.stride))
    return f"{conv.in_channels} channels, {size}, stride {stride}"


@dataclass
class _Pending:
    """Blocks that can be fused in a module, and may be more complete in one above it."""

    owner: nn.Module
    in_eval: Traced
    in_training: Traced | None
    found: list[Found]


class _Converter:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = ConversionReport()
        self.why: dict[nn.Module, str] = {}
        self.pending: dict[nn.Module, _Pending] = {}
        self.steadiness = Steadiness()

    def run(self, example_input: Any = None) -> None:
        ours = {m.depthwise for m in self.model.modules() if type(m) is FusedDSConv}
        found = {m: name for name, m in self.model.named_modules() if is_depthwise(m) and m not in ours}
        already = {m for m in found if FUSED in m._modules}
        names = {m: name for name, m in self.model.named_modules()}
        layers = {m: f"{type(m).__name__}: {_describe(m)}" for m in found}
        left = {m: why for m in found if (why := why_not(m))}
        open_ = [m for m in found if m not in left and m not in already]
        for conv in open_:
            if not isinstance(conv, (DepthwiseConv2d, Swapped)):
                conv.__class__ = class_for(type(conv))
        self.candidates = set(open_)
        waiting = self.visit(self.model)
        self.settle(waiting)
        for conv in waiting:
            self.why.setdefault(conv, "nothing in the model shows what follows it")
        slower = {} if example_input is None else self.leave_slower(example_input)
        if found or ours:
            self.report.folded = self.fold_others()
            self.report.packed = self.pack_linears()
        for conv, name in found.items():
            if conv in left:
                entry = Entry(name, layers[conv], "left alone", left[conv])
            elif conv in slower:
                became = "DepthwiseConv2d" if isinstance(conv, (DepthwiseConv2d, Swapped)) else "left alone"
                entry = Entry(name, layers[conv], became, slower[conv])
            elif FUSED in conv._modules and conv._modules[FUSED].enabled:
                chain = conv._modules[FUSED]
                parts = ", ".join(names[resolve(chain.owner, path)] for path in chain.paths[1:] if path is not None)
                if isinstance(chain, FusedChain):
                    entry = Entry(name, layers[conv], "FusedDSConv", f"with {parts}")
                else:
                    entry = Entry(name, layers[conv], "DepthwiseConv2d", f"with {parts}; {chain.why}")
            else:
                entry = Entry(name, layers[conv], "DepthwiseConv2d", self.why.get(conv, "fused, it was found to be slower"))
            self.report.entries.append(entry)

    def fold_others(self) -> int:
        """Folds BatchNorms where no depthwise convolution gave a reason to look so far; how many convolutions have one now."""
        fused = {part for m in self.model.modules() if isinstance(m, FusedChain) for part in m._parts()}
        others = [m for m in self.model.modules() if type(m) is nn.Conv2d and m not in fused and not is_depthwise(m)]
        self.candidates = {m for m in others if FUSED not in m._modules and not why_not(m)}
        self.visit(self.model)
        return sum(FUSED in m._modules for m in others)

    def pack_linears(self) -> int:
        linears = {m for m in self.model.modules() if type(m) in (nn.Linear, PackedLinear)}
        for linear in linears:
            linear.__class__ = PackedLinear
        return len(linears)

    def leave_slower(self, example_input: Any) -> dict[nn.Module, str]:
        """Undoes what the example input shows to be slower than torch: why, for each."""
        inputs = inputs_of(self.model, list(self.candidates), example_input)
        slower: dict[nn.Module, str] = {}
        for conv, x in inputs.items():
            shape = "x".join(map(str, x.shape))
            chain = conv._modules.get(FUSED)
            if chain is not None:
                ratio = chain_speedup(chain, x)
                if ratio >= SLOWER:
                    continue
                chain.enabled = False
                slower[conv] = f"fused, it has {ratio:.2f}x torch's speed at {shape}"
            ratio = depthwise_speedup(conv, x)
            if ratio < SLOWER:
                restore(conv)
                slower[conv] = f"ours has {ratio:.2f}x torch's speed at {shape}"
        return slower

    def visit(self, module: nn.Module) -> list[nn.Module]:
        """Fuses what can be fused within the module; the depthwise convolutions that wait for what follows further up."""
        if module in self.candidates:
            return [module]
        if isinstance(module, FusedDSConv):
            return []
        waiting = [conv for child in dict.fromkeys(module.children()) for conv in self.visit(child)]
        if not waiting or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return waiting
        if isinstance(module.__dict__.get("forward"), FusedForward):
            for conv in waiting:
                self.why.setdefault(conv, f"{type(module).__name__} was converted without it")
            return []
        try:
            traced = trace(module)
        except Exception as error:
            reason = f"{type(module).__name__} can't be traced: {type(error).__name__}: {error}".splitlines()[0][:160]
            self.settle(waiting)
            for conv in waiting:
                self.why.setdefault(conv, reason)
            return [conv for conv in waiting if FUSED not in conv._modules]
        calls: dict[nn.Module, list[fx.Node]] = {conv: [] for conv in waiting}
        for node in traced.graph.nodes:
            if node.op == "call_module" and (target := module.get_submodule(node.target)) in calls:
                calls[target].append(node)
        still: list[nn.Module] = []
        found: list[Found] = []
        for conv, nodes in calls.items():
            try:
                if len(nodes) != 1:
                    raise Closed(f"{type(module).__name__} calls it {len(nodes)} times where it can be traced")
                found.append(find(module, nodes[0]))
            except Open:
                still.append(conv)
            except Closed as reason:
                self.why[conv] = str(reason)
        # A block that a module below can fuse as well is fused there, unless there is more of it here. One whose result leaves
        # this module may become more complete in one above, and what else is found here waits with it.
        better = [f for f in found if f.conv not in self.pending or f.extras > self.extras_below(f.conv)]
        here = _Pending(module, traced, self.steadiness.trace(module) if better else None, found)
        if better and any(f.leaves for f in found) and all(f.leaves or isinstance(f.chain, FoldedConv) for f in found):
            self.pending.update({f.conv: here for f in found})
        elif better:
            for f in found:
                self.pending.pop(f.conv, None)
            self.install(here)
        up = {*still, *(f.conv for f in found if f.leaves or self.pending.get(f.conv) is here)}
        self.settle([conv for conv in waiting if conv not in up])
        return [*still, *(f.conv for f in found if f.conv in self.pending)]

    def extras_below(self, conv: nn.Module) -> tuple[bool, bool]:
        return next(f.extras for f in self.pending[conv].found if f.conv is conv)

    def settle(self, convs: list[nn.Module]) -> None:
        """Nothing above adds to these blocks: they are fused where they were found."""
        for conv in convs:
            below = self.pending.get(conv)
            if below is not None:
                for f in below.found:
                    self.pending.pop(f.conv, None)
                self.install(below)

    def install(self, here: _Pending) -> None:
        """The chains in the owner's forward; BatchNorms that follow its other convolutions are folded into those as well."""
        graph = here.in_eval.graph
        chains = [f.chain for f in here.found if self.replace(graph, f)]
        convs = [n for n in graph.nodes if n.op == "call_module" and type(here.owner.get_submodule(n.target)) is nn.Conv2d]
        calls = Counter(here.owner.get_submodule(node.target) for node in convs)
        for node in convs:
            conv = here.owner.get_submodule(node.target)
            if calls[conv] > 1 or is_depthwise(conv) or why_not(conv):
                continue
            try:
                f = find(here.owner, node)
            except (Open, Closed):
                continue
            if self.replace(graph, f):
                chains.append(f.chain)
        graph.lint()
        here.owner.forward = FusedForward(here.owner, here.in_eval, self.with_chains(here.in_training, chains))

    @staticmethod
    def with_chains(traced: Traced | None, chains: list[Chain]) -> Traced | None:
        """The graph in training mode with those of the chains that are in it too; None where none is."""
        if traced is None:
            return None
        places = [(chain, nodes) for chain in chains if (nodes := locate(traced.graph, chain))]
        for chain, nodes in places:
            _splice(traced.graph, nodes, f"{chain.steps[0]}.{FUSED}", [nodes[0].args[0]])
        traced.graph.lint()
        return traced if places else None

    @staticmethod
    def replace(graph: fx.Graph, found: Found) -> bool:
        """One node in the place of the chain's, unless the convolution is in one already."""
        if FUSED in found.conv._modules:
            return False
        found.conv.add_module(FUSED, found.chain)
        nodes = found.nodes
        inputs = [nodes[0].args[0]]
        if found.shortcut:
            inputs += [node for node in nodes[-1].args if node is not nodes[-2]]
        _splice(graph, nodes, f"{nodes[0].target}.{FUSED}", inputs)
        return True


def _splice(graph: fx.Graph, nodes: list[fx.Node], target: str, inputs: list[fx.Node]) -> None:
    """A call of the module `target` in the place of the nodes."""
    with graph.inserting_before(nodes[-1]):
        fused = graph.call_module(target, tuple(inputs))
    nodes[-1].replace_all_uses_with(fused)
    for node in reversed(nodes):
        graph.erase_node(node)


def _shared_copy(model: nn.Module) -> nn.Module:
    """New modules over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def convert(model: nn.Module, inplace: bool = False, *, example_input: Any = None, verbose: bool = False) -> nn.Module:
    """The model on this package's kernels: every depthwise convolution, and every depthwise-separable block as one kernel.

    Each depthwise ``nn.Conv2d`` (and subclass whose own behaviour can be kept, such as timm's ``Conv2dSame``) becomes a
    :class:`DepthwiseConv2d`. Each chain depthwise - BatchNorm - activation - pointwise - BatchNorm [- activation] [+ shortcut]
    runs, in eval mode, as one :class:`FusedDSConv`, which appears as the child ``fused`` of its depthwise convolution. Chains
    are found by ``torch.fx``, in the smallest module that holds the whole of one, whatever modules they are written with.
    Where the model has a depthwise convolution, every other convolution of it has the BatchNorm after it folded in, in eval mode,
    and its linear layers keep their weights in oneDNN's order for inference on the CPU.

    The module tree, the state_dict's keys, parameters, buffers, hooks and the train/eval behaviour stay: modules change
    class or gain a ``forward``, and none is moved. Where hooks sit within a chain, or where parts were replaced since, the
    original modules run one by one. In training mode, on the CPU, a chain's convolutions run one by one, and each BatchNorm and
    the activation after it as one op.

    Args:
        model: any module.
        inplace: change the model itself. Otherwise the result is a copy of the modules that shares the parameters and
            buffers with the model, so that an optimiser made for either trains both (``copy.deepcopy`` before or after
            makes them independent).
        example_input: an input of the model, or a tuple of its arguments. With one, every converted layer is timed against
            torch's at the shapes it gets, forward, on this machine; one that would be slower is left alone, and the report
            gives the figures. Without, every layer is converted that can be.
        verbose: print the report.

    Returns:
        The converted model, with a ``conversion_report``: for each depthwise convolution what it became, and why.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> depthwise, pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)
        >>> model = nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.ReLU(), pointwise, nn.BatchNorm2d(16))
        >>> print(convert(model).conversion_report)
        1 depthwise convolution: 1 FusedDSConv
        0  Conv2d: 8 channels, 3x3, stride 1x1  FusedDSConv  with 1, 2, 3, 4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}")
    if not inplace:
        model = _shared_copy(model)
    converter = _Converter(model)
    converter.run(example_input)
    model.__dict__["conversion_report"] = converter.report
    if verbose:
        print(converter.report)
    return model


def unfuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Plain nn modules again: what :func:`convert` changed is as it was, and this package's own modules become torch's.

    A :class:`DepthwiseConv2d` becomes an ``nn.Conv2d``, a :class:`FusedDSConv` an ``nn.Sequential`` with the same keys. The
    result has the original's module tree, keys, parameters and hooks, for ``torch.onnx.export``, ``torch.jit.script`` and
    quantisation tools.

    Args:
        model: any module.
        inplace: change the model itself (not possible for a FusedDSConv, which is replaced); otherwise a copy that shares
            parameters and buffers.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}")
    if not inplace:
        model = _shared_copy(model)
    model.__dict__.pop("conversion_report", None)
    return _unfuse(model, {})


def _unfuse(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    new = done[module] = _sequential(module) if type(module) is FusedDSConv else module
    if isinstance(new.__dict__.get("forward"), FusedForward):
        del new.forward
    if isinstance(new._modules.get(FUSED), Chain):
        del new._modules[FUSED]
    restore(new)
    for name, child in new._modules.items():
        if child is not None:
            new._modules[name] = _unfuse(child, done)
    return new


_ACTIVATIONS: dict[str, Any] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def _activation(kind: str, slope: float) -> nn.Module:
    return nn.LeakyReLU(slope) if kind == "leaky_relu" else _ACTIVATIONS[kind]()


def _sequential(block: FusedDSConv) -> nn.Sequential:
    parts = block._modules
    plain = nn.Sequential(
        OrderedDict(
            depthwise=parts["depthwise"],
            bn1=parts["bn1"],
            act1=_activation(block.dw_activation, block.dw_slope),
            pointwise=parts["pointwise"],
            bn2=parts["bn2"],
            act2=_activation(block.activation, block.slope),
        )
    )
    for name, value in block.__dict__.items():
        if "hooks" in name:
            plain.__dict__[name] = value
    for part in (plain, plain.act1, plain.act2):
        part.training = block.training
    return plain
