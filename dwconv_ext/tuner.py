"""benchmark: the fastest of several kernels and torch's own convolution, by timing them at a problem's first call."""

from __future__ import annotations

import os
import warnings

import torch

from . import __version__
from ._extension import _C, _C_cuda


def _versions() -> str:
    """What a choice holds for besides problem and device."""
    text = f"dwconv_ext {__version__}, torch {torch.__version__}"
    return text if _C_cuda is None else f"{text}, cuDNN {torch.backends.cudnn.version()}"


def benchmark(enabled: bool, *, file: str | os.PathLike[str] | None = None) -> None:
    """Whether a problem's first call times the ways to compute it, as ``torch.backends.cudnn.benchmark`` has cuDNN do.

    Off by default.

    With it on, the first call of ``depthwise_conv2d``, of each of its gradients and, on CUDA, of ``separable_conv2d`` with a
    problem (sizes, dtype, layout, what is fused) times the plan's best candidates and torch's own convolution on the device. The
    fastest computes this and all later calls. What has packed weights (fused blocks in eval mode and compiled graphs on the CPU)
    is not timed. While a CUDA graph is captured nothing is timed: the calls that warm it up choose.

    Which kernel runs then depends on the times: results may differ in their last bits from run to run. Where torch's convolution
    was the fastest, its rules hold: its cuDNN settings, tf32 and determinism.

    Without it the plan decides by a cost model, and on GPUs that have been measured torch's convolution runs where it was clearly
    faster for layers like this (``csrc/cuda/plan/faster_in_torch.inc``).

    Args:
        enabled: False ends it, and forgets what was chosen.
        file: where choices are read from and added to, a line each with the device, the versions and all times; it may be that of
            other devices, versions and running processes too. None: choices hold for this process.

    Raises:
        TypeError: enabled is not a bool, file not a path.
        ValueError: file is empty, no regular file, or given where enabled is False.

    Examples:
        >>> import dwconv_ext
        >>> dwconv_ext.benchmark(True, file="choices.txt")  # or DWCONV_EXT_BENCHMARK=1, DWCONV_EXT_BENCHMARK_FILE=choices.txt
        >>> dwconv_ext.benchmark(False)
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"benchmark: enabled must be a bool, but got {enabled!r}")
    path = b""
    if file is not None:
        if not isinstance(file, (str, os.PathLike)):
            raise TypeError(f"benchmark: file must be a path (str or os.PathLike), but got {file!r}")
        name = os.fsencode(file)
        if not name or b"\0" in name:
            raise ValueError(f"benchmark: file must be the path of a file, but got {file!r}")
        if not enabled:
            raise ValueError(f"benchmark: file must be None where enabled is False, but got {file!r}")
        path = os.path.abspath(name)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"benchmark: file must be a regular file, but got {file!r}")
    for half in (_C, _C_cuda):
        if half is not None:
            half.set_benchmark(enabled, path, _versions() if enabled else "")


def benchmark_by_environment() -> None:
    """``DWCONV_EXT_BENCHMARK=1``, with ``DWCONV_EXT_BENCHMARK_FILE`` where that is set."""
    wish = os.environ.get("DWCONV_EXT_BENCHMARK", "")
    if wish not in ("", "0", "1"):
        raise ImportError(f"DWCONV_EXT_BENCHMARK: expected 0 or 1, got {wish!r}")
    file = os.environ.get("DWCONV_EXT_BENCHMARK_FILE") or None
    if wish == "1":
        benchmark(True, file=file)
    elif file is not None:
        warnings.warn("DWCONV_EXT_BENCHMARK_FILE does nothing without DWCONV_EXT_BENCHMARK=1", stacklevel=2)
