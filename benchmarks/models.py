"""``python -m benchmarks models``: whole models, converted by ``dwconv_ext.convert`` against untouched.

Inference is eval mode without gradients; a training step is forward, backward and SGD on a cross-entropy. Both models have the
same weights, and must agree before they are timed. The ratio is the median of the rounds' ratios. Conversion is given the input,
so that it leaves alone what it finds slower.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwconv_ext import convert

from . import report
from .layers import rows
from .suites import LAYOUTS, Mismatch
from .timing import Stopwatch, geometric_mean, keep_freed_memory


class Model(NamedTuple):
    package: str
    name: str
    size: int


def models(containing: str = "") -> list[Model]:
    return [Model(package, name, int(size)) for package, name, size in rows("models.txt") if containing in name]


def build(model: Model) -> nn.Module:
    torch.manual_seed(0)
    if model.package == "torchvision":
        import torchvision

        return torchvision.models.get_model(model.name, weights=None)
    import timm

    return timm.create_model(model.name, pretrained=False)


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model = model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> Tensor:
        loss = nn.functional.cross_entropy(model(x).float(), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return run


PASSES = {"inference": inference, "training step": training_step}


class Row(NamedTuple):
    model: str
    batch: int
    what: str
    layout: str
    untouched: float  # seconds
    converted: float
    fused: int  # blocks
    replaced: int  # depthwise convolutions outside of blocks
    ratio: float  # the median over rounds, each of which times both within the same seconds


def race(model: Model, options: argparse.Namespace, dtype: torch.dtype, watch: Stopwatch) -> Iterator[Row]:
    plain = build(model).eval().to(options.device, dtype)
    for batch in options.batches:
        for layout in options.layouts:
            x = torch.randn(batch, 3, model.size, model.size).to(options.device, dtype)
            x = x.contiguous(memory_format=LAYOUTS[layout])
            untouched = copy.deepcopy(plain).to(memory_format=LAYOUTS[layout])
            converted = convert(copy.deepcopy(untouched), example_input=x)
            want, got = inference(untouched, x)().float(), inference(converted, x)().float()
            limit = 1e-3 if dtype == torch.float32 else 0.1
            if not (got - want).abs().max() <= limit * want.abs().max():
                raise Mismatch(f"{model.name}: the converted model's largest error is {(got - want).abs().max():.3g}")
            counts = converted.conversion_report
            for what, make in PASSES.items():
                functions = {"untouched": make(untouched, x), "converted": make(converted, x)}
                try:
                    functions["untouched"]()
                except ValueError as error:  # a BatchNorm after the pooling has one value a channel at batch 1
                    print(f"{model.name}, batch {batch}, {what}: left out, torch says: {error}", file=sys.stderr)
                    continue
                times = watch.rounds(functions, options.rounds)
                ratios = [u / c for u, c in zip(times["untouched"], times["converted"], strict=True)]
                yield Row(
                    model.name, batch, what, layout, median(times["untouched"]), median(times["converted"]),
                    counts.count("FusedDSConv"), counts.count("DepthwiseConv2d"), median(ratios),
                )  # fmt: skip


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = [
        "model",
        "batch",
        "pass",
        "layout",
        "fused blocks",
        "others",
        "untouched ms",
        "converted ms",
        "converted vs untouched",
    ]
    cells = [
        [r.model, str(r.batch), r.what, r.layout, str(r.fused), str(r.replaced), f"{1e3 * r.untouched:.1f}",
         f"{1e3 * r.converted:.1f}", f"{r.ratio:.2f}x"]
        for r in rows
    ]  # fmt: skip
    for layout in dict.fromkeys(r.layout for r in rows):
        for what in PASSES:
            ratios = [r.ratio for r in rows if (r.what, r.layout) == (what, layout)]
            if ratios:
                cells.append(["geometric mean", "", what, layout, "", "", "", "", f"{geometric_mean(ratios):.2f}x"])
    return header, cells


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable) -> int:
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    watch = Stopwatch(options.device, options.threads)
    results = [row for model in progress(models(options.layers)) for row in race(model, options, dtype, watch)]
    facts = report.machine(options.device)
    title = f"models, {options.dtype}, {facts.get('device', facts['CPU'])}, {options.threads} threads"
    header, cells = table(results)
    report.print_rows(title, header, cells, last_is_bold=True)
    if options.json:
        figures = [row._asdict() for row in results]
        facts = {**facts, "dtype": options.dtype, "threads": options.threads}
        options.json.write_text(json.dumps({**facts, "results": figures}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown_table(title, header, cells))
    return 0
