"""Whether a converted layer is faster at the shapes that a model gives it: both ways timed in turn on this machine."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain
from .trace import in_mode

ROUNDS = 5
BURST_S = 0.004


def inputs_of(model: nn.Module, layers: list[nn.Module], example_input: Any) -> dict[nn.Module, Tensor]:
    """What each layer is given in an evaluation of the model; none for a layer that isn't reached."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args[0].detach())) for m in layers]
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object], calls: int) -> float:
    """Of a call, after two that warm up. torch.utils.benchmark's Timer does as much, and imports torch's C++ build tools."""
    timer = timeit.Timer(function, timer=now)
    timer.timeit(2)
    return timer.timeit(calls) / calls


def speedup(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    """How many times faster ours is: the median over rounds of bursts in turn."""
    once = max(min(seconds(f, 1) for _ in range(3)) for f in (ours, theirs))
    calls = max(1, min(200, int(BURST_S / max(once, 1e-7))))
    ratios = []
    for _ in range(ROUNDS):
        mine, plain = (seconds(f, calls) for f in (ours, theirs))
        ratios.append(plain / mine)
    return median(ratios)


def depthwise_speedup(conv: nn.Conv2d, x: Tensor) -> float:
    """A converted depthwise convolution over torch's own, forward."""

    def theirs() -> Tensor:
        return nn.Conv2d._conv_forward(conv, x, conv.weight, conv.bias)

    with torch.no_grad():
        return speedup(lambda: conv._conv_forward(x, conv.weight, conv.bias), theirs)


def chain_speedup(chain: Chain, x: Tensor) -> float:
    """A chain over its parts one by one, the depthwise convolution by torch."""
    conv = chain._parts()[0]
    kind = type(conv)
    with in_mode(chain.owner, training=False), torch.no_grad():

        def theirs() -> Tensor:
            conv.__class__ = nn.Conv2d
            try:
                return chain.unfused(x)
            finally:
                conv.__class__ = kind

        return speedup(lambda: chain(x), theirs)
