"""``python -m benchmarks memory``: bytes that a whole network in inference takes, beside the runtimes that serve it. On Linux.

Each way has a fresh process of its own. A process's interpreter and libraries are not the network's, nor is what the first model
of any size brings with it: compilers' parts, threads, allocators' pools. So a tiny network goes the same way first and is let go,
the input is made, and what is resident then counts as nothing. Memory is what the system has given the process and nothing else
shares (anonymous pages, and pages of shared memory), not what an allocator says: after garbage collection and malloc_trim.

    held     after loading and some calls: weights, what is made of them, what is kept for the next call
    peak     the most during some more calls: the same with all that lies between layers
    loading  the most until the first results, which compile; in the JSON file, as is:
    left     after all is let go again; what a process keeps of its first network, and of others little more

    eager channels_last   the model as it is
    backend               torch.compile(model, backend="dwconv_ext"), in channels_last
    freeze                dwconv_ext.compile.freeze of a program that torch.export saved, in channels_last
    ONNX Runtime, OpenVINO   the model from its ONNX file

Ratios are of peaks. Files are written by a process of their own, runtimes have their default settings, and all must agree with
the plain model. Nothing is timed: on a busy machine figures are the same within a MB. Where the system chooses large pages itself
(transparent_hugepage "always") all ways have more.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dwconv_ext import clear_caches
from dwconv_ext.compile import freeze

from . import peers, report
from .models import agree, build, inference
from .network import NETWORKS, known
from .timing import geometric_mean

RUNTIMES = ("ONNX Runtime", "OpenVINO")
WAYS = ("eager channels_last", "backend", "freeze", *RUNTIMES)
CALLS = 5


class Bytes(NamedTuple):
    held: int
    peak: int
    loading: int
    left: int


class Row(NamedTuple):
    network: str
    batch: int
    weights: int  # bytes of the model's own
    bytes: dict[str, dict[str, int]]  # by way


def _kilobytes(file: str, *names: str) -> int:
    """The sum of these lines of a file of /proc/self, in bytes."""
    lines = (line.split() for line in Path("/proc/self", file).read_text().splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0].rstrip(":") in names)


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _kilobytes("smaps_rollup", "Pss_Anon", "Pss_Shmem")


def _peak_of(run: Callable[[], Any]) -> int:
    """How far the process grows beyond what it has, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before = _kilobytes("smaps_rollup", "Rss")
    run()
    return _kilobytes("status", "VmHWM") - before


def _tiny() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _models(network: str, batch: int) -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    model = known(network)
    torch.manual_seed(0)
    pictures = torch.randn(1, 3, 16, 16), torch.randn(batch, 3, model.size, model.size)
    return {"tiny": (_tiny, pictures[0]), "network": (lambda: build(model), pictures[1])}


def write(network: str, batch: int, folder: Path, runtimes: bool) -> int:
    """Both models as files, and the network's result; its bytes."""
    for name, (make, x) in _models(network, batch).items():
        model = make().eval().requires_grad_(False)
        torch.save(inference(model, x)(), folder / f"{name}.pt")
        if runtimes:
            (folder / f"{name}.onnx").write_bytes(peers.exported(model, x))
        model.to(memory_format=torch.channels_last)
        program = torch.export.export(model, (x.contiguous(memory_format=torch.channels_last),))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights in channels_last, which it keeps so
            torch.export.save(program, folder / f"{name}.pt2")
    return sum(t.nbytes for t in model.state_dict().values())


def load(way: str, make: Callable[[], nn.Module], x: Tensor, file: Path, threads: int) -> Callable[[], Any]:
    """A model as a function of nothing; file: its files' without their ending."""
    if way == "ONNX Runtime":
        return peers.onnx_runtime(x, f"{file}.onnx", threads)
    if way == "OpenVINO":
        return peers.openvino(x, f"{file}.onnx", threads, x.dtype)
    if way == "freeze":
        return inference(freeze(torch.export.load(f"{file}.pt2")), x)
    model = make().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return inference(torch.compile(model, dynamic=False, backend="dwconv_ext") if way == "backend" else model, x)


def measure(way: str, network: str, batch: int, folder: Path, threads: int) -> Bytes:
    """In a fresh process."""
    torch.set_num_threads(threads)
    run: Any = None

    def begin(name: str) -> None:
        nonlocal run
        run = load(way, models[name][0], models[name][1], folder / name, threads)
        calls()

    def calls() -> None:
        for _ in range(CALLS):
            run()

    def end() -> None:
        nonlocal run
        run = None
        torch._dynamo.reset()
        clear_caches()

    models = _models(network, batch)
    if way not in RUNTIMES:
        models = {name: (make, x.contiguous(memory_format=torch.channels_last)) for name, (make, x) in models.items()}
    begin("tiny")
    end()
    nothing = _resident()
    loading = _peak_of(lambda: begin("network"))
    held = _resident() - nothing
    peak = held + _peak_of(calls)
    result = torch.as_tensor(run()).clone()
    end()
    left = _resident() - nothing
    agree(network, way, result, torch.load(folder / "network.pt"))
    return Bytes(held, peak, loading, left)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(network: str, batch: int, options: argparse.Namespace) -> Row:
    there = () if options.no_runtimes or peers.missing() else RUNTIMES
    with TemporaryDirectory() as folder:
        weights = apart(write, network, batch, Path(folder), bool(there))
        ways = [way for way in WAYS if way in there or way not in RUNTIMES]
        found = {way: apart(measure, way, network, batch, Path(folder), options.threads)._asdict() for way in ways}
    return Row(network, batch, weights, found)


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    ways = list(rows[0].bytes)
    runtimes = [way for way in RUNTIMES if way in ways]
    header = ["network", "batch", "weights MB", *(f"{way} MB: held, peak" for way in ways)]
    header += [f"freeze over {way}" for way in runtimes]

    def ratios(row: Row) -> list[float]:
        """Of peaks."""
        return [row.bytes["freeze"]["peak"] / row.bytes[way]["peak"] for way in runtimes]

    def cells(row: Row) -> list[str]:
        each = (f"{row.bytes[way]['held'] / 1e6:.1f}, {row.bytes[way]['peak'] / 1e6:.1f}" for way in ways)
        return [row.network, str(row.batch), f"{row.weights / 1e6:.1f}", *each, *(f"{ratio:.2f}x" for ratio in ratios(row))]

    means = (f"{geometric_mean(each):.2f}x" for each in zip(*map(ratios, rows), strict=True))
    return header, [*map(cells, rows), ["geometric mean", "", "", *("" for _ in ways), *means]]


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable) -> int:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        print("memory: it is read from Linux's /proc, with glibc's allocator; this system has another", file=sys.stderr)
        return 2
    names = options.names or NETWORKS
    try:
        for name in names:
            known(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    facts = report.machine("cpu")
    title = f"memory of networks, {options.dtype}, {report.where(options, facts)}"
    rows: list[Row] = []
    for name in progress(names):
        for batch in options.batches:
            rows.append(compare(name, batch, options))
        header, cells = table(rows)
        saved = {"title": title, "results": [row._asdict() for row in rows]}
        report.save(options, facts, saved, [report.markdown_table(title, header, cells)])
    report.print_rows(title, header, cells, last_is_bold=True)
    return 0
