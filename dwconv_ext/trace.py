"""The data flow through one module, by torch.fx: what runs after its depthwise convolutions, and a forward with chains fused.

A module is traced with one tensor argument. Its children are traced into as far as they allow it; those that
do not (control flow on data), and those that compute one thing (convolutions, norms, activations), are single nodes.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from . import _C
from .chain import Chain, along, resolve
from .folding import Folding, has_hooks
from .unchanged import changes_nothing


def is_atom(module: nn.Module) -> bool:
    if isinstance(module, (Folding, torch.jit.ScriptModule)) or isinstance(module.__dict__.get("forward"), FusedForward):
        return True
    if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode by the flags alone, put back as they were."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags:
            m.training = flag


class _Tracer(fx.Tracer):
    """Traces ``root`` as a function of its first argument, the others at their defaults."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_leaf = is_leaf
        self.inlined: list[str] = [""]

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return self.is_leaf(module)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        code = root_fn.__code__
        if code.co_argcount < 2:
            raise TypeError("forward takes no argument")
        return root_fn, [self.root, self.create_proxy("placeholder", code.co_varnames[1], (), {})]

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(module)
        if not self.is_leaf(module):
            nodes, inlined = len(self.graph.nodes), len(self.inlined)
            self.inlined.append(name)
            try:
                with changes_nothing(module):
                    return super().call_module(module, forward, args, kwargs)
            except Exception:  # what can't be traced, or more than computing: one node, then, and nothing of what it did so far
                for node in reversed(list(self.graph.nodes)[nodes:]):
                    self.graph.erase_node(node)
                del self.inlined[inlined:]
        return self.create_proxy("call_module", name, args, kwargs)


class Traced(NamedTuple):
    graph: fx.Graph
    inlined: list[str]  # the modules whose own forward the graph replaces


def trace(module: nn.Module, training: bool = False, is_leaf: Callable[[nn.Module], bool] = is_atom) -> Traced:
    """The graph in eval or training mode.

    Raises:
        Changed: forward does more than compute; else what forward raises on a symbolic tensor.
    """
    tracer = _Tracer(is_leaf)
    with in_mode(module, training), changes_nothing(module):
        graph = tracer.trace(module)
    return Traced(graph, tracer.inlined)


class _Compiled:
    """A traced graph as a function of its owner, and where it stands for the owner's modules."""

    def __init__(self, owner: nn.Module, traced: Traced) -> None:
        code = traced.graph.python_code("self")
        self.name = type(owner).__name__
        self.inlined = [tuple(name.split(".")) if name else () for name in traced.inlined]
        self.types = [type(resolve(owner, path)) for path in self.inlined]
        calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        self.chains = [tuple(name.split(".")) for name in calls if isinstance(owner.get_submodule(name), Chain)]
        self.source, self.globals = code.src, code.globals
        self.function = self._compile()

    def _compile(self) -> Callable[[nn.Module, Tensor], Any]:
        names = dict(self.globals)
        exec(compile(self.source, f"<fused forward of {self.name}>", "exec"), names)
        return names["forward"]

    def looks_at(self, owner: nn.Module) -> list[nn.Module]:
        """The modules on which `applies` depends."""
        return along(owner, [*self.inlined, *(path[:-1] for path in self.chains)])

    def applies(self, owner: nn.Module, training: bool) -> bool:
        for path, kind in zip(self.inlined, self.types, strict=True):
            module = resolve(owner, path)
            if module.training is not training or type(module) is not kind or (path and has_hooks(module)):
                return False
        # A chain is gone where the convolution that holds it was replaced.
        return all(path[-1] in resolve(owner, path[:-1])._modules for path in self.chains)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("function", "globals")}
        modules = {name: value.__name__ for name, value in self.globals.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.globals.items() if name not in modules and name != "__builtins__"}
        return {**state, "_modules": modules, "_others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules, others = state.pop("_modules"), state.pop("_others")
        self.__dict__.update(state)
        self.globals = {**others, **{name: importlib.import_module(module) for name, module in modules.items()}}
        self.function = self._compile()


class FusedForward:
    """In the place of ``owner.forward``: the traced graph with its chains fused, where that is the same thing.

    It is not with hooks on what was traced through, with parts replaced by others, with some of the modules in training mode and
    some not, or with more than one argument; then the class's own forward runs, as before conversion.

    in_training: the graph in training mode; None where the class's own forward is to run.
    """

    def __init__(self, owner: nn.Module, in_eval: Traced, in_training: Traced | None) -> None:
        self.owner = owner
        self.kept: dict[bool, tuple] = {}  # by training mode, what the modules were when the graph was found to apply
        self.modes = {
            training: None if traced is None else _Compiled(owner, traced)
            for training, traced in ((False, in_eval), (True, in_training))
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if len(args) == 1 and not kwargs:
            mode = self.modes[owner.training]
            if mode is not None and self._applies(mode):
                return mode.function(owner, args[0])
        return type(owner).forward(owner, *args, **kwargs)

    def _applies(self, mode: _Compiled) -> bool:
        owner = self.owner
        training = owner.training
        if torch.compiler.is_compiling():
            return mode.applies(owner, training)
        kept = self.kept.get(training)
        if kept is not None and _C.is_current(kept):
            return True
        applies = mode.applies(owner, training)
        if applies:
            self.kept[training] = _C.snapshot(mode.looks_at(owner), ())
        return applies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__, owner=copy.deepcopy(self.owner, memo), kept={})
        return new
