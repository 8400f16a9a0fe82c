"""``python -m benchmarks network``: whole networks in inference against the runtimes that people serve them with.

All have the same weights and must agree with the plain model before they are timed. Ratios are medians of the rounds'.

    eager, eager channels_last   the model as it is
    inductor                     torch.compile(model) with freezing, in channels_last
    ONNX Runtime, OpenVINO       the model exported to ONNX
    convert                      dwconv_ext.convert(model, example_input=...), in channels_last
    backend, backend NCHW        torch.compile(model, backend="dwconv_ext"), in channels_last and in NCHW
    freeze                       dwconv_ext.compile.freeze of the exported model, in channels_last: weights and shapes never
                                 change, as in the runtimes

--profile: in place of the table, where our time goes in each network, operation by operation.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from dwconv_ext import convert
from dwconv_ext.compile import backend, freeze

from . import peers, plot, report
from .models import Model, agree, build, inference, models
from .roofline import Roofline
from .timing import Stopwatch, geometric_mean, keep_freed_memory

NETWORKS = (
    "mobilenetv1_100", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "shufflenet_v2_x1_0",
    "convnext_tiny",
)  # fmt: skip
OURS, PEERS = ("backend", "backend NCHW", "freeze"), ("ONNX Runtime", "OpenVINO", "inductor")
COLUMNS = ("eager", "eager channels_last", *PEERS, "convert", *OURS)


class Row(NamedTuple):
    network: str
    batch: int
    flops: float
    seconds: dict[str, float]  # by implementation
    ratios: dict[str, float]  # speed of our best way over each
    rate: float  # the machine's, operations a second


def known(name: str) -> Model:
    """The model of this name of benchmarks/models.txt, else torchvision's or timm's, for pictures of 224x224."""
    import timm
    import torchvision

    for model in models():
        if model.name == name:
            return model
    if name in torchvision.models.list_models():
        return Model("torchvision", name, 224)
    if timm.is_model(name):
        return Model("timm", name, 224)
    raise ValueError(f"neither torchvision nor timm has a model {name!r}")


def implementations(model: nn.Module, x: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    last = x.contiguous(memory_format=torch.channels_last)
    in_last = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def compiled(of: nn.Module, **how: Any) -> Callable:
        return torch.compile(copy.deepcopy(of), dynamic=False, **how)

    found = {"eager": inference(model, x), "eager channels_last": inference(in_last, last)}
    if not options.no_compile:
        found["inductor"] = inference(compiled(in_last), last)
    if not options.no_runtimes:  # which round float32 models themselves
        found.update(peers.runtimes(copy.deepcopy(model).float(), x.float(), options.threads, x.dtype))
    found["convert"] = inference(convert(in_last, example_input=last), last)
    found["backend"] = inference(compiled(in_last, backend="dwconv_ext"), last)
    found["backend NCHW"] = inference(compiled(model, backend="dwconv_ext"), x)
    found["freeze"] = inference(freeze(torch.export.export(in_last, (last,))), last)
    return found


def compare(name: Model, batch: int, options: argparse.Namespace, dtype: torch.dtype, watch: Stopwatch, rate: float) -> Row:
    torch._dynamo.reset()
    model = build(name).eval().requires_grad_(False).to(dtype)
    x = torch.randn(batch, 3, name.size, name.size).to(dtype)
    with FlopCounterMode(display=False) as counter:
        want = inference(model, x)()
    functions = implementations(model, x, options)
    for way, function in functions.items():
        with torch._inductor.config.patch(freezing=way == "inductor"):
            agree(name.name, way, torch.as_tensor(function()), want)
    times = watch.rounds(functions, options.rounds)
    ours = [min(together) for together in zip(*(times[way] for way in OURS), strict=True)]
    ratios = {way: median(t / mine for t, mine in zip(times[way], ours, strict=True)) for way in times}
    return Row(name.name, batch, counter.get_total_flops(), {way: median(t) for way, t in times.items()}, ratios, rate)


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    there = [way for way in COLUMNS if way in rows[0].seconds]
    header = ["network", "batch", *(f"{way} ms" for way in there), "over eager channels_last", "over the best peer", "roofline %"]

    def cells(row: Row) -> list[str]:
        ours = min(row.seconds[way] for way in OURS)
        share = 100 * row.flops / row.rate / ours
        times = (f"{1e3 * row.seconds[way]:.2f}" for way in there)
        return [row.network, str(row.batch), *times, *(f"{r:.2f}x" for r in summary(row)), f"{share:.0f}"]

    means = (f"{geometric_mean(each):.2f}x" for each in zip(*map(summary, rows), strict=True))
    return header, [*map(cells, rows), ["geometric mean", "", *("" for _ in there), *means, ""]]


def summary(row: Row) -> tuple[float, float]:
    """The speed of our best way over eager channels_last and over the best of the peers."""
    return row.ratios["eager channels_last"], min((row.ratios[p] for p in PEERS if p in row.ratios), default=float("nan"))


# --- where the time goes ---------------------------------------------------------------------------------------------------


class Timed(fx.Interpreter):
    """Runs the compiled graph an operation at a time, and notes each one's seconds, bytes and operations."""

    def __init__(self, module: fx.GraphModule, calls: int) -> None:
        super().__init__(module)
        self.calls, self.rows = calls, []

    def run_node(self, node: fx.Node) -> Any:
        if node.op not in ("call_function", "call_method"):
            return super().run_node(node)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(node)
        seconds = []
        for _ in range(self.calls):
            begin = time.perf_counter()
            super().run_node(node)
            seconds.append(time.perf_counter() - begin)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        tensors = [t for t in (*args, *kwargs.values(), result) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        shapes = ["x".join(map(str, t.shape)) for t in (tensors[0], result) if isinstance(t, Tensor)] if tensors else []
        self.rows.append((node, shapes, median(seconds), counter.get_total_flops(), moved))
        return result


def profile(name: Model, batch: int, options: argparse.Namespace, dtype: torch.dtype) -> tuple[list[str], list[list[str]]]:
    """Operation by operation; in-place ones run several times on one tensor, which changes no time."""
    kept: list[tuple[fx.GraphModule, Any]] = []

    def keeping(module: fx.GraphModule, inputs: list) -> Callable:
        kept.append((module, inputs))
        return backend(module, inputs, options={"sequences": False})

    torch._dynamo.reset()
    model = build(name).eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, name.size, name.size).to(dtype).contiguous(memory_format=torch.channels_last)
    inference(torch.compile(model, dynamic=False, backend=keeping), x)()
    with torch.no_grad():
        rows = []
        for module, inputs in kept:
            timed = Timed(module, calls=5 if batch > 1 else 15)
            timed.run(*inputs)
            rows += timed.rows
    total = sum(row[2] for row in rows)
    cells = [
        [getattr(node.target, "__name__", str(node.target)).removeprefix("dwconv_ext_"), " to ".join(shapes), f"{1e6 * s:.0f}",
         f"{100 * s / total:.1f}", f"{flops / s / 1e9:.0f}" if flops else "", f"{moved / s / 1e9:.0f}"]
        for node, shapes, s, flops, moved in rows
    ]  # fmt: skip
    header = ["operation", "input to output", "us", "%", "GFLOP/s", "GB/s"]
    return header, [*cells, ["sum", "", f"{1e6 * total:.0f}", "100", f"{sum(r[3] for r in rows) / total / 1e9:.0f}", ""]]


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable) -> int:
    try:
        chosen = [known(name) for name in options.names or NETWORKS]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    watch = Stopwatch("cpu", options.threads)
    facts = report.machine("cpu")
    title = f"networks, {options.dtype}, {report.where(options, facts)}"
    if options.profile:
        for model in chosen:
            for batch in options.batches:
                header, cells = profile(model, batch, options, dtype)
                report.print_rows(f"{model.name}, batch {batch}, {title}", header, cells, last_is_bold=True)
        return 0
    rate = Roofline(watch, dtype).flops
    rows: list[Row] = []
    for model in progress(chosen):
        for batch in options.batches:
            rows.append(compare(model, batch, options, dtype, watch, rate))
        header, cells = table(rows)
        saved = {"title": title, "results": [row._asdict() for row in rows]}
        report.save(options, facts, saved, [report.markdown_table(title, header, cells)])
    report.print_rows(title, header, cells, last_is_bold=True)
    if options.save is not None:
        plot.draw(report.path_of(options, facts, "json"))
    return 0
