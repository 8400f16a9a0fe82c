"""``python -m benchmarks SUITE``: checks results, then times dwconv_ext against nn.Conv2d, torch.compile and other runtimes.

What is compared is checked against float64 first, and implementations are interleaved: read the ratios. ``--save`` keeps the
figures, with machine, versions and commit, as ``benchmarks/results/<machine>/<suite>-<dtype>.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import activations, calibrate, layer_suites, memory, models, network, plot, sweep, traffic
from .suites import LAYOUTS, Mismatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("cpu", "cuda"), "default": "cpu"},
    "dtype": {"choices": DTYPES, "default": "float32"},
    "threads": {"type": int, "default": torch.get_num_threads(), "help": "CPU threads (default: torch's, %(default)s)"},
    "layers": {"metavar": "TEXT", "default": "", "help": "only layers or models whose name contains TEXT"},
    "without": {"metavar": "TEXT", "help": "no layers whose name contains TEXT"},
    "batch": {"type": int, "help": "in place of the layer list's batch sizes"},
    "batches": {"type": int, "nargs": "+", "default": [1, 8], "metavar": "N", "help": "default: 1 8"},
    "layouts": {"nargs": "+", "choices": LAYOUTS, "default": list(LAYOUTS), "help": "default: both"},
    "passes": {"nargs": "+", "choices": models.PASSES, "default": list(models.PASSES), "help": "default: both"},
    "rounds": {"type": int, "default": 7, "help": "bursts of each implementation (default: %(default)s)"},
    "amp": {"choices": models.AMP, "help": "autocast to it in a training step"},
    "eager": {"action": "store_true", "help": "on CUDA, time calls with their launches, not graphs of them"},
    "tuned": {"action": "store_true", "help": "with dwconv_ext.benchmark(True)"},
    "no-compile": {"action": "store_true", "help": "leave inductor out (it takes seconds a layer, a minute a model)"},
    "no-runtimes": {"action": "store_true", "help": "leave ONNX Runtime and OpenVINO out"},
    "profile": {"action": "store_true", "help": "in place of the table, the time of each operation"},
    "save": {
        "nargs": "?",
        "metavar": "DIR",
        "const": Path(),  # the machine's own
        "type": Path,
        "help": "keep the figures in DIR (default: benchmarks/results/<machine>)",
    },
    "from": {"dest": "saved", "type": Path, "nargs": "+", "metavar": "JSON", "help": "figures that were saved, not new ones"},
    "to": {"type": Path, "metavar": "FILE", "default": calibrate.TABLE, "help": "the table (default: the package's)"},
    "names": {"nargs": "*", "metavar": "NAME", "help": "of torchvision's or timm's models (default: seven mobile networks)"},
    "files": {"type": Path, "nargs": "+", "metavar": "JSON", "help": "of any suite but sweep and traffic"},
}


class Suite(NamedTuple):
    help: str
    run: Callable[[argparse.Namespace, torch.dtype, Callable[[list], Iterable]], int]
    options: str
    defaults: dict[str, Any] = {}  # noqa: RUF012 (never written)


COMPARISON = "device dtype threads layers without batch rounds eager tuned no-compile no-runtimes save"
SUITES = {
    "depthwise": Suite("depthwise convolution: forward, and gradients of input and weight", layer_suites.run, COMPARISON),
    "conv1d": Suite("depthwise convolution in one dimension: the same, and a step of decoding", layer_suites.run, COMPARISON),
    "transposed": Suite("depthwise transposed convolution: the same, against nn.ConvTranspose2d", layer_suites.run, COMPARISON),
    "separable": Suite("depthwise - BatchNorm - ReLU - pointwise - BatchNorm - ReLU, eval mode", layer_suites.run, COMPARISON),
    "pointwise": Suite("1x1 convolutions of seven networks, eval mode", layer_suites.run, COMPARISON),
    "inverted": Suite("MobileNetV2's inverted residual blocks, eval mode", layer_suites.run, COMPARISON),
    "training": Suite("the blocks of MobileNetV1 and V2, forward and backward in training", layer_suites.run, COMPARISON),
    "network": Suite("seven whole networks in inference, against the runtimes that serve them", network.run,
                     "names dtype threads batches rounds no-compile no-runtimes profile save", {"rounds": 5}),
    "memory": Suite("bytes that seven whole networks take, against the same runtimes", memory.run,
                    "names threads batches no-runtimes save", {"dtype": "float32"}),
    "models": Suite(
        "whole models: plain, compiled, converted",
        models.run,
        "device dtype amp threads layers batches layouts passes rounds no-compile save",
        {"rounds": 5},
    ),
    "activations": Suite("what an activation costs in a kernel's registers, and in torch", activations.run,
                         "dtype threads rounds save"),
    "sweep": Suite("time per multiply-add at neighbouring sizes, and as N, C and H grow", sweep.run,
                   "device dtype threads layers rounds save", {"rounds": 5}),
    "traffic": Suite("bytes that the CUDA kernels move, counted on the emulator", traffic.run,
                     "dtype layers batch save", {"dtype": "float16", "batch": 8}),
    "calibrate": Suite("for which layers torch's own convolution runs on a GPU without the tuner", calibrate.run,
                       "device rounds from to", {"rounds": 5}),
    "plot": Suite("the pictures of saved figures, drawn again", plot.run, "files"),
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.help, description=sys.modules[suite.run.__module__].__doc__)
        for option in suite.options.split():
            command.add_argument(option if option in ("files", "names") else f"--{option}", **OPTIONS[option])
        command.set_defaults(**suite.defaults)
    options = parser.parse_args(arguments)
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("threads", "rounds", "batch", "batches"):
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                parser.error(f"--{name}: must be at least 1, got {value}")
    return options


def progress(layers: list) -> Iterable:
    """The layers, with a bar on a terminal that has rich."""
    try:
        from rich.progress import track
    except ImportError:
        return layers
    return track(layers, "checking and timing", transient=True, disable=not sys.stderr.isatty())


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return SUITES[options.what].run(options, DTYPES[getattr(options, "dtype", "float32")], progress)
    except Mismatch as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
