"""What kernels touch: nothing outside of the tensors, and nothing of one plane for another's sake."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS
from rows import TABLE, label

PAGE = mmap.PAGESIZE
ROOT = Path(__file__).parents[2]
ROWS = [row for row in TABLE if row["op"] == "depthwise_conv2d"]
SIZES = [(2, 3), (7, 7), (9, 17), (5, 30), (14, 14)]


def guarded_copy(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """That ends where memory ends, or begins where it begins: the pages beside it can't be read."""
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(region))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        assert protect(ctypes.c_void_p(begin + page * PAGE), PAGE, 0) == 0, ctypes.get_errno()
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    dense = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset)
    return dense.as_strided(x.shape, x.stride()).copy_(x)


def layout_of(row: dict) -> torch.memory_format:
    return LAYOUTS["nchw" if row["layout"] == "NCHW" else "channels_last"]


def problem(row: dict, size: tuple[int, int], padding: int | None = None):
    random = torch.Generator().manual_seed(0)
    kernel, stride = row["filter"] or 4, row["stride"] or 2
    channels, pad = 21, kernel // 2 if padding is None else padding
    x = torch.randn(2, channels, *size, generator=random)
    w = torch.randn(channels, 1, kernel, kernel, generator=random)
    args = ([stride] * 2, [pad] * 2, [1, 1])
    grad = torch.randn(torch.ops.dwconv_ext.depthwise_conv2d(x, w, None, *args).shape, generator=random)
    dtype = getattr(torch, row["dtype"])
    x, grad = (t.to(dtype).contiguous(memory_format=layout_of(row)) for t in (x, grad))
    return x, w.to(dtype), grad, args


def everything(x, w, grad, args):
    y = torch.ops.dwconv_ext.depthwise_conv2d(x, w, None, *args)
    return y, *torch.ops.dwconv_ext.depthwise_conv2d_backward(grad, x, w, *args, [True, True, True])


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("forced", ROWS, ids=label, indirect=True)
def test_nothing_outside_of_the_tensors_is_read(forced):
    for size, padding in itertools.product(SIZES, (None, 24)):
        x, w, grad, args = problem(forced, size, padding)
        expected = everything(x, w, grad, args)
        for at_end in (False, True):
            got = everything(*(guarded_copy(t, at_end) for t in (x, w, grad)), args)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("forced", ROWS, ids=label, indirect=True)
def test_planes_do_not_leak_into_others(forced):
    n, c = 1, 11
    for size in SIZES:
        x, w, grad, args = problem(forced, size)
        y, grad_input, *weight_and_bias = everything(x, w, grad, args)
        for t in (x, grad):
            t[:, :c], t[:, c + 1 :] = float("nan"), float("inf")
        got, got_input, *got_weight_and_bias = everything(x, w, grad, args)
        assert torch.equal(got[n, c], y[n, c]) and torch.equal(got_input[n, c], grad_input[n, c])
        for ours, clean in zip(got_weight_and_bias, weight_and_bias, strict=True):
            assert torch.equal(ours[c], clean[c])


WORKSPACE = """
import resource, torch, dwconv_ext
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
small = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
large = torch.randn(1, 1 << 17, 1, 1), torch.randn(1 << 17, 1, 9, 9)
dwconv_ext.depthwise_conv2d(*small)
dwconv_ext.depthwise_conv2d(*large, padding=4)  # packs 42 MB of weights: more than a C library takes from its heap
before = resident()
dwconv_ext.depthwise_conv2d(*small)
assert before - resident() > 32 << 20, (before, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer keeps what was freed")
def test_a_large_workspace_is_given_back():
    """In a process of its own, whose heap has no room left by others."""
    done = subprocess.run([sys.executable, "-c", WORKSPACE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
