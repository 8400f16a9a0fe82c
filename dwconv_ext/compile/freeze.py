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
    _plain_arguments(module, program)
    module.graph.lint()
    module.recompile()
    return torch.no_grad()(module.forward)  # not the module, whose hooks check what has been checked


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
    """Dtype and device, which torch.export does not look at; and shapes in its place where they are numbers."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    tensors = [node for node in nodes if g.tensor_of(node) is not None]
    values = [g.tensor_of(node) for node in tensors]
    sizes = [tuple(t.shape) if all(type(size) is int for size in t.shape) else None for t in values]
    wanted = [(n.target, size, t.dtype, t.device) for n, size, t in zip(tensors, sizes, values, strict=True)]

    def check(*inputs: Tensor) -> None:
        for (name, size, dtype, device), x in zip(wanted, inputs, strict=True):
            if x.dtype is not dtype or x.device != device or (size is not None and x.shape != size):
                shape = "" if size is None else f" and of shape {list(size)}"
                got = f"{x.dtype} on {x.device}" + ("" if size is None else f" and of shape {list(x.shape)}")
                raise RuntimeError(f"freeze: {name} must be {dtype} on {device}{shape}, but got {got}")

    if not tensors:
        return
    with graph.inserting_after(nodes[-1]):
        graph.call_function(check, tuple(tensors))
    if len(tensors) == len(nodes) and None not in sizes:
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target == "_guards_fn"]:
            graph.erase_node(node)


def _plain_arguments(module: fx.GraphModule, program: ExportedProgram) -> None:
    """Of a program of tensors that returns one: without torch.export's way through nested lists and dicts of them."""
    arguments, keywords = program.call_spec.in_spec.children()
    if (
        keywords.num_leaves
        or not all(spec.is_leaf() for spec in arguments.children())
        or not program.call_spec.out_spec.is_leaf()
    ):
        return
    module.graph.set_codegen(fx.graph.CodeGen())
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    output.args = output.args[0]


def _drop_unused(module: fx.GraphModule) -> None:
    """The weights that were packed, whose memory is then the model's alone."""
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]:
        module.graph.erase_node(node)
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
