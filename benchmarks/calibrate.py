"""Writes csrc/cuda/plan/faster_in_torch.inc: for which layers torch's own convolution runs on a GPU without the tuner.

A layer is lost where torch takes less than 95 % of our time in the same layout and at least 5 us less: the op calls torch through
the dispatcher, which costs the host more than our kernel's launch does, and the replayed graphs that were timed do not show it.
A range reaches from a lost layer half-way to layers of half and of twice its batch, channels, height and width, a factor of
sqrt(2); dtype, layout, filter and stride are the layer's. A range that holds a measured layer which was not lost is left out.
The backward pass was timed as a whole, and its ranges hold where both gradients are wanted.

``--device cuda`` measures; ``--from`` reads figures that gpu-check, depthwise or separable have saved. Build anew afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from math import isqrt
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dwconv_ext import _C_cuda

from . import layer_suites
from .suites import LAYOUTS

TABLE = Path(__file__).parents[1] / "csrc/cuda/plan/faster_in_torch.inc"
CLEAR, LEAST_S = 0.95, 5e-6
OPS = {"depthwise": "Op::kDepthwise", "separable": "Op::kSeparable"}
PASSES = {"forward": "Pass::kForward", "backward": "Pass::kBackward"}
DTYPES = {"float32": "DType::kFloat32", "float16": "DType::kFloat16", "bfloat16": "DType::kBFloat16"}
LAYOUT_NAMES = {"NCHW": "Layout::kNCHW", "channels_last": "Layout::kNHWC"}
HEAD = "// Written by `python -m benchmarks calibrate` (benchmarks/calibrate.py); microseconds at the end: ours, torch's.\n"


class Measured(NamedTuple):
    """One pass of a layer in one layout; seconds."""

    arch: int
    kind: tuple[str, ...]  # op, pass, dtype, layout, kernel height and width, stride: as C++ has them
    sizes: tuple[int, ...]  # batch, channels, out_channels, height, width
    ours: float
    torch: float
    name: str

    @property
    def lost(self) -> bool:
        return self.torch < CLEAR * self.ours and self.ours - self.torch >= LEAST_S

    def near(self) -> list[tuple[int, int]]:
        """The range of each size around it: least and most within a factor of sqrt(2)."""
        return [(isqrt((n * n + 1) // 2 - 1) + 1, isqrt(2 * n * n)) for n in self.sizes]

    def row(self) -> str:
        spans = ", ".join(f"{{{least}, {most}}}" for least, most in self.near())
        times = f"{self.ours * 1e6:.1f}, {self.torch * 1e6:.1f}"
        return f"{{{self.arch}, {', '.join(self.kind)}, {spans}, {times}}},  // {self.name}"


class Unusable(Exception):
    """A file that has no figures of a GPU."""


def figures(saved: dict[str, Any]) -> list[Measured]:
    """Of one saved suite."""
    found = re.search(r"\(sm_(\d+)\)", saved.get("CUDA devices", ""))
    if found is None:
        raise Unusable(f"{saved['suite']}: not a GPU's figures")
    measured = []
    for result, layout in product(saved["results"], LAYOUTS):
        layer = result["layer"]
        kind = (OPS[saved["suite"]], PASSES[result["pass"]], DTYPES[saved["dtype"]], LAYOUT_NAMES[layout])
        kind += (*map(str, layer["kernel"]), str(layer["stride"]))
        sizes = (layer["batch"], layer["channels"], layer["out_channels"], *layer["size"])
        seconds = result["seconds"]
        ours, theirs = seconds[f"dwconv_ext {layout}"], seconds[f"nn.Conv2d {layout}"]
        measured.append(Measured(int(found[1]), kind, sizes, ours, theirs, layer["name"]))
    return measured


def ranges(measured: list[Measured]) -> list[Measured]:
    """The lost layers, but for those in whose range another was not."""

    def holds(lost: Measured, other: Measured) -> bool:
        same = (lost.arch, lost.kind) == (other.arch, other.kind)
        return same and all(least <= n <= most for (least, most), n in zip(lost.near(), other.sizes, strict=True))

    kept = [m for m in measured if m.lost]
    return sorted(m for m in kept if not any(holds(m, other) for other in measured if not other.lost))


def written(table: str, found: list[Measured], sources: dict[int, str]) -> str:
    """The table with the ranges of these architectures in the place of those it had. sources: of each, what measured it."""
    sections: dict[int, list[str]] = {}
    for line in table.splitlines():
        number = re.match(r"(?:// sm_|\{)(\d+)", line)
        if number:
            sections.setdefault(int(number[1]), []).append(line)
    for arch, source in sources.items():
        sections[arch] = [f"// sm_{arch}: {source}", *(m.row() for m in found if m.arch == arch)]
    return HEAD + "".join(f"{line}\n" for arch in sorted(sections) for line in sections[arch])


def suites_of(file: Path) -> list[dict[str, Any]]:
    """Of a file of gpu-check, or of one suite, whose name it has."""
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"{file}: {error}") from None
    if not isinstance(data, dict):
        raise Unusable(f"{file}: no saved figures")
    every = data.get("benchmarks", {file.stem: data})
    named = ({**suite, "suite": re.split("[-_]", name)[0]} for name, suite in every.items())
    return [suite for suite in named if suite["suite"] in OPS]


def measure(rounds: int, progress: Callable[[list], Iterable], half: ModuleType) -> list[dict[str, Any]]:
    """The suites on this machine's GPU, our kernels without what the table says now."""
    saved = []
    half.force_source("ours")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for what, dtype, batch in product(OPS, DTYPES, (1, 128)):
                options = argparse.Namespace(
                    what=what, device="cuda", dtype=dtype, threads=torch.get_num_threads(), layers="", batch=batch, rounds=rounds,
                    without="31x31" if batch > 1 else None,  # whose reference takes longer than all the rest
                    eager=False, tuned=False, no_compile=True, no_runtimes=True, save=Path(folder) / str(batch),
                )  # fmt: skip
                if layer_suites.run(options, getattr(torch, dtype), progress) == 0:
                    saved += suites_of(options.save / f"{what}-{dtype}.json")
    finally:
        half.force_source("heuristics")
    return saved


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    try:
        return _run(options, progress)
    except Unusable as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, progress: Callable[[list], Iterable]) -> int:
    if not options.to.parent.is_dir():
        raise Unusable(f"--to: there is no folder {options.to.parent}")
    if options.saved:
        saved = [suite for file in options.saved for suite in suites_of(file)]
    elif options.device == "cuda" and _C_cuda is not None:
        saved = measure(options.rounds, progress, _C_cuda)
    else:
        raise Unusable("give --device cuda, with the CUDA half built, or --from JSON")
    measured = [m for suite in saved for m in figures(suite)]
    if not measured:
        raise Unusable("no measured layers; nothing is written")
    sources = {}
    for suite in saved:
        for m in figures(suite)[:1]:
            sources[m.arch] = f"{suite['device']}, torch {suite['torch'].split(',')[0]}, commit {suite['commit']}"
    found = ranges(measured)
    table = options.to.read_text() if options.to.exists() else ""
    options.to.write_text(written(table, found, sources))
    print(f"{len(found)} ranges of {len(measured)} measured layers: {options.to}")
    return 0
