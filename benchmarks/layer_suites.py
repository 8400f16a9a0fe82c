"""One layer or block after another: our kernels against nn.Conv2d in both layouts, torch.compile, ONNX Runtime and OpenVINO.

``depthwise`` times the forward pass and both gradients of 11 layers of known networks; ``conv1d`` those of 1-D layers, and a step
of decoding, for which nn.Conv2d stands for nn.Conv1d; ``transposed`` those of upsampling layers, for which it stands for
nn.ConvTranspose2d; ``separable`` MobileNetV1's blocks, ``inverted`` MobileNetV2's, called as in frozen graphs, also as two ops,
and ``pointwise`` the 1x1 convolutions of seven networks, each at batch 1 and 8; ``training`` the blocks of both networks, forward
and backward, at batch 8. At 16 bits the peers of inference run in float32 too. "sgemm %" is the share of the rate of a large
torch.mm in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch

from dwconv_ext import benchmark

from . import conv1d, peers, plot, report
from .layers import (
    Layer,
    conv1d_layers,
    depthwise_layers,
    inverted_layers,
    pointwise_layers,
    separable_layers,
    training_layers,
    transposed_layers,
)
from .roofline import Roofline
from .suites import Comparison, Options, compare_depthwise, compare_inference, compare_training
from .timing import Stopwatch, keep_freed_memory

SUITES = {
    "depthwise": depthwise_layers,
    "conv1d": conv1d_layers,
    "transposed": transposed_layers,
    "separable": separable_layers,
    "pointwise": pointwise_layers,
    "inverted": inverted_layers,
    "training": training_layers,
}


def compare(layer: Layer, options: Options) -> Iterator[Comparison]:
    torch._dynamo.reset()  # once: what is compiled before a reset is compiled anew at its next call, without freezing
    kinds = {
        "depthwise": compare_depthwise,
        "conv1d": conv1d.compare,
        "transposed": compare_depthwise,
        "training": compare_training,
    }
    return kinds.get(layer.kind, compare_inference)(layer, options)


def chosen_layers(options: argparse.Namespace) -> list[Layer]:
    layers = [layer for layer in SUITES[options.what]() if options.layers in layer.name]
    layers = [layer for layer in layers if not options.without or options.without not in layer.name]
    if not options.batch:
        return layers
    renamed = [layer._replace(name=layer.name.removesuffix(f"_b{layer.batch}"), batch=options.batch) for layer in layers]
    return list(dict.fromkeys(renamed))  # a layer listed at several batch sizes is one now


def title_of(options: argparse.Namespace, facts: dict[str, str]) -> str:
    title = (
        f"{options.what}, {options.dtype}, {f'batch {options.batch}, ' if options.batch else ''}{report.where(options, facts)}"
    )
    if options.device == "cuda":
        title += ", calls with their launches" if options.eager else ", replays of CUDA graphs"
    return title + (", tuned" if options.tuned else "")


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    """With the tuner on where --tuned says so."""
    if not options.tuned:
        return _run(options, dtype, progress)
    benchmark(True)
    try:
        return _run(options, dtype, progress)
    finally:
        benchmark(False)


def _run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    """What is done is saved after each layer, so that a run cut short leaves it."""
    layers = chosen_layers(options)
    if not layers:
        print(f"no layer's name contains {options.layers!r}", file=sys.stderr)
        return 2
    if not options.no_runtimes and options.device == "cpu" and peers.missing():
        print(f"left out, not installed: {', '.join(peers.missing())} (pip install 'dwconv_ext[bench]')", file=sys.stderr)
    facts = report.machine(options.device)
    title = title_of(options, facts)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    watch = Stopwatch(options.device, options.threads, graphs=not options.eager)
    roofline = Roofline(watch, dtype)
    settings = Options(options.device, dtype, options.threads, not options.no_compile, not options.no_runtimes)
    groups: dict[str, list[report.Summary]] = {}
    # Graphs are captured on the stream on which the passes were made, and not on the default one.
    with torch.cuda.stream(torch.cuda.Stream()) if watch.graphs else nullcontext():
        for layer in progress(layers):
            for comparison in compare(layer, settings):
                comparison.times = watch.interleaved(comparison.functions, options.rounds)
                groups.setdefault(comparison.direction, []).append(report.Summary(comparison, roofline))
            figures = [figure for summaries in groups.values() for figure in map(report.figures_of, summaries)]
            tables = [report.markdown(f"{title}: {d}", s) for d, s in groups.items()]
            report.save(options, facts, {"title": title, "results": figures}, tables)
    for direction, summaries in groups.items():
        report.print_table(f"{title}: {direction}", summaries)
    print("results checked against float64 before timing; ms are medians of interleaved bursts; the ratios are what to read")
    if options.save is not None:
        plot.draw(report.path_of(options, facts, "json"))
    return 0
