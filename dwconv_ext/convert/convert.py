"""convert and unfuse: existing models onto this package's kernels and back, their trees, keys and parameters untouched."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..nn.separable import FusedDSConv
from ..ops.arguments import check_kind, to_pair, to_single
from .replace import OURS, class_for, fuses, is_depthwise, is_replaced, plain_class, restore, why_not
from .sequential import SequentialMixin, blocks_of, flattened
from .timing import depthwise_speedup, in_eval_mode, inputs_of, sequential_speedup

SLOWER = 0.97  # a layer below this share of torch's speed is left alone
FUSED = "fused block"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


@dataclass(frozen=True)
class Entry:
    """What became of one depthwise convolution.

    Attributes:
        name: its path in the model.
        layer: its class, channels, filter and stride.
        became: ``fused block`` (with its neighbours in a sequential container), the class of ours (``DepthwiseConv2d``,
            ``DepthwiseConvTranspose1d``, ...) or ``left alone``.
        why: what it is fused with; else why it is no more than it is.
    """

    name: str
    layer: str
    became: str
    why: str


@dataclass
class ConversionReport:
    """One entry for each depthwise convolution of the model; prints as a table.

    Attributes:
        entries: in the order of the model's modules.
        containers: how many sequential containers fuse their neighbours.
    """

    entries: list[Entry] = field(default_factory=list)
    containers: int = 0

    def count(self, became: str) -> int:
        return sum(entry.became == became for entry in self.entries)

    def __str__(self) -> str:
        counts = Counter(entry.became for entry in self.entries)
        became = (_counted(n, what) if what == FUSED else f"{n} {what}" for what, n in counts.most_common())
        head = _counted(len(self.entries), "depthwise convolution") + (": " + ", ".join(became) if counts else "")
        if self.containers:
            head += f"; {_counted(self.containers, 'sequential container')}"
        rows = [(e.name or "(the model)", e.layer, e.became, e.why) for e in self.entries]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows)
        return "\n".join([head, *lines])


def _describe(conv: nn.Module) -> str:
    to_sizes = to_single if isinstance(conv, (nn.Conv1d, nn.ConvTranspose1d)) else to_pair
    found = (to_sizes(type(conv).__name__, name, getattr(conv, name)) for name in ("kernel_size", "stride"))
    size, stride = (str(sizes) if isinstance(sizes, int) else "x".join(map(str, sizes)) for sizes in found)
    return f"{conv.in_channels} channels, {size}, stride {stride}"


def _convert(model: nn.Module, example_input: Any) -> ConversionReport:
    names = {module: name for name, module in model.named_modules()}
    own = {part for m in names if type(m) is FusedDSConv for part in m.children()}
    convs = {m: f"{type(m).__name__}: {_describe(m)}" for m in names if is_depthwise(m) and m not in own}
    left = {m: why for m in convs if (why := why_not(m))}
    changed = [m for m in convs if m not in left and not is_replaced(m)]
    changed += [m for m in names if not isinstance(m, SequentialMixin) and fuses(m)]
    inputs = {} if example_input is None else inputs_of(model, changed, example_input)
    for module in changed:
        module.__class__ = class_for(type(module))
    left.update(_leave_slower(inputs))
    fused = _blocks(model)
    report = ConversionReport(containers=sum(isinstance(m, SequentialMixin) for m in names))
    for conv, layer in convs.items():
        if conv in left and conv not in fused:
            became = OURS[plain_class(conv)].__name__ if is_replaced(conv) else "left alone"
            entry = Entry(names[conv], layer, became, left[conv])
        elif conv in fused:
            entry = Entry(names[conv], layer, FUSED, "with " + ", ".join(names[part] for part in fused[conv]))
        else:
            why = "its neighbours are no block of a sequential container" if isinstance(conv, nn.Conv2d) else ""
            entry = Entry(names[conv], layer, OURS[plain_class(conv)].__name__, why)
        report.entries.append(entry)
    return report


def _blocks(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The parts that each depthwise convolution is fused with in eval mode, as the containers are now."""
    fused: dict[nn.Module, list[nn.Module]] = {}
    with in_eval_mode(model):
        for container in model.modules():
            for depthwise, *parts in blocks_of(container) if isinstance(container, SequentialMixin) else ():
                if len(parts) > len(fused.get(depthwise, ())):
                    fused[depthwise] = parts
    return fused


