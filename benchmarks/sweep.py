"""``python -m benchmarks sweep``: the time a multiply-add costs at neighbouring sizes, and as N, C and H grow.

A kernel that is tuned to the sizes of a list shows it at one row, one column or one channel more: each layer of the lists is
timed beside its neighbours, in turn, and the neighbours' time per multiply-add is given as a multiple of the layer's own. Growth
takes one layer of each kind and varies one of its sizes over a 16-fold range; between the levels of the cache the time should be
flat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import ceil

import torch

from dwconv_ext import depthwise_conv2d

from . import report
from .layers import Layer, depthwise_layers, inverted_layers, pointwise_layers, separable_layers
from .suites import LAYOUTS, module_of
from .timing import Stopwatch, keep_freed_memory

PICTURES = (192, 208, 256, 320)  # in place of the lists' 224
GROWN = Layer("growth", 4, 64, 64, (28, 28), (3, 3), 1)
OF_KINDS = (
    {},
    {"kind": "separable"},
    {"kind": "pointwise", "kernel": (1, 1), "activation": "relu6"},
    {"kind": "inverted", "expand": 6},
)
NEAR = 1.25


@dataclass
class Point:
    kind: str  # the layer's
    layer: str
    layout: str
    change: str
    ns: float  # per output element
    ratio: float  # of the time per multiply-add over the layer's own
    megabytes: float  # input, output and weights


def neighbours(layer: Layer) -> dict[str, Layer]:
    """The layer, and those of another height and width or number of channels, each once."""
    (h, w), c, o = layer.size, layer.channels, layer.out_channels
    changed = {
        "itself": layer,
        "H-1": layer._replace(size=(h - 1, w - 1)),
        "H+1": layer._replace(size=(h + 1, w + 1)),
        "C+1": layer._replace(channels=c + 1, out_channels=o + 1),
        "C+8": layer._replace(channels=c + 8, out_channels=o + 8),
    }
    if min(c, o) > 8:
        changed["C-8"] = layer._replace(channels=c - 8, out_channels=o - 8)
    for side in PICTURES:
        changed[f"at {side}"] = layer._replace(size=(ceil(h * side / 224), ceil(w * side / 224)))
    once: dict[Layer, str] = {}
    for change, other in changed.items():
        once.setdefault(other, change)
    return {change: other for other, change in once.items()}


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


def listed() -> list[Layer]:
    """Of the pointwise layers every eighth, of the blocks that MobileNetV2 repeats the first."""
    blocks = list({layer._replace(name=""): layer for layer in reversed(inverted_layers((8,)))}.values())
    return [*depthwise_layers(), *separable_layers((8,)), *pointwise_layers((8,))[::8], *reversed(blocks)]


def _forward(layer: Layer, layout: str, options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(layer.batch, layer.channels, *layer.size, dtype=dtype, device=options.device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    if layer.kind != "depthwise":
        module = module_of(layer).to(options.device, dtype)
        return lambda: module(x)
    w = torch.randn(layer.channels, 1, *layer.kernel, dtype=dtype, device=options.device)
    return lambda: depthwise_conv2d(x, w, None, layer.stride, layer.padding)


def measure(variants: dict[str, Layer], options: argparse.Namespace, dtype: torch.dtype, watch: Stopwatch) -> list[Point]:
    itself, points = variants["itself"], []
    for layout in LAYOUTS:
        with torch.no_grad():
            functions = {change: _forward(layer, layout, options, dtype) for change, layer in variants.items()}
            seconds = watch.interleaved(functions, options.rounds)
        own = seconds["itself"] / itself.flops
        for change, time in seconds.items():
            layer = variants[change]
            ns, ratio = time / layer.outputs * 1e9, time / layer.flops / own
            megabytes = layer.elements * dtype.itemsize / 1e6
            points.append(Point(layer.kind, layer.name, layout, change, ns, ratio, megabytes))
    return points


def summary(points: list[Point]) -> tuple[list[str], list[list[str]]]:
    """Of each kind, how many neighbours cost no more than NEAR times their layer, and the one that costs most."""
    cells = []
    for kind in dict.fromkeys(p.kind for p in points):
        others = [p for p in points if p.kind == kind and p.change != "itself"]
        worst = max(others, key=lambda p: p.ratio)
        near = sum(p.ratio <= NEAR for p in others)
        cells.append([kind, f"{near} of {len(others)}", f"{worst.ratio:.2f}", f"{worst.layer} {worst.layout} {worst.change}"])
    return ["kind", f"within {NEAR}x", "worst", "which"], cells


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    watch = Stopwatch(options.device, options.threads, graphs=True)
    chosen = [layer for layer in listed() if options.layers in layer.name]
    if not chosen:
        print(f"no layer's name contains {options.layers!r}", file=sys.stderr)
        return 2
    points = [p for layer in progress(chosen) for p in measure(neighbours(layer), options, dtype, watch)]
    growth = [p for kind in OF_KINDS for p in measure(grown(GROWN._replace(**kind)), options, dtype, watch)]
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
            report.print_rows(f"{title}: {what}, times the layer's own time per multiply-add", header, cells, last_is_bold=False)
            parts.append(report.markdown_table(f"{title}: {what}", header, cells))
    header, cells = summary(points)
    report.print_rows(f"{title}: neighbours within {NEAR}x", header, cells, last_is_bold=False)
    parts.append(report.markdown_table(f"{title}: neighbours within {NEAR}x", header, cells))
    report.save(options, facts, {"points": [asdict(p) for p in points + growth]}, parts)
    return 0
