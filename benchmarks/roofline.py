"""What this machine allows, measured: copy bandwidth at a footprint, multiply-add rate at a dtype."""

from __future__ import annotations

import functools

import torch

from .timing import Stopwatch


class Roofline:
    def __init__(self, watch: Stopwatch, dtype: torch.dtype) -> None:
        self.watch, self.dtype = watch, dtype
        self._bandwidth = functools.lru_cache(None)(self._measure_bandwidth)

    def _best(self, function, rounds: int = 5) -> float:
        calls = self.watch.calls_for(function)
        return min(self.watch.burst(function, calls) for _ in range(rounds))

    def _measure_bandwidth(self, log2_bytes: int) -> float:
        half = torch.ones(2**log2_bytes // 8, dtype=torch.float32, device=self.watch.device)
        target = torch.empty_like(half)
        return 2**log2_bytes / self._best(lambda: target.copy_(half))

    def bandwidth(self, total_bytes: float) -> float:
        """Bytes a second of a copy that reads and writes as much together as `total_bytes`, to the nearest power of two."""
        return self._bandwidth(max(16, round(torch.tensor(float(total_bytes)).log2().item())))

    @functools.cached_property
    def flops(self) -> float:
        """Floating-point operations a second of a 1024 x 1024 x 1024 matrix product."""
        a = torch.ones(1024, 1024, dtype=self.dtype, device=self.watch.device)
        return 2 * 1024**3 / self._best(lambda: torch.mm(a, a))

    def seconds(self, total_bytes: float, flops: float) -> float:
        """The least time: every byte moved once at copy bandwidth, or every operation at the matrix product's rate."""
        return max(total_bytes / self.bandwidth(total_bytes), flops / self.flops)
