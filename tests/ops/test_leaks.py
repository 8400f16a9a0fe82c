"""Ten thousand calls of each op hold no more memory than the calls before: none leaks a byte a call."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from calls import OPS

from dwconv_ext._extension import STAGES

ROOT = Path(__file__).parents[2]
CALLS = 10_000

COUNT = r"""
import ctypes, gc, sys
import torch
from calls import PLAIN, valid
import dwconv_ext

class Mallinfo(ctypes.Structure):  # malloc.h's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def in_use():
    gc.collect()
    now = mallinfo()
    return now.uordblks + now.hblkhd

torch.set_num_threads(1)
leak, calls = sys.argv[1] == "leak", int(sys.argv[2])
kept = []
for op in sys.argv[3:]:
    call = getattr(torch.ops.dwconv_ext, op)
    arguments = valid(op, {**PLAIN, "layout": "channels_last"})
    for _ in range(100):  # workspaces, plans, torch's own caches
        call(**arguments)
    first = next(name for name, value in arguments.items() if isinstance(value, torch.Tensor))
    wrong, refused = {**arguments, first: arguments[first].new_zeros(())}, 0
    try:
        call(**wrong)
    except RuntimeError:
        pass
    before = in_use()
    for i in range(calls):
        result = call(**arguments)
        if i % 4 == 0:  # and one that is refused
            try:
                call(**wrong)
            except RuntimeError:
                refused += 1
        if leak:
            kept.append(torch.empty(0))  # an object of some hundred bytes
    del result
    assert refused == (calls + 3) // 4, op
    print(op, in_use() - before)
"""


def grown(how: str, ops: list[str], calls: int = CALLS) -> dict[str, int]:
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    command = [sys.executable, "-c", COUNT, how, str(calls), *ops]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return {op: int(bytes_) for op, bytes_ in map(str.split, done.stdout.splitlines())}


ON_CPU = [op for op in OPS if op not in STAGES and not op.startswith("depthwise_norm") and op != "depthwise_conv2d_pooled"]


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's mallinfo2")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer has its own allocator")
def test_no_op_leaks():
    found = grown("", ON_CPU)
    assert set(found) == set(ON_CPU)
    assert max(found.values()) < CALLS, found
    assert grown("leak", ON_CPU[:1], 1000)[ON_CPU[0]] > 1000  # it would be seen
