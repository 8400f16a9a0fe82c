"""Depthwise convolution in one dimension: whole signals, and a step of decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwconv_ext import depthwise_conv1d, depthwise_conv1d_step
from dwconv_ext.ops.activations import SLOPE, activate

from .layers import Layer
from .suites import LAYOUTS, ONE_CHANNEL, Comparison, Function, Options, check, compare_passes, operands, without_grad


class Conv1d(nn.Module):
    """A depthwise 1-D layer as everybody writes it."""

    def __init__(self, layer: Layer, w: Tensor) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x, self.weight)

    def of(self, x: Tensor, w: Tensor) -> Tensor:
        layer, padding = self.layer, self.layer.padding[1]
        if layer.causal:
            x, padding = F.pad(x, (layer.kernel[1] - 1, 0)), 0
        return activate(F.conv1d(x, w, None, layer.stride, padding, 1, layer.channels), layer.activation, SLOPE)


def compare_conv1d(layer: Layer, options: Options) -> Iterator[Comparison]:
    """The same in one dimension, of nn.Conv1d; NCHW stands for (N, C, L), channels_last for the strides of (N, L, C)."""
    x, w = operands(layer, options, layer.size[1:], layer.kernel[1:])
    conv = Conv1d(layer, w).eval()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        padding = 0 if layer.causal else layer.padding[1]
        return depthwise_conv1d(x, w, None, layer.stride, padding, act=layer.activation, causal=layer.causal)

    layouts = {"NCHW": torch.Tensor.contiguous, "channels_last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}
    yield from compare_passes(layer, options, x, w, ours, conv.of, conv, layouts)


def compare_decoding(layer: Layer, options: Options) -> Iterator[Comparison]:
    """One sample of each channel, as a decoder calls its layer, against the last output of nn.Conv1d; and the same
    op of one channel, whose time is that of a call."""
    taps = layer.kernel[1]
    (x, w), act = operands(layer, options, (taps,), layer.kernel[1:]), layer.activation
    window, sample = x[:, :, :-1].contiguous(), x[:, :, -1].contiguous()
    one = [t[:, :1].contiguous() if t is not w else w[:1].clone() for t in (sample, window, w)]

    def theirs(last: bool) -> Function:
        state = window.transpose(1, 2).contiguous().transpose(1, 2) if last else window.clone()

        def step() -> Tensor:
            joined = torch.cat((state, sample[..., None]), 2)
            state.copy_(joined[:, :, 1:])
            return activate(F.conv1d(joined, w, None, groups=layer.channels)[..., 0], act, SLOPE)

        return without_grad(step)

    def ours(last: bool) -> Function:
        state = window.transpose(1, 2).contiguous().transpose(1, 2) if last else window.clone()
        return without_grad(lambda: depthwise_conv1d_step(sample, state, w, None, act))

    functions = {f"{who} {layout}": make(layout != "NCHW") for who, make in (("dwconv_ext", ours), ("nn.Conv2d", theirs))
                 for layout in LAYOUTS}  # fmt: skip
    exact = activate(F.conv1d(x.double(), w.double(), None, groups=layer.channels)[..., 0], act, SLOPE)
    for layout in LAYOUTS:
        check(f"{layer.name} {layout} step", *(functions[f"{who} {layout}"]() for who in ("dwconv_ext", "nn.Conv2d")), exact)
    functions[ONE_CHANNEL] = without_grad(lambda: depthwise_conv1d_step(*one, None, act))
    unit = x.element_size() * layer.batch * layer.channels
    yield Comparison(layer, "step", functions, unit * (3 * taps), 2 * layer.batch * layer.channels * taps)


def compare(layer: Layer, options: Options) -> Iterator[Comparison]:
    return compare_decoding(layer, options) if layer.size[1] == 1 else compare_conv1d(layer, options)
