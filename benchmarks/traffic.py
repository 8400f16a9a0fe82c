"""``python -m benchmarks traffic``: the bytes that the CUDA kernels move, counted on tools/cuda_emulator, with no GPU.

Activation bytes are distinct 32-byte sectors of global memory that each block loads and stores: its own re-reads hit L1. Over the
compulsory bytes, input and output once, that is what the blocks ask of L2; what neighbouring blocks both read comes from memory
once (docs/design/cuda.md has the counters of a GPU). Weights, re-read from L2, stand apart. The
unfused pair writes and reads the intermediate besides; FCM (arXiv 2404.19331) reports the saving in the same way. An inverted
residual is compared with what its two kernels, pointwise convolution and fused block, move here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwconv_ext.ops.arguments import four_paddings

from .layers import Layer, conv1d_layers, depthwise_layers, inverted_layers, separable_layers, transposed_layers
from .report import made, markdown_table, print_rows, save

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def load_emulator() -> tuple[Any, Any]:
    """(the package tools/cuda_emulator, its module), built if need be."""
    tools = str(Path(__file__).parents[1] / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    import cuda_emulator

    return cuda_emulator, cuda_emulator.load()


@dataclass
class Moved:
    """What one layer's launches moved, in bytes."""

    layer: str
    layout: str
    fused: bool | None  # None: a depthwise layer
    activations: int
    compulsory: int
    weights: int
    requests: int  # accesses of single threads
    unfused: int  # the least that an unfused pair moves: intermediate written and read once
    plan: str

    @property
    def ratio(self) -> float:
        return self.activations / self.compulsory

    @property
    def saved(self) -> float:
        return 1 - self.activations / self.unfused


def _moved(launches: list[dict]) -> tuple[int, int]:
    """Of activations, and of weights. Intermediates lie in no range that was named: their loads stand among the weights'."""
    between = sum(launch["weight_bytes"] for launch in launches[1:])
    activations = sum(launch["load_bytes"] + launch["store_bytes"] for launch in launches) + between
    return activations, sum(launch["weight_bytes"] for launch in launches) - between


def _of(layer: Layer, layout: str, fused: bool | None, launches: list[dict], compulsory: int, unfused: int) -> Moved:
    activations, weights = _moved(launches)
    requests = sum(launch["requests"] for launch in launches)
    plan = ", ".join(f"{launch['name']} ({launch['blocks']} blocks)" for launch in launches)
    return Moved(layer.name, layout, fused, activations, compulsory, weights, requests, unfused, plan)


def _count(module: Any, x: Tensor, call: Any) -> tuple[list[dict], Any]:
    module.launches()
    module.count_traffic(True, False, [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())])
    try:
        output = call()
    finally:
        module.count_traffic(False, True, [])
    return module.launches(), output


