"""What this machine allows, measured: copy bandwidth at a footprint, multiply-add rate at a dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .timing import Stopwatch


class Roofline:
    def __init__(self, watch: Stopwatch, dtype: torch.dtype) -> None:
        self.watch, self.dtype = watch, dtype
        self._bandwidth = functools.lru_cache(None)(self._measure_bandwidth)

    def _seconds(self, function: Callable[[], object]) -> float:
        return self.watch.race({"": function}, rounds=5)[""]

    def _measure_bandwidth(self, log2_bytes: int) -> float:
        half = torch.ones(2**log2_bytes // 8, dtype=torch.float32, device=self.watch.device)
        target = torch.empty_like(half)
        return 2**log2_bytes / self._seconds(lambda: target.copy_(half))

    def bandwidth(self, total_bytes: float) -> float:
        """Bytes a second of a copy that reads and writes as much together as `total_bytes`, to the nearest power of two."""
        return self._bandwidth(max(16, round(torch.tensor(float(total_bytes)).log2().item())))

    @functools.cached_property
    def flops(self) -> float:
        """Operations a second of a square matrix product that is large for the device.

        On the CPU no less than float32's: where a narrower product is emulated, it is slower and no limit.
        """

        def rate(dtype: torch.dtype, n: int) -> float:
            a = torch.randn(n, n, device=self.watch.device).to(dtype)
            return 2 * n**3 / self._seconds(lambda: torch.mm(a, a))

        if self.watch.device == "cuda":
            return rate(self.dtype, 8192)
        dtypes = {self.dtype, torch.float32}
        return rate(max(dtypes, key=lambda dtype: rate(dtype, 128)) if len(dtypes) > 1 else self.dtype, 1024)

    def seconds(self, total_bytes: float, flops: float) -> float:
        """The least time: every byte moved once at copy bandwidth, or every operation at the matrix product's rate."""
        return max(total_bytes / self.bandwidth(total_bytes), flops / self.flops)
