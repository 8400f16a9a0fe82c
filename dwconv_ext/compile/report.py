"""What became of the convolutions of a compiled graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx


class Refusal(NamedTuple):
    """A convolution that was not fused, or fused with less than it could be; or ``freeze`` where it has no effect.

    Attributes:
        layer: the node's name in Dynamo's graph, or ``freeze``.
        why: what kept it from being fused, or the weights from being frozen.
        line: of the model's source, where Dynamo knows it, else the module's name.
    """

    layer: str
    why: str
    line: str


@dataclass
class Report:
    """Of one graph: what was fused, and what not, and why. Prints as a table.

    Attributes:
        base: the backend that the rest of the graph was given.
        fused: how many of each fused operation.
        refused: the convolutions that were not fused, or not wholly.
    """

    base: str = ""
    fused: Counter = field(default_factory=Counter)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, node: fx.Node, why: str) -> None:
        self.refused.append(Refusal(node.name, why, source_line(node)))

    def __str__(self) -> str:
        what = ", ".join(f"{n} {name}" for name, n in self.fused.most_common()) or "nothing fused"
        widths = [max((len(row[i]) for row in self.refused), default=0) for i in (0, 1)]
        rows = (f"{r.layer.ljust(widths[0])}  {r.why.ljust(widths[1])}  {r.line}".rstrip() for r in self.refused)
        return "\n".join([f"{what}; the rest by {self.base}", *rows])


def source_line(node: fx.Node) -> str:
    """The innermost line of the stack that Dynamo noted, as file:line: text; the module's name where it noted none."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().strip("^~ ")]
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].startswith("File "):
            parts = lines[at].split(", ")
            place = f"{parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix('line ')}"
            return f"{place}: {lines[at + 1]}" if at + 1 < len(lines) else place
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return "module " + modules[-1][0].split("]", 1)[-1].lstrip(".") if modules else ""  # L['fn'].features.0


_reports: list[Report] = []
_MOST = 1000  # a program that compiles for ever must not fill the memory


def keep(report: Report) -> None:
    _reports.append(report)
    del _reports[:-_MOST]


def reports() -> list[Report]:
    """Of each graph that was compiled in this process, in order. A model with graph breaks has several."""
    return list(_reports)


def last_report() -> Report | None:
    """Of the graph that was compiled last; None before the first."""
    return _reports[-1] if _reports else None
