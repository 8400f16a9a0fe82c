"""The pictures of saved results: ``python -m benchmarks plot benchmarks/results/<machine>/<suite>-<dtype>.json``.

``<suite>-<dtype>.png``: bars, each implementation's speed over the baseline (nn.Conv2d in NCHW for layers, the plain model for
whole models), on a logarithmic scale; "n/a" where it was not timed; in place of a hundred layers the geometric means of their
networks. ``<suite>-<dtype>-roofline.png``, of layers: what the better of our layouts reaches, in GFLOP/s, over FLOP per byte that
must be moved, and this machine's roof: what a matrix product reaches, and copy bandwidth, which depends on how much is copied.
Nothing is measured here. --save draws the same.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .suites import BASELINE, FLOAT32, ONE_CHANNEL, OURS, PRODUCT, TWO_OPS
from .timing import geometric_mean

COLOURS = {
    OURS[0]: "#c1440e",
    OURS[1]: "#e8833a",
    TWO_OPS[0]: "#8a2d06",
    TWO_OPS[1]: "#e5a48a",
    "backend": "#c1440e",
    "backend NCHW": "#8a2d06",
    "freeze": "#e5a48a",
    "convert": "#e8833a",
    "forward": "#c1440e",
    "step": "#c1440e",
    "backward": "#3b6ea5",
    "ONNX Runtime": "#3b6ea5",
    "OpenVINO": "#9cc0e4",
    "torch.compile channels_last": "#5f5f5f",
    "inductor": "#5f5f5f",
}
OTHER = "#a8a8a8"
MOST_NAMES = 50  # in a picture of layers
SAME = 1e-6  # relative difference of a figure that was computed twice


def draw(path: Path) -> list[Path]:
    """The pictures of one file, written beside it; none where it has no layers and no models."""
    saved = json.loads(path.read_text())
    if "benchmarks" in saved:  # of make gpu-check: several runs in one file
        runs = ((path.with_name(f"{name.replace('_', '-')}.json"), run) for name, run in saved["benchmarks"].items())
        return [picture for name, run in runs for picture in _draw(name, run)]
    return _draw(path, saved)


def _draw(path: Path, saved: dict) -> list[Path]:
    results = saved.get("results") or [{}]
    where = saved.get("device") or f"{saved.get('CPU')}, {saved.get('threads')} threads"
    title = saved.get("title") or f"{path.stem.replace('-', ', ')}, {where}"
    bars, roofline = path.with_suffix(".png"), path.with_name(f"{path.stem}-roofline.png")
    if "model" in results[0]:
        _bars(bars, f"{title}\nall in the layout that plain PyTorch is faster in", *_models(results), "speed, plain PyTorch = 1")
        return [bars]
    if "network" in results[0] and "seconds" in results[0]:
        _bars(bars, title, *_networks(results), "speed, eager channels_last = 1")
        return [bars]
    if "layer" in results[0]:
        _bars(bars, title, *_layers(results), f"speed, {BASELINE} = 1")
        _roofline(roofline, title, results)
        return [bars, roofline]
    return []


Panels = dict[str, dict[str, list[float]]]  # by panel and implementation, a speed-up for each name


def _layers(results: list[dict]) -> tuple[list[str], Panels]:
    by_panel: dict[str, dict[str, dict[str, float]]] = {}
    for r in results:
        batch = r["layer"]["batch"]
        name = r["layer"]["name"].removesuffix(f"_b{batch}")
        panel = r["pass"] if name == r["layer"]["name"] else f"{r['pass']}, batch {batch}"
        by_panel.setdefault(panel, {})[name] = r["seconds"]
    names = list(dict.fromkeys(name for seconds in by_panel.values() for name in seconds))
    panels: Panels = {}
    for panel, seconds in by_panel.items():
        implementations = dict.fromkeys([*OURS, *(c for s in seconds.values() for c in s)])
        rows = [seconds.get(name, {}) for name in names]
        panels[panel] = {
            implementation: [row.get(BASELINE, math.nan) / row.get(implementation, math.nan) for row in rows]
            for implementation in implementations
            if implementation not in (BASELINE, PRODUCT, ONE_CHANNEL) and not implementation.endswith(FLOAT32)
        }
    return _by_network(names, panels) if len(names) > MOST_NAMES else (names, panels)


def _by_network(names: list[str], panels: Panels) -> tuple[list[str], Panels]:
    """Means of pointwise layers, whose names begin with their networks'."""
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        for network in re.split(r"_\d+x\d+_", name)[0].split("+"):
            groups.setdefault(network, []).append(at)
    means = {
        panel: {way: [geometric_mean(ratios[at] for at in group) for group in groups.values()] for way, ratios in series.items()}
        for panel, series in panels.items()
    }
    return list(groups), means


def _models(results: list[dict]) -> tuple[list[str], Panels]:
    names = list(dict.fromkeys(r["model"] for r in results))
    ways = list(dict.fromkeys(way for r in results for way in r["seconds"] if way != "plain"))

    panels: Panels = {}
    for what, batch in dict.fromkeys((r["what"], r["batch"]) for r in results):
        rows = [row_of_model(results, name, what, batch) for name in names]
        panels[f"{what}, batch {batch}"] = {
            way: [row["ratios"].get(way, math.nan) if row else math.nan for row in rows] for way in ways
        }
    return names, panels


def row_of_model(results: list[dict], model: str, what: str, batch: int) -> dict | None:
    """Of a model's rows, one for each layout, the one in which plain PyTorch is faster: a round's ratio is of one layout."""
    rows = [r for r in results if (r["model"], r["what"], r["batch"]) == (model, what, batch)]
    return min(rows, key=lambda r: r["seconds"]["plain"], default=None)


