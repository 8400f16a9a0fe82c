"""An exported program on this package's kernels, with weights that never change: for serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..nn.folded_sequence import FoldedSequence
from . import graph as g
from .patterns import fuse
from .report import Report, keep
from .sequences import Layers


def freeze(program: ExportedProgram) -> Callable[..., Any]:
    """What computes an exported program in inference, with its weights as they are now.

    BatchNorms are folded and weights packed here and once; a call looks at its inputs and at nothing else, and has no guards to
    evaluate, which is what a compiled model's shortest calls are made of. Shapes are those that the program was exported for.

    Args:
        program: of ``torch.export.export(model.eval(), (x,))``, in the layout in which it will be called.

    Returns:
        A function of the program's arguments. Its results want no derivative. ``last_report()`` says what was fused.

    Raises:
        TypeError: program is no ``ExportedProgram``. A call with an input of another dtype or device than the program's raises a
            ``RuntimeError``, with one of another shape what torch.export raises.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
        >>> x = torch.randn(1, 8, 5, 5)
        >>> serve = freeze(torch.export.export(model, (x,)))
        >>> serve(x).shape
        torch.Size([1, 4, 3, 3])
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"freeze: program must be a torch.export.ExportedProgram, but got {type(program).__name__}")
    module = program.module()
    for node in module.graph.nodes:
        value = _attribute(module, node) if node.op == "get_attr" else node.meta.get("val")
        node.meta["example_value"] = value.detach() if isinstance(value, Tensor) else value
    report = Report("eager")
    with torch.no_grad():
        layers = fuse(module, packed=True, frozen=False, sequences=True, report=report)
        _bind(module, layers)
    keep(report)
    _check_inputs(module.graph)
    _drop_unused(module)
    module.graph.lint()
    module.recompile()
    return torch.no_grad()(module)


def _attribute(module: torch.nn.Module, node: fx.Node) -> Any:
    owner, _, name = node.target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _bind(module: fx.GraphModule, layers: Layers) -> None:
    """What fused layers make of their tensors, in the place of these."""
    for node in [n for n in module.graph.nodes if n in layers]:
        layer, (operands, rest) = layers[node], (node.args[0], node.args[1:])
        sequence = isinstance(layer, FoldedSequence)
        nodes = rest if sequence else rest[1:]
        if any(n is not None and n.op != "get_attr" for n in nodes):
            continue
        tensors = tuple(None if n is None else _attribute(module, n) for n in nodes)
        run = layer.kept(tensors, g.tensor_of(operands[0] if sequence else operands).dtype)
        if not run:
            continue
        one = sequence and len(layer.outputs) == 1

        def bound(*operands: Any, run: Any = run, one: bool = one) -> Any:
            return run(*operands)[0] if one else run(*operands)

        bound.__name__ = bound.__qualname__ = node.target.__name__
        node.target = bound
        node.args, node.kwargs = (operands,) if sequence else (operands, rest[0], node.kwargs.get("gate")), {}


def _check_inputs(graph: fx.Graph) -> None:
    """Dtype and device, which torch.export does not look at."""
    places = [node for node in graph.nodes if node.op == "placeholder" and g.tensor_of(node) is not None]
    wanted = [(node.name, g.tensor_of(node).dtype, g.tensor_of(node).device) for node in places]

    def check(*inputs: Tensor) -> None:
        for (name, dtype, device), input in zip(wanted, inputs, strict=True):
            if input.dtype is not dtype or input.device != device:
                raise RuntimeError(f"freeze: {name} must be {dtype} on {device}, but got {input.dtype} on {input.device}")

    if places:
        with graph.inserting_after(next(node for node in reversed(graph.nodes) if node.op == "placeholder")):
            graph.call_function(check, tuple(places))


def _drop_unused(module: fx.GraphModule) -> None:
    """The weights that were packed, whose memory is then the model's alone."""
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]:
        module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
