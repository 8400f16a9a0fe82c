"""What a training step of a depthwise-separable block moves: this package's CUDA kernels, counted on the emulator, and torch's
modules, by their sweeps.

Both run the same pointwise convolution, torch's; it is counted among both, and left out of a second ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layer
from .traffic import LAYOUTS, load_emulator

# How often torch's modules go over the tensors of a block: its input, the depthwise convolution's output, the block's. Forward
# BatchNorm reads twice and writes, an activation reads and writes; backward an activation reads what it gave and the gradient and
# writes, BatchNorm reads both of its tensors twice and writes. A convolution's two gradients each read two tensors but what the
# one writes.
TORCH = {"input": 1 + 2, "middle": (1 + 3 + 2) + (3 + 5 + 2), "output": (3 + 2) + (3 + 5)}
POINTWISE = {"input": 0, "middle": 1 + 2, "output": 1 + 2}


@dataclass
class Step:
    """Bytes of a forward and a backward pass."""

    layer: str
    layout: str
    ours: int
    torch: int
    pointwise: int  # of either besides
    plan: str

    @property
    def ratio(self) -> float:
        return (self.ours + self.pointwise) / (self.torch + self.pointwise)

    @property
    def without_pointwise(self) -> float:
        return self.ours / self.torch


def _bytes(sweeps: dict[str, int], sizes: dict[str, int]) -> int:
    return sum(sweeps[name] * sizes[name] for name in sizes)


def measure_training(layer: Layer, layout: str, dtype: torch.dtype) -> Step:
    """By the plans for an H100, a launch after the other. What is not an activation, filters and sums of parts, is left out."""
    _, module = load_emulator()
    ops = torch.ops.dwconv_emulator
    conv = ((layer.stride, layer.stride), layer.padding, (1, 1))
    names, total, launches = [], 0, []

    def like(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])

    def count(op: str, activations: tuple[Tensor, ...], *arguments: object) -> tuple[Tensor, ...]:
        nonlocal total, launches
        module.launches()
        module.count_traffic(True, False, [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in activations])
        try:
            result = getattr(ops, op)(*arguments)
        finally:
            module.count_traffic(False, True, [])
        launches = module.launches()
        for launch in launches:
            if launch["pass"] in ("join_statistics", "join_grad_sums", "sum_parts"):
                continue
            stores = launch["pass"] not in ("statistics", "grad_sums")
            total += launch["load_bytes"] + (launch["store_bytes"] if stores else 0)
        names.extend(launch["name"] for launch in launches if launch["op"] == "depthwise_norm_act" or op == "batch_norm_act")
        return result

    module.set_gpu({})
    x, w = like(layer.batch, layer.channels, *layer.size), torch.randn(layer.channels, 1, *layer.kernel).to(dtype)
    # What its second launches read is made within the op, in no range that is named; it is one more sweep or two.
    _, middle, *statistics = count("depthwise_norm_act", (x,), x, w, None, None, *conv, 1e-5, "relu", 0.0)
    swept = 1 + sum(launch["pass"] == "statistics" for launch in launches)
    total += swept * middle.numel() * middle.element_size()
    output = like(layer.batch, layer.out_channels, *middle.shape[2:])
    _, *last = count("batch_norm_act", (output,), output, None, None, 1e-5, "relu")
    grad = like(*output.shape)
    count("batch_norm_act_backward", (grad, output), grad, output, None, None, *last, 1e-5, "relu")
    grad = like(*middle.shape)
    count(
        "depthwise_norm_act_backward", (grad, middle, x),
        grad, middle, x, w, None, None, *statistics, *conv, 1e-5, "relu", 0.0, (True, True),
    )  # fmt: skip
    sizes = {name: t.numel() * t.element_size() for name, t in (("input", x), ("middle", middle), ("output", output))}
    return Step(layer.name, layout, total, _bytes(TORCH, sizes), _bytes(POINTWISE, sizes), ", ".join(names))


def training_table(steps: list[Step]) -> tuple[list[str], list[list[str]]]:
    header = ["block", "layout", "MB", "torch's MB", "pointwise MB of both", "ratio", "ratio without pointwise", "kernels"]
    cells = [
        [step.layer, step.layout, *(f"{size / 1e6:.2f}" for size in (step.ours, step.torch, step.pointwise)),
         f"{step.ratio:.2f}", f"{step.without_pointwise:.2f}", step.plan]
        for step in steps
    ]  # fmt: skip
    return header, cells
