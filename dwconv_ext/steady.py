"""The data flow of a module where training mode does not change it: what may stand for its forward while it is trained.

Training code does more than compute: it draws random numbers, counts steps, updates buffers, and is steered by attributes that a
schedule sets. None of that may be frozen into a graph. A module is steady if it is traced (which changes nothing) to the same
graph in both modes; the children that are not (stochastic depth, say) stay calls of themselves in it.
"""

from __future__ import annotations

from torch import fx, nn

from .trace import Traced, is_atom, trace


def _text(graph: fx.Graph) -> list[tuple]:
    return [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


class Steadiness:
    """Which modules are steady, looked up once each."""

    def __init__(self) -> None:
        self.verdicts: dict[nn.Module, bool] = {}

    def trace(self, module: nn.Module) -> Traced | None:
        """The graph in both modes; None where there is no such."""
        for child in module.children():  # first: no trace within a trace
            self.is_steady(child)
        modes = []
        try:
            for training in (False, True):
                modes.append(trace(module, training, lambda m: is_atom(m) or not self.is_steady(m)))
        except Exception:
            return None
        in_eval, in_training = modes
        same = _text(in_eval.graph) == _text(in_training.graph) and in_eval.inlined == in_training.inlined
        return in_training if same else None

    def is_steady(self, module: nn.Module) -> bool:
        if module not in self.verdicts:
            self.verdicts[module] = not is_atom(module) and self.trace(module) is not None
        return self.verdicts[module]
