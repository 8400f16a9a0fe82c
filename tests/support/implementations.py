"""What runs the ops in a test: the CPU's kernels of one instruction set, or the CUDA kernels, on the emulator or on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import dwconv_ext

EMULATOR = "emulator"
CUDA = [
    EMULATOR,
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
NAMES = [*dwconv_ext._C.supported_isas(), *CUDA]

# GPUs that the emulator makes plans for, besides an H100: with a single SM tiles are large, and older ones lack instructions.
ONE_SM = {"sm_count": 1}
AMPERE = {"arch": 80, "sm_count": 108}
TURING = {"arch": 75, "shared_per_block": 64 << 10, "shared_per_sm": 64 << 10, "sm_count": 40}


@dataclass(frozen=True)
class Implementation:
    name: str
    device: str = "cpu"  # of the tensors
    cuda: bool = False  # the CUDA kernels: a block's intermediate has the inputs' type
    emulator: ModuleType | None = None

    def on_device(self, tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.to(self.device) for t in tensors]

    def gpus(self, *more: dict) -> Iterator[dict]:
        """Once; on the emulator with the plans for each of these GPUs too."""
        for gpu in ({}, *more) if self.emulator else ({},):
            if self.emulator:
                self.emulator.set_gpu(gpu)
            yield gpu

    def fusions(self) -> Iterator[str]:
        """Once; on CUDA with a block as one kernel, and as a kernel a stage."""
        for fusion in ("always", "never") if self.cuda else ("",):
            if self.cuda:
                (self.emulator or dwconv_ext._C_cuda).force_fusion(fusion)
            yield fusion

    def roundings(self, dtype: torch.dtype) -> list[dict]:
        """How a block may round (check_separable's options); once for each way that the caller of the op may choose."""
        if not self.cuda:
            return [{}]
        return [{"peer": False, "narrow": True, "tf32": tf32} for tf32 in ((False, True) if dtype == torch.float32 else (False,))]


def reset(emulator: ModuleType) -> None:
    emulator.set_gpu({})
    emulator.set_order("forwards")
    emulator.force_row(-1)
    emulator.force_fusion("by_cost")
    emulator.force_source("heuristics")
    emulator.count_traffic(False, True, [])
    emulator.launches()


@contextmanager
def running(name: str) -> Iterator[Implementation]:
    """While open, the ops run this implementation."""
    if name == "cuda":
        yield Implementation(name, "cuda", cuda=True)
        dwconv_ext._C_cuda.force_fusion("by_cost")
    elif name == EMULATOR:
        import cuda_emulator

        if cuda_emulator.cuda_headers() is None:
            pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch")
        module = cuda_emulator.load()
        try:
            with cuda_emulator.behind_the_ops():
                yield Implementation(name, cuda=True, emulator=module)
        finally:
            reset(module)
    else:
        before = dwconv_ext._C.selected_isa()
        dwconv_ext._C.select_isa(name)
        try:
            yield Implementation(name)
        finally:
            dwconv_ext._C.select_isa(before)
