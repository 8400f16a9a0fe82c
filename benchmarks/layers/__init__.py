"""The layer lists, as named tuples."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Layer(NamedTuple):
    name: str
    batch: int
    channels: int
    out_channels: int  # of the pointwise stage; the depthwise stage's own for a depthwise layer
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: int

    @property
    def padding(self) -> tuple[int, int]:
        return self.kernel[0] // 2, self.kernel[1] // 2

    @property
    def out_size(self) -> tuple[int, int]:
        h, w = ((s + 2 * p - k) // self.stride + 1 for s, p, k in zip(self.size, self.padding, self.kernel, strict=True))
        return h, w


def rows(file: str) -> list[list[str]]:
    lines = (FOLDER / file).read_text().splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def depthwise_layers() -> list[Layer]:
    layers = []
    for name, *numbers in rows("depthwise.txt"):
        n, c, h, w, kh, kw, s = map(int, numbers)
        layers.append(Layer(name, n, c, c, (h, w), (kh, kw), s))
    return layers


def separable_layers(batches: tuple[int, ...] = (1, 8)) -> list[Layer]:
    layers = []
    for batch in batches:
        for name, *numbers in rows("separable.txt"):
            c, o, h, w, kh, kw, s = map(int, numbers)
            layers.append(Layer(f"{name}_b{batch}", batch, c, o, (h, w), (kh, kw), s))
    return layers