def measure(layer: Layer, layout: str, dtype: torch.dtype, *, separable: bool, fusion: str = "by_cost") -> Moved:
    """Runs the layer's plan for an H100 block by block and counts. Matrix products are left out: they move nothing global."""
    _, module = load_emulator()
    ops = torch.ops.dwconv_emulator
    x = torch.randn(layer.batch, layer.channels, *layer.size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    w = torch.randn(layer.channels, 1, *layer.kernel).to(dtype)
    padding = (0, 0, layer.kernel[1] - 1, 0) if layer.causal else layer.padding
    conv = ((layer.stride, layer.stride), padding, (1, 1))
    module.set_gpu({})
    if not separable:
        if layer.kind == "transposed":
            stride, padding, dilation = conv
            launches, y = _count(module, x, lambda: ops.depthwise_conv_transpose2d(x, w, None, stride, padding, (0, 0), dilation))
        else:
            launches, y = _count(module, x, lambda: ops.depthwise_conv2d(x, w, None, *conv, layer.activation))
        compulsory = unfused = (x.numel() + y.numel()) * x.element_size()
        fused = None
    else:
        pw = torch.randn(layer.out_channels, layer.channels, 1, 1).to(dtype)
        module.force_fusion(fusion)
        launches, y = _count(module, x, lambda: ops.separable_conv2d(x, w, None, pw, None, *conv, "relu", "relu"))
        module.force_fusion("by_cost")
        middle = layer.batch * layer.channels * layer.out_size[0] * layer.out_size[1]
        compulsory = (x.numel() + y.numel()) * x.element_size()
        unfused = compulsory + 2 * middle * x.element_size()
        fused = len(launches) == 1
    return _of(layer, layout, fused, launches, compulsory, unfused)


def measure_pooled(layer: Layer, layout: str, dtype: torch.dtype) -> Moved:
    """The same of a depthwise layer with SiLU and the mean over its pixels; `unfused`: with these as sweeps of their own."""
    _, module = load_emulator()
    x = torch.randn(layer.batch, layer.channels, *layer.size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    w = torch.randn(layer.channels, 1, *layer.kernel).to(dtype)
    conv = ((layer.stride, layer.stride), layer.padding, (1, 1))
    module.set_gpu({})
    pooled = torch.ops.dwconv_emulator.depthwise_conv2d_pooled
    launches, (y, _) = _count(module, x, lambda: pooled(x, w, None, *conv, "silu", 0.0))
    compulsory = (x.numel() + y.numel()) * x.element_size()
    return _of(layer, layout, None, launches, compulsory, compulsory + 3 * y.numel() * y.element_size())


def measure_inverted(layer: Layer, layout: str, dtype: torch.dtype, *, fusion: str = "by_cost") -> Moved:
    """The same of an inverted residual with packed weights; `unfused`: what its two kernels move."""
    _, module = load_emulator()
    ops = torch.ops.dwconv_emulator
    name, hidden = str(dtype).removeprefix("torch."), layer.channels * layer.expand
    x = torch.randn(layer.batch, layer.channels, *layer.size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    expand = ops.pointwise_conv2d_pack(torch.randn(hidden, layer.channels, 1, 1), torch.randn(hidden), "", name)
    filters = torch.randn(hidden, 1, *layer.kernel), torch.randn(hidden)
    packed = ops.separable_conv2d_pack(*filters, torch.randn(layer.out_channels, hidden, 1, 1), None, "", name)
    block = [layer.out_channels, *layer.kernel, layer.stride, layer.stride, *four_paddings(layer.padding), 1, 1, 2, 0]
    module.set_gpu({})
    runs = {}
    for how in ("never", fusion):
        module.force_fusion("never" if how == "never" else fusion)
        runs[how] = _count(module, x, lambda: ops.inverted_residual(x, expand, hidden, 2, 0.0, packed, block, [0.0, 0.0]))
    module.force_fusion("by_cost")
    launches, y = runs[fusion]
    compulsory = (x.numel() + y.numel()) * x.element_size()
    return _of(layer, layout, len(launches) == 1, launches, compulsory, _moved(runs["never"][0])[0])


def table(rows: list[Moved]) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "layout", "activations MB", "over compulsory", "saved of the pair", "weights MB", "requests", "plan"]
    cells = []
    for row in rows:
        saved = "" if row.fused is None else f"{row.saved:.0%}" if row.fused else "not fused"
        figures = [f"{row.activations / 1e6:.2f}", f"{row.ratio:.3f}", saved, f"{row.weights / 1e6:.2f}", f"{row.requests:,}"]
        cells.append([row.layer, row.layout, *figures, row.plan])
    return header, cells


def run(options: argparse.Namespace, dtype: torch.dtype, progress: Callable[[list], Iterable]) -> int:
    """Counts and prints depthwise layers, 1-D and transposed ones, blocks, inverted residuals and the blocks' training steps."""
    lists = {
        "depthwise": depthwise_layers(),
        "conv1d": [layer for layer in conv1d_layers() if layer.size[1] > 1],
        "transposed": transposed_layers(),
        "separable": separable_layers((options.batch,)),
        "inverted": [layer for layer in inverted_layers((options.batch,)) if layer.expand > 1],
    }
    if not any(options.layers in layer.name for listed in lists.values() for layer in listed):
        print(f"no layer's name contains {options.layers!r}", file=sys.stderr)
        return 2
    groups: dict[str, list[Moved]] = {}
    tables, figures = [], []
    for kind, listed in lists.items():
        chosen = [layer._replace(batch=options.batch) for layer in listed if options.layers in layer.name]
        groups[kind] = [
            measure_inverted(layer, layout, dtype)
            if kind == "inverted"
            else measure(layer, layout, dtype, separable=kind == "separable")
            for layer in progress(chosen)
            for layout in LAYOUTS
        ]
        title = f"traffic, {kind}, {options.dtype}, plans for an H100, counted on the emulator"
        header, cells = table(groups[kind])
        print_rows(title, header, cells, last_is_bold=False)
        tables.append(markdown_table(title, header, cells))
        figures += [{"kind": kind, **asdict(row), "ratio": row.ratio, "saved": row.saved} for row in groups[kind]]
    from .training_traffic import measure_training, training_table

    chosen = [layer for layer in lists["separable"] if options.layers in layer.name]
    steps = [measure_training(layer, layout, dtype) for layer in progress(chosen) for layout in LAYOUTS]
    title = f"traffic, training, {options.dtype}, plans for an H100, counted on the emulator; torch's modules by their sweeps"
    header, cells = training_table(steps)
    print_rows(title, header, cells, last_is_bold=False)
    tables.append(markdown_table(title, header, cells))
    figures += [{"kind": "training", **asdict(step), "ratio": step.ratio} for step in steps]
    save(options, {"device": "emulator", **made()}, {"rows": figures}, tables)
    return 0
