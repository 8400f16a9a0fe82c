"""Whether a converted layer is faster at the shapes that a model gives it: both ways timed in turn on this machine."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 5
BURST_S = 0.004


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """By the flags alone, put back as they were."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = False
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def inputs_of(model: nn.Module, layers: list[nn.Module], example_input: Any) -> dict[nn.Module, Tensor]:
    """What each layer is given in an evaluation of the model; none for a layer that isn't reached, or by keyword.

    Raises:
        ValueError: the model does not take the input.
    """
    seen: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(layer, args[0].detach())

    handles = [m.register_forward_pre_hook(see) for m in layers]
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with in_eval_mode(model), torch.no_grad():
            model(*arguments)
    except Exception as error:
        wanted = "an input of the model or a tuple of its arguments"
        kind = type(example_input).__name__
        raise ValueError(f"convert: example_input must be {wanted}, but got {kind}, and the model says: {error}") from error
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


def depthwise_speedup(conv: nn.Module, x: Tensor) -> float:
    """A converted depthwise convolution over torch's own, forward."""
    for plain in (nn.ConvTranspose2d, nn.ConvTranspose1d):
        if isinstance(conv, plain):
            with torch.no_grad():
                return speedup(lambda: type(conv).forward(conv, x), lambda plain=plain: plain.forward(conv, x))

    plain = nn.Conv1d if isinstance(conv, nn.Conv1d) else nn.Conv2d

    def theirs() -> Tensor:
        return plain._conv_forward(conv, x, conv.weight, conv.bias)

    with torch.no_grad():
        return speedup(lambda: conv._conv_forward(x, conv.weight, conv.bias), theirs)


def sequential_speedup(container: nn.Sequential, x: Tensor) -> float:
    """A container that fuses its neighbours over one that doesn't, forward in eval mode."""
    with in_eval_mode(container), torch.no_grad():
        return speedup(lambda: container(x), lambda: nn.Sequential.forward(container, x))
