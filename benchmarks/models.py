"""``python -m benchmarks models``: whole models as they are, compiled by torch, converted, and compiled by this package.

Inference is eval mode without gradients; a training step is forward, backward and SGD on a cross-entropy. All ways have the same
weights, and must agree with the plain model before they are timed. Ratios are medians of the rounds' ratios over plain.

    plain             the model
    inductor          torch.compile(model), in inference with freezing
    convert           dwconv_ext.convert(model, example_input=...)
    backend           torch.compile(model, backend="dwconv_ext")
    backend+inductor  the same with inductor for the rest, options={"base": "inductor"}

--no-compile leaves out what needs inductor: it takes a minute a model. --amp: models of float32 under torch.autocast in training.
On CUDA with the most memory that a call takes, over plain's.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwconv_ext import convert

from . import plot, report
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


def inference(model: Callable, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def training_step(model: Callable, x: Tensor, parameters: list[Tensor], amp: torch.dtype | None = None) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> Tensor:
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            output = model(x)
        loss = nn.functional.cross_entropy(output.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return run


AMP = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PASSES = ("inference", "training step")
WAYS = ("plain", "inductor", "convert", "backend", "backend+inductor")
BY_INDUCTOR = ("inductor", "backend+inductor")


class Row(NamedTuple):
    model: str
    batch: int
    what: str
    layout: str
    seconds: dict[str, float]  # by way
    ratios: dict[str, float]  # over plain
    first_call: dict[str, float]  # seconds of what compiles
    memory: dict[str, float]  # on CUDA, the peak over plain's


def ways(model: nn.Module, x: Tensor, compile: bool) -> dict[str, tuple[Callable, nn.Module]]:
    """Each way's callable, and the module whose parameters it has."""
    of = {way: copy.deepcopy(model) for way in WAYS if compile or way not in BY_INDUCTOR}
    called: dict[str, Callable] = dict(of)
    if compile:
        called["inductor"] = torch.compile(of["inductor"], dynamic=False)
        on = {"base": "inductor"}
        called["backend+inductor"] = torch.compile(of["backend+inductor"], dynamic=False, backend="dwconv_ext", options=on)
    called["convert"] = convert(of["convert"], inplace=True, example_input=x)
    called["backend"] = torch.compile(of["backend"], dynamic=False, backend="dwconv_ext")
    return {way: (called[way], of[way]) for way in called}


def compare(model: Model, options: argparse.Namespace, dtype: torch.dtype, watch: Stopwatch) -> Iterator[Row]:
    amp = None if options.amp is None else AMP[options.amp]
    built = build(model).to(options.device, dtype)
    for batch in options.batches:
        for layout in options.layouts:
            x = torch.randn(batch, 3, model.size, model.size).to(options.device, dtype)
            x = x.contiguous(memory_format=LAYOUTS[layout])
            for what in options.passes:
                torch._dynamo.reset()
                training = what == "training step"
                plain = built.to(memory_format=LAYOUTS[layout]).train(training)
                functions, first = {}, {}
                for way, (call, module) in ways(plain, x, not options.no_compile).items():
                    parameters = list(module.parameters())
                    functions[way] = training_step(call, x, parameters, amp) if training else inference(call, x)
                try:
                    functions["plain"]()
                except ValueError as error:  # a BatchNorm after the pooling has one value a channel at batch 1
                    print(f"{model.name}, batch {batch}, {what}: left out, torch says: {error}", file=sys.stderr)
                    continue
                for way, function in functions.items():
                    begin = time.perf_counter()
                    with torch._inductor.config.patch(freezing=way == "inductor" and not training):
                        got = function()
                    if way not in ("plain", "convert"):
                        first[way] = time.perf_counter() - begin
                    if not training:
                        agree(model.name, way, got, functions["plain"]())
                peaks = {way: peak(function) for way, function in functions.items()} if x.is_cuda else {}
                memory = {way: bytes / peaks["plain"] for way, bytes in peaks.items()}
                times = watch.rounds(functions, options.rounds)
                ratios = {w: median(p / t for p, t in zip(times["plain"], times[w], strict=True)) for w in functions}
                yield Row(model.name, batch, what, layout, {w: median(times[w]) for w in functions}, ratios, first, memory)


def peak(function: Callable[[], object]) -> int:
    """The most bytes that a call takes besides what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def agree(model: str, way: str, got: Tensor, want: Tensor) -> None:
    limit = 1e-3 if want.dtype == torch.float32 else 0.1
    error = (got.float() - want.float()).abs().max()
    if not error <= limit * want.float().abs().max():
        raise Mismatch(f"{model}, {way}: the largest error is {error:.3g}")


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    there = [way for way in WAYS if any(way in r.seconds for r in rows)]
    fast = [way for way in there if way != "plain"]
    compiled = [way for way in there if way not in ("plain", "convert")]
    measured = [way for way in fast if any(way in r.memory for r in rows)]
    rest = [*(f"{way}'s first call, s" for way in compiled), *(f"{way}'s peak memory" for way in measured)]
    header = ["model", "batch", "pass", "layout", "plain ms", *fast, *rest]
    cells = [
        [r.model, str(r.batch), r.what, r.layout, f"{1e3 * r.seconds['plain']:.1f}", *(f"{r.ratios[w]:.2f}x" for w in fast),
         *(f"{r.first_call[w]:.1f}" for w in compiled), *(f"{r.memory[w]:.2f}x" for w in measured)]
        for r in rows
    ]  # fmt: skip
    for layout in dict.fromkeys(r.layout for r in rows):
        for what in PASSES:
            chosen = [r for r in rows if (r.what, r.layout) == (what, layout)]
            if chosen:
                means = (geometric_mean([r.ratios[w] for r in chosen]) for w in fast)
                cells.append(["geometric mean", "", what, layout, "", *(f"{mean:.2f}x" for mean in means), *("" for _ in rest)])
    return header, cells


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable) -> int:
    chosen = models(options.layers)
    if not chosen:
        print(f"no model's name contains {options.layers!r}", file=sys.stderr)
        return 2
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    watch = Stopwatch(options.device, options.threads)
    facts = report.machine(options.device)
    amp = f", autocast to {options.amp} in training" if options.amp else ""
    title = f"models, {options.dtype}{amp}, {report.where(options, facts)}"
    results: list[Row] = []
    for model in progress(chosen):
        results += compare(model, options, dtype, watch)
        header, cells = table(results)
        markdown = report.markdown_table(title, header, cells)
        report.save(options, facts, {"title": title, "results": [row._asdict() for row in results]}, [markdown])
    report.print_rows(title, header, cells, last_is_bold=True)
    if options.save is not None:
        plot.draw(report.path_of(options, facts, "json"))
    return 0
