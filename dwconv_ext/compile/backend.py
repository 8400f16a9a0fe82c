"""The backend that torch.compile is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend

from . import graph as g
from .patterns import fuse
from .report import Refusal, Report, keep

OPTIONS = ("base", "freeze", "sequences")


def _has_subgraphs(module: fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in module.graph.nodes)


def _on_cuda(module: fx.GraphModule) -> bool:
    return any((t := g.tensor_of(node)) is not None and t.is_cuda for node in module.graph.nodes)


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """``torch.compile(model, backend="dwconv_ext")``.

    Args:
        options: ``base``: the backend that the rest of the graph is given, "eager", "aot_eager" or "inductor"; by default
            "inductor" on CUDA and "eager" on the CPU, where compiling takes seconds instead of minutes and the fused operations
            are most of the time. ``freeze``: True for weights that never change: folded and packed ones are made at the first
            call and never looked at again. It goes with the "eager" base alone. ``sequences``: False for fused layers that are
            each a call of their own, which profilers then see; by default those that follow each other are one.
        mode: inductor's ("reduce-overhead", ...); it makes inductor the base.

    Returns:
        The graph with fused operations, compiled by the base. ``last_report()`` says what was fused.

    Raises:
        ValueError: an unknown option, a base that is no backend's name, a freeze that is not True or False, or one with another
            base than "eager".

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
        >>> fast = torch.compile(model, backend="dwconv_ext", options={"freeze": True})
        >>> with torch.no_grad():
        ...     fast(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 4, 3, 3])
    """
    unknown = set(options or {}) - set(OPTIONS)
    if unknown:
        raise ValueError(f"backend: options must be among {', '.join(OPTIONS)}, but got {', '.join(sorted(unknown))}")
    frozen, sequences = ((options or {}).get(name, default) for name, default in (("freeze", False), ("sequences", True)))
    for name, value in (("freeze", frozen), ("sequences", sequences)):
        if not isinstance(value, bool):
            raise ValueError(f"backend: {name} must be True or False, but got {value!r}")
    base = (options or {}).get("base")
    if base is None:
        base = "inductor" if _on_cuda(module) or mode not in (None, "default") else "eager"
    elif not (isinstance(base, str) or callable(base)):
        raise ValueError(f"backend: base must be the name of a backend, such as eager, aot_eager or inductor, but got {base!r}")
    elif frozen and base != "eager":
        raise ValueError(f"backend: freeze goes with the base 'eager' alone, but got base {base!r}")
    if base == "eager" and _has_subgraphs(module):
        base = "aot_eager"  # a checkpoint's body runs twice, which only functional graphs survive
    report = Report(base)
    if frozen and base != "eager":
        report.refused.append(Refusal("freeze", f"weights are not frozen where the base is {base}", ""))
    fuse(module, packed=base == "eager", frozen=frozen, sequences=sequences, report=report)
    keep(report)
    if base == "inductor" and mode is not None:
        return lookup_backend(base)(module, example_inputs, config_patches=torch._inductor.list_mode_options(mode))
    return lookup_backend(base)(module, example_inputs)
