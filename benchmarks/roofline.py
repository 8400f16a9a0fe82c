"""What this machine allows, measured: copy bandwidth at a footprint, multiply-add rate at a dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from dwconv_ext.nn.folded_layers import ConvSettings, FoldedBlock

from .timing import Stopwatch


class Roofline:
    def __init__(self, watch: Stopwatch, dtype: torch.dtype) -> None:
        self.watch, self.dtype = watch, dtype
        self._bandwidth = functools.lru_cache(None)(self._measure_bandwidth)

    def _seconds(self, function: Callable[[], object]) -> float:
        return self.watch.interleaved({"": function}, rounds=5)[""]

    def _measure_bandwidth(self, log2_bytes: int) -> float:
        half = torch.ones(2**log2_bytes // 8, dtype=torch.float32, device=self.watch.device)
        target = torch.empty_like(half)
        return 2**log2_bytes / self._seconds(lambda: target.copy_(half))

    def bandwidth(self, total_bytes: float) -> float:
        """Bytes a second of a copy that reads and writes as much together as `total_bytes`, to the nearest power of two."""
        return self._bandwidth(max(16, round(torch.tensor(float(total_bytes)).log2().item())))

    @functools.cached_property
    def flops(self) -> float:
        """Operations a second of a matrix product that is large for the device: the fastest of what is known.

        On the CPU that is torch's square product, at float32 too (a narrower one that is emulated is slower and no limit), or
        this package's pointwise product: torch's library does not make use of every processor.
        """

        def rate(operations: float, function: Callable[[], object]) -> float:
            return operations / self._seconds(function)

        def square(dtype: torch.dtype, n: int) -> float:
            a = torch.randn(n, n, device=self.watch.device).to(dtype)
            return rate(2 * n**3, lambda: torch.mm(a, a))

        if self.watch.device == "cuda":
            return square(self.dtype, 8192)
        channels, pixels = 512, 4096
        x = torch.randn(1, channels, 1, pixels).to(self.dtype).contiguous(memory_format=torch.channels_last)
        depthwise, pointwise = (torch.randn(channels, c, 1, 1).to(self.dtype) for c in (1, channels))
        block = FoldedBlock(ConvSettings(groups=channels, activation="relu"), ConvSettings(activation="relu"))
        none = (None,) * 5
        ours = rate(2 * pixels * channels * (channels + 1), lambda: block(x, (depthwise, *none, pointwise, *none)))
        faster = max({self.dtype, torch.float32}, key=lambda dtype: square(dtype, 128))
        return max(ours, square(faster, 1024))

    def seconds(self, total_bytes: float, flops: float) -> float:
        """The least time: every byte moved once at copy bandwidth, or every operation at the matrix product's rate."""
        return max(total_bytes / self.bandwidth(total_bytes), flops / self.flops)