def _leave_slower(inputs: dict[nn.Module, Tensor]) -> dict[nn.Module, str]:
    """Undoes what is slower than torch on these inputs of changed modules: why, for each depthwise convolution."""
    slower: dict[nn.Module, str] = {}
    for module, x in inputs.items():
        container = isinstance(module, SequentialMixin)
        ratio = (sequential_speedup if container else depthwise_speedup)(module, x)
        if ratio < SLOWER:
            told = f"{ratio:.2f}x the speed of torch's at {'x'.join(map(str, x.shape))}"
            if container:
                slower.update((m, f"its fused container has {told}") for m in flattened(module) if is_depthwise(m))
            else:
                slower[module] = f"the replaced layer has {told}"
            restore(module)
    return slower


def _shared_copy(model: nn.Module) -> nn.Module:
    """New modules over the same tensors; hooks that are not the model's own methods are the same objects."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        memo.update((id(t), t) for t in tensors if isinstance(t, Tensor))
        for name, hooks in module.__dict__.items():
            if "hooks" in name and isinstance(hooks, dict):
                memo.update((id(h), h) for h in hooks.values() if not isinstance(getattr(h, "__self__", None), nn.Module))
    return copy.deepcopy(model, memo)


def convert(model: nn.Module, inplace: bool = False, *, example_input: Any = None, verbose: bool = False) -> nn.Module:
    """The model with single layers replaced by this package's: nothing is traced, and no other forward is touched.

    Each depthwise ``nn.Conv2d`` (and subclass whose own behaviour can be kept, such as timm's ``Conv2dSame``) becomes a
    ``DepthwiseConv2d``, each depthwise ``nn.Conv1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose1d`` its like. Each
    ``nn.Sequential`` with a 2-D convolution (and subclass with the same forward) fuses its neighbours as it runs
    (sequential.py): depthwise-separable blocks as one kernel and BatchNorms folded in eval mode, BatchNorm and activation as one
    operation in training. For everything else there is ``torch.compile(model, backend="dwconv_ext")``.

    The module tree, the state_dict's keys, parameters, buffers, hooks and the train/eval behaviour stay; modules change class.

    Args:
        model: any module.
        inplace: change the model itself. Otherwise the result is a copy of the modules that shares the parameters and
            buffers with the model, so that an optimizer made for either trains both (``copy.deepcopy`` before or after
            makes them independent).
        example_input: an input of the model, or a tuple of its arguments. With one, every replaced layer is timed against
            torch's at the shapes it gets, forward, on this machine; one that would be slower is left alone, and the report
            gives the figures.
        verbose: print the report.

    Returns:
        The converted model, with a ``conversion_report``: for each depthwise convolution what it became, and why.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the model does not take example_input.

    Examples:
        >>> depthwise, pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)
        >>> model = nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.ReLU(), pointwise, nn.BatchNorm2d(16))
        >>> print(convert(model).conversion_report)
        1 depthwise convolution: 1 fused block; 1 sequential container
        0  Conv2d: 8 channels, 3x3, stride 1x1  fused block  with 1, 2, 3, 4
    """
    check_kind("convert", "model", model, nn.Module, "an nn.Module")
    if not inplace:
        model = _shared_copy(model)
    report = _convert(model, example_input)
    model.__dict__["conversion_report"] = report
    if verbose:
        print(report)
    return model


def unfuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Plain nn modules again: what ``convert`` changed is as it was, and this package's own modules become torch's.

    A ``DepthwiseConv2d`` becomes an ``nn.Conv2d``, and so do the others (but a causal ``DepthwiseConv1d``, for which torch has no
    class); a ``FusedDSConv`` an ``nn.Sequential`` with the same keys. The result has the original's module tree, keys, parameters
    and hooks, for ``torch.onnx.export``, ``torch.jit.script`` and quantization tools.

    Args:
        model: any module.
        inplace: change the model itself (not possible for a FusedDSConv, which is replaced); otherwise a copy that shares
            parameters and buffers.

    Returns:
        The plain model.

    Raises:
        TypeError: model is not an nn.Module.

    Examples:
        >>> [type(layer).__name__ for layer in unfuse(FusedDSConv(8, 16, activation="silu"))]
        ['Conv2d', 'BatchNorm2d', 'SiLU', 'Conv2d', 'BatchNorm2d', 'SiLU']
    """
    check_kind("unfuse", "model", model, nn.Module, "an nn.Module")
    if not inplace:
        model = _shared_copy(model)
    model.__dict__.pop("conversion_report", None)
    return _unfuse(model, {})


def _unfuse(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    new = done[module] = module._as_sequential() if type(module) is FusedDSConv else module
    restore(new)
    for name, child in new._modules.items():
        if child is not None:
            new._modules[name] = _unfuse(child, done)
    return new