def _networks(results: list[dict]) -> tuple[list[str], Panels]:
    names, base = list(dict.fromkeys(r["network"] for r in results)), "eager channels_last"
    panels: Panels = {}
    for batch in dict.fromkeys(r["batch"] for r in results):
        seconds = {r["network"]: r["seconds"] for r in results if r["batch"] == batch}
        ways = sorted(
            (way for way in next(iter(seconds.values())) if way not in (base, "eager")),
            key=lambda w: "backend" not in w and w != "freeze",
        )
        panels[f"batch {batch}"] = {
            way: [seconds[n][base] / seconds[n][way] if n in seconds else math.nan for n in names] for way in ways
        }
    return names, panels


def _bars(path: Path, title: str, names: list[str], panels: Panels, label: str) -> None:
    implementations = max(map(len, panels.values()))
    width = 1.8 + max(5.2, len(panels) * (4.4 if len(panels) < 3 else 2.6))
    height = 1.6 + len(names) * (0.15 + 0.08 * implementations)
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(width, height), squeeze=False, sharey=True, layout="constrained")
    for axis, (panel, series) in zip(axes[0], panels.items(), strict=True):
        thick = 0.84 / len(series)
        for i, (implementation, ratios) in enumerate(series.items()):
            places = [y - 0.42 + thick * (i + 0.5) for y in range(len(names))]
            colour = COLOURS.get(implementation, OTHER)
            axis.barh(places, [ratio - 1 for ratio in ratios], thick, left=1, label=implementation, color=colour)
            for name, place in enumerate(places):
                if math.isnan(ratios[name]):  # no bar would be read as 1
                    axis.annotate("n/a", (1, place), (3, 0), textcoords="offset points", va="center", fontsize=7, color="#555555")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        known = [ratio for ratios in series.values() for ratio in ratios if not math.isnan(ratio)]
        low, high = min(0.92, 0.9 * min(known)), max(1.1, 1.1 * max(known))
        axis.set_xlim(low, high)
        fine = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4) if high < 5 else (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        ticks = [tick for tick in fine if low < tick < high]
        axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.minorticks_off()
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda entry: len(entry[1]))
    _finish(figure, path, title, handles, labels, 3)


def _roofline(path: Path, title: str, results: list[dict]) -> None:
    """The roof is the results' own: a layer's least time is that of its operations, at a rate that is one for all layers, or that
    of its bytes, at a bandwidth that depends on their number. Files without "bandwidth" tell it of the layers that it limits."""
    from matplotlib import ticker

    figure, axis = _pyplot().subplots(figsize=(7.5, 5.2), layout="constrained")
    limits = [r["flops"] / r["roofline_seconds"] for r in results]
    ceiling = max(limits)
    limited_by_bytes = [limit < ceiling * (1 - SAME) for limit in limits]
    if not all("bandwidth" in r for r in results):
        bandwidths = [r["bytes"] / r["roofline_seconds"] for r, by in zip(results, limited_by_bytes, strict=True) if by]
    else:
        bandwidths = [r["bandwidth"] for r in results]
    x = [r["flops"] / r["bytes"] for r in results]
    left, right = min(x) / 1.6, max(x) * 1.6
    reached = [r["flops"] / min(r["seconds"][name] for name in OURS) for r in results]
    known = limited_by_bytes.count(False) > 1  # else the greatest limit may be one of bytes
    if bandwidths:
        low, high = min(bandwidths), max(bandwidths)
        grid = [left * (right / left) ** (i / 400) for i in range(401)]
        slopes = [[min(i * bandwidth, ceiling) / 1e9 for i in grid] for bandwidth in (low, high)]
        text = f"copy: {low / 1e9:.0f} to {high / 1e9:.0f} GB/s, by bytes copied"
        axis.fill_between(grid, *slopes, color="#d8d8d8", linewidth=0, label=text)
    if known:
        begin = ceiling / high if bandwidths else left
        text = f"matrix product: {ceiling / 1e9:.0f} GFLOP/s"
        axis.plot([begin, right], [ceiling / 1e9] * 2, color="#555555", linewidth=1.2, label=text)
    for direction in dict.fromkeys(r["pass"] for r in results):
        points = [(i, rate / 1e9) for i, rate, r in zip(x, reached, results, strict=True) if r["pass"] == direction]
        axis.scatter(*zip(*points, strict=True), 26, label=direction, color=COLOURS[direction], zorder=3, alpha=0.85)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    bottom, top = 0.7e-9 * min(reached), 1.4e-9 * max(ceiling, *reached)
    axis.set_ylim(bottom, top)
    for side, ratio in ((axis.xaxis, right / left), (axis.yaxis, top / bottom)):
        side.set_major_locator(ticker.LogLocator(10, (1, 2, 5) if ratio > 30 else (1, 1.5, 2, 3, 4, 5, 7)))
        side.set_major_formatter("{x:g}")
        side.set_minor_locator(ticker.NullLocator())
    axis.grid(color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("FLOP per byte (every operand moved once)")
    axis.set_ylabel("GFLOP/s")
    _finish(figure, path, f"{title}\neach layer in our better layout", *axis.get_legend_handles_labels(), 2)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure, path: Path, title: str, handles: list, labels: list[str], columns: int) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    for path in options.files:
        pictures = draw(path)
        if not pictures:
            print(f"{path} has no times of layers or models", file=sys.stderr)
            return 2
        print(*pictures, sep="\n")
    return 0
