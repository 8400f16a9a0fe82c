"""The tuner with faked times, of the CPU's half and of the CUDA half on the emulator."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from cases import Case

import dwconv_ext

CASE = Case("", 2, 16, (9, 10))


@dataclass
class Tuned:
    half: ModuleType  # where the tuner is
    emulated: bool

    def start(self, *seconds: tuple[str, float], file: str = "", versions: str = "now") -> None:
        """Nothing remembered; ways that are not named take a second."""
        self.half.set_benchmark(False)
        self.half.fake_times([*seconds, ("nothing", 1.0)])
        self.half.set_benchmark(True, file, versions)

    def choice(self, text: str) -> dict[str, str]:
        """Of the one problem with this text."""
        (found,) = (c for c in self.half.benchmark_choices() if text in c["problem"])
        return found

    def ways(self, text: str) -> list[str]:
        return [time.split(" us ", 1)[1] for time in self.choice(text)["times"].split("; ")]

    @contextmanager
    def times(self, runs: bool):
        """Whether something is timed meanwhile."""
        before = self.half.timed_runs()
        yield
        assert (self.half.timed_runs() > before) == runs


def stop(half: ModuleType) -> None:
    half.set_benchmark(False)
    half.fake_times()


def step(case: Case = CASE, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> list[torch.Tensor]:
    """Output and gradients."""
    x, w, b = (t.requires_grad_() for t in case.tensors(dtype, layout))
    y = dwconv_ext.depthwise_conv2d(x, w, b, *case.conv.args())
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]
