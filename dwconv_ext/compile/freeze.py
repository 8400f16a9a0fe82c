"""An exported program on this package's kernels, with weights that never change: for serving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..nn.folded_layers import Folded
from ..nn.folded_sequence import FoldedSequence
from ..nn.folded_weights import Tensors
from ..ops.autograd import PLAIN
from . import graph as g
from .aten import aten
from .patterns import fuse
from .report import Report, keep
from .sequences import Layers


def freeze(program: ExportedProgram) -> Callable[..., Any]:
    """What computes an exported program in inference, with its weights as they are now.

    BatchNorms are folded and weights packed here and once; a call looks at its inputs and at nothing else, and has no guards to
    evaluate, which is what a compiled model's shortest calls are made of. It may be called from several threads.

    Args:
        program: what ``torch.export.export(model.eval(), (x,))`` returns, before ``run_decompositions``; x in the layout that it
            will be called with. ``dynamic_shapes`` leave sizes open; weights are then kept unpacked too.

    Returns:
        A function of the program's arguments, which shares no memory with the model: a buffer that the program writes is its own.
        Results want no derivative, and autocast does not count. ``last_report()`` says what was fused.

    Raises:
        TypeError: program is no ``ExportedProgram``.
        ValueError: it was exported under autocast.
        RuntimeError: by a call, whose input has another dtype or device than the program's, or another shape where that was not
            left open; where it was, torch.export raises its own error.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
        >>> x = torch.randn(1, 8, 5, 5)
        >>> serve = freeze(torch.export.export(model, (x,)))
        >>> serve(x).shape
        torch.Size([1, 4, 3, 3])
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            "freeze: program must be a torch.export.ExportedProgram, as torch.export.export(model.eval(), (x,)) returns, "
            f"but got {type(program).__name__}"
        )
    module = program.module()
    for node in module.graph.nodes:
        value = _attribute(module, node) if node.op == "get_attr" else node.meta.get("val")
        node.meta["example_value"] = value.detach() if isinstance(value, Tensor) else value
    _refuse_autocast(module.graph)
    report = Report("eager")
    with torch.no_grad(), torch.inference_mode(False):
        layers = fuse(module, packed=True, frozen=False, sequences=True, report=report)
        _bind(module, layers)
        _own_tensors(module)
    keep(report)
    _check_inputs(module.graph)
    _plain_arguments(module, program)
    module.graph.lint()
    # Not the module, whose hooks check what has been checked.
    forward = fx.GraphModule(module, _without_past(module.graph)).forward

    def serve(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
                return forward(*args, **kwargs)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return forward(*args, **kwargs)

    return serve


def _refuse_autocast(graph: fx.Graph) -> None:
    """torch.export notes the dtypes that a surrounding autocast gives, but not its casts."""
    for node in graph.nodes:
        if node.target in (aten.conv2d.default, aten.conv2d.padding, aten.linear.default):
            given, found = g.tensor_of(node.args[0]), g.tensor_of(node)
            if given is not None and found is not None and given.dtype is not found.dtype:
                raise ValueError("freeze: program must be exported outside of autocast; put autocast into the model's forward")


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Of an attribute by its dotted name: the module, and the name there."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _attribute(module: torch.nn.Module, node: fx.Node) -> Any:
    return getattr(*_owner(module, node.target))


def _constants(module: fx.GraphModule, layers: Layers) -> dict[fx.Node, Tensor]:
    """Tensors that only fused layers read, so that nothing in the program can write them."""
    values = {node: _attribute(module, node) for node in module.graph.nodes if node.op == "get_attr"}
    values = {node: value for node, value in values.items() if isinstance(value, Tensor)}
    others = {
        value.untyped_storage().data_ptr()
        for node, value in values.items()
        if type(value) in PLAIN and any(user not in layers for user in node.users)
    }
    return {
        node: value for node, value in values.items() if type(value) in PLAIN and value.untyped_storage().data_ptr() not in others
    }


def _bind(module: fx.GraphModule, layers: Layers) -> None:
    """What fused layers make of their tensors, in the place of these."""
    constants = _constants(module, layers)
    for node in [n for n in module.graph.nodes if n in layers]:
        layer, values, nodes = layers[node], node.args[0], node.args[1:]
        if not isinstance(layer, FoldedSequence):
            values, nodes = (node.args[0], node.args[1], node.kwargs.get("gate")), node.args[2:]
        examples = [g.tensor_of(v) for v in values if v is not None]
        if any(n is not None and n not in constants for n in nodes):
            continue
        tensors = tuple(None if n is None else constants[n] for n in nodes)
        run = layer.kept(tensors, examples[0].dtype)
        fixed = all(type(size) is int and size > 0 for t in examples for size in t.shape)
        # With sizes left open, an input may turn out to be none for the kernels.
        bound = _runs(layer, run) if run and fixed else _runs_or_not(layer, copy.deepcopy(tensors), run)
        bound.__name__ = bound.__qualname__ = node.target.__name__
        node.target, node.args, node.kwargs = bound, tuple(values), {}


def _runs(layer: Folded, run: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(layer, FoldedSequence):
        return lambda *inputs: layer.results(run(inputs))
    return lambda input, residual, gate: run(input, residual, gate)


def _runs_or_not(layer: Folded, tensors: Tensors, run: Any) -> Callable[..., Any]:
    if isinstance(layer, FoldedSequence):
        return lambda *inputs: layer(inputs, tensors, kept=lambda *_: run)
    return lambda input, residual, gate: layer(input, tensors, residual, gate, kept=lambda *_: run)


def _own_tensors(module: fx.GraphModule) -> None:
    """Copies of what is still read of the model's, in the same relations to one another; what was packed is let go."""
    idle = [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]
    used = {n.target for n in module.graph.nodes if n.op == "get_attr" and n.users}
    for node in idle:
        module.graph.erase_node(node)
        if node.target not in used:
            owner, name = _owner(module, node.target)
            if hasattr(owner, name):
                delattr(owner, name)
    left = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    constants = {n.target: _attribute(module, n) for n in module.graph.nodes if n.op == "get_attr"}
    left |= {name: value for name, value in constants.items() if isinstance(value, Tensor)}
    for name, value in copy.deepcopy({name: value.detach() for name, value in left.items()}).items():
        owner, leaf = _owner(module, name)
        delattr(owner, leaf)
        owner.register_buffer(leaf, value)


def _without_past(graph: fx.Graph) -> fx.Graph:
    """The same, with its nodes alone: a graph keeps erased ones, for their names, and they the model's tensors."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        node.meta.clear()
    return graph


def _check_inputs(graph: fx.Graph) -> None:
    """Dtype and device, which torch.export does not look at; and shapes in its place where they are numbers."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    tensors = [node for node in nodes if g.tensor_of(node) is not None]
    values = [g.tensor_of(node) for node in tensors]
    sizes = [tuple(t.shape) if all(type(size) is int for size in t.shape) else None for t in values]
    wanted = [(n.target, size, t.dtype, t.device) for n, size, t in zip(tensors, sizes, values, strict=True)]

    def check(*inputs: Tensor) -> None:
        for (name, size, dtype, device), x in zip(wanted, inputs, strict=True):
            if not isinstance(x, Tensor) or x.layout is not torch.strided:
                got = x.layout if isinstance(x, Tensor) else type(x).__name__
                raise RuntimeError(f"freeze: {name} must be a dense tensor, but got {got}")
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
