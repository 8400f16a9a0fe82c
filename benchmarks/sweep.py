"""``python -m benchmarks sweep``: the time an output element costs at neighbouring sizes, and as N, C and H grow.

A kernel that is tuned to the sizes of a list shows it at one row, one column or one channel more: each layer of the lists is
timed beside its neighbours, in turn, and the neighbours' time per output element is given as a multiple of the layer's own. (A
block's is taken per input channel too.) Growth takes one 3x3 layer and varies one of its sizes over a 16-fold range; between the
levels of the cache the time per element should be flat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from dwconv_ext import FusedDSConv, depthwise_conv2d

from . import report
from .layers import Layer, depthwise_layers, separable_layers
from .suites import LAYOUTS
from .timing import Stopwatch, keep_freed_memory

GROWN = Layer("growth", 4, 64, 64, (28, 28), (3, 3), 1)


@dataclass
class Point:
    kind: str  # depthwise or separable
    layer: str
    layout: str
    change: str
    ns: float  # per output element
    ratio: float  # over the layer itself
    megabytes: float  # input and output


def neighbours(layer: Layer) -> dict[str, Layer]:
    """The layer, and one with another height, width and number of channels each."""
    (h, w), c, o = layer.size, layer.channels, layer.out_channels
    changed = {
        "itself": layer,
        "H-1": layer._replace(size=(h - 1, w - 1)),
        "H+1": layer._replace(size=(h + 1, w + 1)),
        "C+1": layer._replace(channels=c + 1, out_channels=o + 1),
        "C+16": layer._replace(channels=c + 16, out_channels=o + 16),
    }
    if min(c, o) > 16:
        changed["C-16"] = layer._replace(channels=c - 16, out_channels=o - 16)
    return changed


def grown(layer: Layer) -> dict[str, Layer]:
    """N, C and H each over a 16-fold range, from a fourth of the layer's size to four times."""
    changed = {"itself": layer}
    for factor in (0.25, 0.5, 2, 4):
        text = f"*{factor:g}" if factor > 1 else f"/{1 / factor:g}"
        side = round(layer.size[0] * factor)
        changed[f"N{text}"] = layer._replace(batch=round(layer.batch * factor))
        changed[f"C{text}"] = layer._replace(
            channels=round(layer.channels * factor), out_channels=round(layer.out_channels * factor)
        )
        changed[f"H{text}"] = layer._replace(size=(side, side))
    return changed


def _forward(kind: str, layer: Layer, layout: str, options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(layer.batch, layer.channels, *layer.size, dtype=dtype, device=options.device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    if kind == "separable":
        block = FusedDSConv(layer.channels, layer.out_channels, layer.kernel, layer.stride, layer.padding)
        block = block.eval().requires_grad_(False).to(options.device, dtype)
        return lambda: block(x)
    w = torch.randn(layer.channels, 1, *layer.kernel, dtype=dtype, device=options.device)
    return lambda: depthwise_conv2d(x, w, None, layer.stride, layer.padding)


def measure(
    kind: str, variants: dict[str, Layer], options: argparse.Namespace, dtype: torch.dtype, watch: Stopwatch
) -> list[Point]:
    itself = variants["itself"]
    outputs, moved, work = {}, {}, {}
    for change, layer in variants.items():
        outputs[change] = layer.batch * layer.out_size[0] * layer.out_size[1] * layer.out_channels
        size = layer.batch * layer.channels * layer.size[0] * layer.size[1] + outputs[change]
        moved[change] = size * torch.empty((), dtype=dtype).element_size() / 1e6
        # A fused block's work an output element grows with its input channels.
        work[change] = outputs[change] * (1.0 if kind == "depthwise" else layer.channels / itself.channels)
    points = []
    for layout in LAYOUTS:
        with torch.no_grad():
            functions = {change: _forward(kind, layer, layout, options, dtype) for change, layer in variants.items()}
            seconds = watch.interleaved(functions, options.rounds)
        own = seconds["itself"] / work["itself"]
        for change, time in seconds.items():
            ns, ratio = time / outputs[change] * 1e9, time / work[change] / own
            points.append(Point(kind, itself.name, layout, change, ns, ratio, moved[change]))
    return points


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    watch = Stopwatch(options.device, options.threads, graphs=True)
    layers = [("depthwise", layer) for layer in depthwise_layers()] + [("separable", layer) for layer in separable_layers((8,))]
    chosen = [(kind, layer) for kind, layer in layers if options.layers in layer.name]
    if not chosen:
        print(f"no layer's name contains {options.layers!r}", file=sys.stderr)
        return 2
    points = [p for kind, layer in progress(chosen) for p in measure(kind, neighbours(layer), options, dtype, watch)]
    growth = [p for kind in ("depthwise", "separable") for p in measure(kind, grown(GROWN), options, dtype, watch)]
    facts = report.machine(options.device)
    title = f"sweep, {options.dtype}, {report.where(options, facts)}"
    parts = []
    for what, rows in (("neighbours", points), ("growth", growth)):
        changes = list(dict.fromkeys(p.change for p in rows if p.change != "itself"))
        header = ["layer", "layout", "ns an element", *changes]
        cells = []
        for own in (p for p in rows if p.change == "itself"):
            same = {p.change: p for p in rows if (p.kind, p.layer, p.layout) == (own.kind, own.layer, own.layout)}
            name = f"{own.kind} {own.layer}" if what == "growth" else own.layer
            ratios = [f"{same[change].ratio:.2f}" if change in same else "" for change in changes]
            cells.append([name, own.layout, f"{own.ns:.4f}", *ratios])
        if cells:
            report.print_rows(f"{title}: {what}, times the layer's own time per element", header, cells, last_is_bold=False)
            parts.append(report.markdown_table(f"{title}: {what}", header, cells))
    report.save(options, facts, {"points": [asdict(p) for p in points + growth]}, parts)
    return 0
