"""``python -m benchmarks {depthwise,separable,network}``: checks, then times, dwconv_ext against nn.Conv2d and other runtimes.

``models`` times whole models, converted against untouched; ``sweep`` times neighbouring sizes and growth; ``traffic`` counts what
the CUDA kernels move, without a card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch

from . import models, peers, report, sweep, traffic
from .layers import Layer, depthwise_layers, network_layers, separable_layers
from .roofline import Roofline
from .suites import LAYOUTS, Mismatch, Options, depthwise_race, network_race, separable_race
from .timing import Stopwatch, keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHAT = {
    "depthwise": (depthwise_layers, depthwise_race, "depthwise convolution: forward, and gradients of input and weight"),
    "separable": (separable_layers, separable_race, "depthwise - BatchNorm - ReLU - pointwise - BatchNorm - ReLU, eval mode"),
    "network": (network_layers, network_race, "MobileNetV1 at 224, every block a FusedDSConv, eval mode"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (_, _, text) in WHAT.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--dtype", choices=DTYPES, default="float32")
        command.add_argument(
            "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's, %(default)s)"
        )
        command.add_argument("--batch", type=int, help="in place of the layer list's batch sizes")
        command.add_argument("--layers", metavar="TEXT", default="", help="only layers whose name contains TEXT")
        command.add_argument("--without", metavar="TEXT", help="no layers whose name contains TEXT")
        command.add_argument("--rounds", type=int, default=7, help="bursts of each contender (default: %(default)s)")
        command.add_argument("--eager", action="store_true", help="on CUDA, time calls with their launches, not graphs of them")
        command.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes seconds a layer)")
        command.add_argument("--no-runtimes", action="store_true", help="leave ONNX Runtime and OpenVINO out")
        command.add_argument("--json", type=Path, metavar="FILE", help="write every figure, with the machine and the versions")
        command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
        command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios")
    command = commands.add_parser("traffic", help="bytes that the CUDA kernels move", description=traffic.__doc__)
    command.add_argument("--dtype", choices=DTYPES, default="float16")
    command.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    command.add_argument("--layers", metavar="TEXT", default="", help="only layers whose name contains TEXT")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    command = commands.add_parser("sweep", help="neighbouring sizes, and growth", description=sweep.__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, %(default)s")
    command.add_argument("--layers", metavar="TEXT", default="", help="only layers whose name contains TEXT")
    command.add_argument("--rounds", type=int, default=5, help="bursts of each size (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    command = commands.add_parser("models", help="whole models, each way", description=models.__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, %(default)s")
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    command.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NCHW"], help="default: NCHW")
    command.add_argument("--layers", metavar="TEXT", default="", help="only models whose name contains TEXT")
    command.add_argument("--rounds", type=int, default=5, help="bursts of each contender (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure, with the machine and the versions")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    command.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile by itself out (it takes a minute a model)"
    )
    options = parser.parse_args(arguments)
    if options.what == "traffic":
        return options
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("threads", "rounds", "batch", "batches"):
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                parser.error(f"--{name}: must be at least 1, got {value}")
    return options


def chosen_layers(what: str, options: argparse.Namespace) -> list[Layer]:
    layers = [layer for layer in WHAT[what][0]() if options.layers in layer.name]
    layers = [layer for layer in layers if not options.without or options.without not in layer.name]
    if not options.batch:
        return layers
    renamed = [layer._replace(name=layer.name.removesuffix(f"_b{layer.batch}"), batch=options.batch) for layer in layers]
    return list(dict.fromkeys(renamed))  # a layer listed at several batch sizes is one now


def progress(layers: list) -> Iterable:
    """The layers, with a bar on a terminal that has rich."""
    try:
        from rich.progress import track
    except ImportError:
        return layers
    return track(layers, "checking and timing", transient=True, disable=not sys.stderr.isatty())


def write(options: argparse.Namespace, title: str, facts: dict[str, str], groups: dict[str, list[report.Summary]]) -> None:
    if options.json:
        everything = [s for summaries in groups.values() for s in summaries]
        report.write_json(options.json, {**facts, "dtype": options.dtype, "threads": options.threads}, everything)
    if options.markdown:
        options.markdown.write_text("\n".join(report.markdown(f"{title}: {d}", s) for d, s in groups.items()))


def run(options: argparse.Namespace, title: str, facts: dict[str, str]) -> dict[str, list[report.Summary]]:
    """The summaries of each pass. What is done is written after each layer, so that a run cut short leaves it."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    dtype = DTYPES[options.dtype]
    watch = Stopwatch(options.device, options.threads, graphs=not options.eager)
    roofline = Roofline(watch, dtype)
    settings = Options(options.device, dtype, options.threads, not options.no_compile, not options.no_runtimes)
    layers = chosen_layers(options.what, options)
    groups: dict[str, list[report.Summary]] = {}
    # Graphs are captured on the stream on which the passes were made, and not on the default one.
    with torch.cuda.stream(torch.cuda.Stream()) if watch.graphs else nullcontext():
        for layer in progress(layers):
            for race in WHAT[options.what][1](layer, settings):
                race.times = watch.race(race.functions, options.rounds)
                groups.setdefault(race.direction, []).append(report.Summary(race, roofline))
            write(options, title, facts, groups)
    return groups


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.what == "traffic":
        lists = {"depthwise": depthwise_layers(), "separable": separable_layers((options.batch,))}
        layers = {
            kind: [layer._replace(batch=options.batch) for layer in listed if options.layers in layer.name]
            for kind, listed in lists.items()
        }
        return traffic.run(layers, DTYPES[options.dtype], options.json, options.markdown)
    if options.what == "sweep":
        return sweep.run(options, DTYPES[options.dtype], progress)
    if options.what == "models":
        if not models.models(options.layers):
            print(f"no model's name contains {options.layers!r}", file=sys.stderr)
            return 2
        try:
            return models.run(options, DTYPES[options.dtype], progress)
        except Mismatch as error:
            print(f"wrong result: {error}", file=sys.stderr)
            return 1
    if not chosen_layers(options.what, options):
        print(f"no layer's name contains {options.layers!r}", file=sys.stderr)
        return 2
    if not options.no_runtimes and options.device == "cpu" and peers.missing():
        print(f"left out, not installed: {', '.join(peers.missing())} (pip install 'dwconv_ext[bench]')", file=sys.stderr)
    facts = report.machine(options.device)
    title = f"{options.what}, {options.dtype}, {f'batch {options.batch}, ' if options.batch else ''}" + facts.get(
        "device", f"{facts['CPU']}, {options.threads} threads"
    )
    if options.device == "cuda":
        title += ", calls with their launches" if options.eager else ", replays of CUDA graphs"
    try:
        groups = run(options, title, facts)
    except Mismatch as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    for direction, summaries in groups.items():
        report.print_table(f"{title}: {direction}", summaries)
    print("results checked against float64 before timing; ms are medians of interleaved bursts; the ratios are what to read")
    if options.plot:
        report.plot(options.plot, title, groups)
    return 0


if __name__ == "__main__":
    sys.exit(main())
