"""The layer lists, as named tuples."""

from __future__ import annotations

from math import prod
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
    kind: str = "depthwise"  # the suite's name
    activation: str = "identity"  # of a pointwise or a 1-D layer
    expand: int = 1  # an inverted residual's
    causal: bool = False  # of a 1-D layer, which is of one row

    @property
    def padding(self) -> tuple[int, int]:
        kernel = [k - 1 for k in self.kernel] if self.kind == "transposed" else self.kernel
        return kernel[0] // 2, kernel[1] // 2

    @property
    def out_size(self) -> tuple[int, int]:
        if self.kind == "transposed":
            sides = zip(self.size, self.padding, self.kernel, strict=True)
            height, width = ((s - 1) * self.stride - 2 * p + k for s, p, k in sides)
            return height, width
        if self.causal:
            return 1, (self.size[1] - 1) // self.stride + 1
        h, w = ((s + 2 * p - k) // self.stride + 1 for s, p, k in zip(self.size, self.padding, self.kernel, strict=True))
        return h, w

    @property
    def outputs(self) -> int:
        return self.batch * prod(self.out_size) * self.out_channels

    def stages(self) -> list[tuple[int, int]]:
        """Pixels and weights of each convolution in it."""
        if self.kind == "transposed":  # each pixel of the input meets each weight
            return [(self.batch * prod(self.size), self.channels * prod(self.kernel))]
        hidden, after = self.channels * self.expand, self.batch * prod(self.out_size)
        stages = [(self.batch * prod(self.size), self.channels * hidden)] if self.expand != 1 else []
        if self.kind != "pointwise":
            stages.append((after, hidden * prod(self.kernel)))
        if self.kind not in ("depthwise", "conv1d"):
            stages.append((after, hidden * self.out_channels))
        return stages

    @property
    def flops(self) -> int:
        return sum(2 * pixels * weights for pixels, weights in self.stages())

    @property
    def elements(self) -> int:
        """Every operand once."""
        return self.batch * self.channels * prod(self.size) + self.outputs + sum(weights for _, weights in self.stages())


def rows(file: str) -> list[list[str]]:
    lines = (FOLDER / file).read_text().splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def depthwise_layers(kind: str = "depthwise") -> list[Layer]:
    layers = []
    for name, *numbers in rows(f"{kind}.txt"):
        n, c, h, w, kh, kw, s = map(int, numbers)
        layers.append(Layer(name, n, c, c, (h, w), (kh, kw), s, kind))
    return layers


def transposed_layers() -> list[Layer]:
    return depthwise_layers("transposed")


def conv1d_layers() -> list[Layer]:
    layers = []
    for name, *numbers, activation, padding in rows("conv1d.txt"):
        n, c, length, k, s = map(int, numbers)
        how = {"activation": activation, "causal": padding == "causal"}
        layers.append(Layer(name, n, c, c, (1, length), (1, k), s, "conv1d", **how))
    return layers


def separable_layers(batches: tuple[int, ...] = (1, 8)) -> list[Layer]:
    layers = []
    for batch in batches:
        for name, *numbers in rows("separable.txt"):
            c, o, h, w, kh, kw, s = map(int, numbers)
            layers.append(Layer(f"{name}_b{batch}", batch, c, o, (h, w), (kh, kw), s, "separable"))
    return layers


def pointwise_layers(batches: tuple[int, ...] = (1, 8)) -> list[Layer]:
    layers = []
    for batch in batches:
        for networks, *numbers, activation in rows("pointwise.txt"):
            c, o, h, w = map(int, numbers)
            name = f"{networks}_{h}x{w}_{c}_{o}_b{batch}"
            layers.append(Layer(name, batch, c, o, (h, w), (1, 1), 1, "pointwise", activation))
    return layers


def inverted_layers(batches: tuple[int, ...] = (1, 8)) -> list[Layer]:
    layers = []
    for batch in batches:
        for name, *numbers in rows("inverted.txt"):
            c, o, h, w, s, t = map(int, numbers)
            layers.append(Layer(f"{name}_b{batch}", batch, c, o, (h, w), (3, 3), s, "inverted", expand=t))
    return layers


def training_layers(batches: tuple[int, ...] = (8,)) -> list[Layer]:
    """MobileNetV1's blocks and MobileNetV2's, but for those without an expansion."""
    blocks = [*separable_layers(batches), *(layer for layer in inverted_layers(batches) if layer.expand != 1)]
    return [layer._replace(kind="training") for layer in blocks]
