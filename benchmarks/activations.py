"""``python -m benchmarks activations``: what an activation in a kernel's registers costs, and torch's as an operation of its own.

Ours is the time of a pointwise convolution with the activation less that of one without, per output element; torch's the time of
its function over the same output. Both stay in a core's L2. Results are checked against float64 before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from dwconv_ext._extension import _C
from dwconv_ext.nn.folded_layers import ConvSettings, FoldedConv
from dwconv_ext.ops.activations import ACTIVATIONS, SLOPE

from . import report
from .suites import Mismatch
from .timing import Stopwatch, keep_freed_memory

CHANNELS, OUTPUTS, SIDE = 64, 256, 28


def check(name: str, x: torch.Tensor, got: torch.Tensor) -> None:
    """x is what the convolution without an activation gives."""
    want = ACTIVATIONS[name].forward(x.double(), SLOPE, False)
    error = (got.double() - want).abs().max().item()
    if not error <= 4 * torch.finfo(x.dtype).eps * x.double().abs().max().item():
        raise Mismatch(f"{name}: largest error {error:.3g}")


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable) -> int:
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    watch = Stopwatch("cpu", options.threads)
    x = torch.randn(1, CHANNELS, SIDE, SIDE).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, none = (torch.randn(OUTPUTS, CHANNELS, 1, 1) / CHANNELS**0.5).to(dtype), (None,) * 5
    layers = {name: FoldedConv(ConvSettings(activation=name)) for name in _C.activations}
    with torch.no_grad():
        y = layers["identity"](x, (weight, *none))
        functions: dict[str, Callable[[], object]] = {}
        for name, layer in layers.items():
            if dtype == torch.float32:
                check(name, y, layer(x, (weight, *none)))
            functions[name] = lambda layer=layer: layer(x, (weight, *none))
            functions[f"torch {name}"] = lambda name=name: ACTIVATIONS[name].forward(y, SLOPE, False)
        seconds = watch.interleaved(functions, options.rounds)
    elements = y.numel() / options.threads / 1e9  # of a thread
    header = ["activation", "ns an element", "torch's"]
    cells = [
        [name, f"{(seconds[name] - seconds['identity']) / elements:.2f}", f"{seconds[f'torch {name}'] / elements:.2f}"]
        for name in layers
        if name != "identity"
    ]
    facts = report.machine("cpu")
    title = f"activations, {options.dtype}, {report.where(options, facts)}, a thread's time"
    report.print_rows(title, header, cells, last_is_bold=False)
    report.save(options, facts, {"title": title, "seconds": seconds}, [report.markdown_table(title, header, cells)])
    return 0
