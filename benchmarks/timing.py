"""Timing: implementations in short bursts in turn, in one process, in another order each round; medians over the rounds.

Absolute times on a shared machine drift by tens of percent within minutes; ratios of implementations measured within the same
seconds do not. A burst is long enough (BURST_S) that its first calls, with another's data in the caches and perhaps
its threads still spinning, do not count: they are run before the clock starts.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch.utils.benchmark import Timer

BURST_S = 0.02
GRAPH_CALLS = 10
LONG_S = 0.05  # a call as long needs no other before it
SETTLE_S = 0.004  # other runtimes' worker threads spin for about so long after their last task


def keep_freed_memory() -> None:
    """Tells the C library's allocator to keep what is freed, for every implementation alike.

    By default glibc hands a freed 12 MB output back to the system or not, depending on what lies behind it; the next call then
    faults in 3,000 pages or none. That is up to five times the time of a 0.5 ms layer, and it falls on one or another
    by chance. Elsewhere than on glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


def _cuda_burst(function: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _graph(function: Callable[[], object], calls: int) -> Callable[[], object]:
    """Several calls as one CUDA graph, captured on the current stream, which must not be the default one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            function()
    return graph.replay


class Stopwatch:
    """Seconds a call, of functions timed in turn.

    graphs: on CUDA, replays of a graph of calls, so that what Python and the launches cost the host does not count.
    """

    def __init__(self, device: str, threads: int, graphs: bool = False) -> None:
        self.device, self.threads, self.graphs = device, threads, graphs and device == "cuda"

    def burst(self, function: Callable[[], object], calls: int) -> float:
        if self.device == "cuda":
            return _cuda_burst(function, calls)
        timer = Timer("function()", globals={"function": function}, num_threads=self.threads)
        return timer.timeit(calls).mean

    def calls_for(self, function: Callable[[], object]) -> int:
        """How many calls fill a burst; also the warm-up."""
        once = min(self.burst(function, 1) for _ in range(3))
        return max(1, min(1000, int(BURST_S / max(once, 1e-7))))

    def rounds(self, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """The seconds a call of each, round by round: a round's figures are of the same seconds."""
        captured = dict.fromkeys(functions, 1)
        if self.graphs:
            # The calls before also do what is chosen or compiled at the first call, which must not be captured.
            captured = {name: min(self.calls_for(function), GRAPH_CALLS) for name, function in functions.items()}
            functions = {name: _graph(function, captured[name]) for name, function in functions.items()}
        calls = {name: self.calls_for(function) for name, function in functions.items()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        order, shuffled = list(functions), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(order)  # what runs right behind an implementation that leaves the caches worst is a tenth slower
            for name in order:
                function = functions[name]
                if self.device == "cpu":
                    time.sleep(SETTLE_S)
                if not times[name] or times[name][-1] < LONG_S:
                    self.burst(function, max(1, calls[name] // 4))
                times[name].append(self.burst(function, calls[name]) / captured[name])
        return times

    def interleaved(self, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """The median seconds a call of each."""
        return {name: median(times) for name, times in self.rounds(functions, rounds).items()}


def geometric_mean(values: Iterable[float]) -> float:
    logs = torch.tensor(list(values), dtype=torch.float64).log()
    return float(logs.mean().exp())
