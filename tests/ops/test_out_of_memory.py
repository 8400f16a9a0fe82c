"""No memory: an error that says what was wanted, nothing leaked, and the next call right.

Each allocation of a call fails once: a library that the process is started with (LD_PRELOAD) counts those by which torch and the
kernels take memory, and refuses one. The C library's malloc itself never fails here: it is Python's and torch's own too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import OPS
from torch import nn

import dwconv_ext
from dwconv_ext._extension import STAGES

ROOT = Path(__file__).parents[2]

FAILING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
static atomic_long count, refused = -1;
static int is_refused(void) { return atomic_fetch_add(&count, 1) == atomic_load(&refused); }
void refuse(long n) { atomic_store(&count, 0); atomic_store(&refused, n); }
long allocations(void) { return atomic_load(&count); }
int posix_memalign(void** to, size_t alignment, size_t size) {
  static int (*next)(void**, size_t, size_t);
  if (!next) next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  return is_refused() ? ENOMEM : next(to, alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*next)(size_t, size_t);
  if (!next) next = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  return is_refused() ? NULL : next(alignment, size);
}
"""

EACH_FAILS = r"""
import ctypes, sys
import torch
from calls import PLAIN, valid
import dwconv_ext

failing = ctypes.CDLL(sys.argv[1])
allocations = failing.allocations
allocations.restype = ctypes.c_long

def is_image(value):
    return isinstance(value, torch.Tensor) and value.dim() == 4

def call(op, arguments):
    result = getattr(torch.ops.dwconv_ext, op)(**arguments)
    return result if isinstance(result, (tuple, list)) else [result]

for op in sys.argv[2:]:
    for how in (PLAIN, {**PLAIN, "layout": "channels_last", "dtype": torch.bfloat16}):
        arguments = valid(op, {**how, "channels": 64, "out_channels": 96})
        strided = {name: value.mT.contiguous().mT if is_image(value) else value for name, value in arguments.items()}
        for given in (arguments, strided):
            want = call(op, given)
            refused = 0
            while True:
                dwconv_ext.clear_caches()  # so that the working memory is taken anew
                failing.refuse(ctypes.c_long(refused))
                try:
                    got = call(op, given)
                except RuntimeError as error:
                    assert "llocat" in str(error) or "memory" in str(error), error
                    told = str(error)
                else:
                    told = None
                made = allocations()
                failing.refuse(ctypes.c_long(-1))
                if told is None:
                    assert made <= refused, (op, refused, made)  # all have been refused
                    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(got, want, strict=True)), op
                    break
                refused += 1
                assert refused < 50, op
            assert refused > 0, op
            print(op, refused, told)
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None or "ASAN_OPTIONS" in os.environ:
        pytest.skip("needs Linux's LD_PRELOAD, a C compiler and no sanitizer")
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.c").write_text(FAILING)
    library = folder / "failing.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", folder / "failing.c", "-o", library, "-ldl"], check=True)
    return library


def test_each_allocation_of_each_op_fails_once(failing):
    on_cpu = [op for op in OPS if op not in STAGES and not op.startswith("depthwise_norm") and op != "depthwise_conv2d_pooled"]
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    environment = {**os.environ, "LD_PRELOAD": str(failing), "PYTHONPATH": path}
    command = [sys.executable, "-c", EACH_FAILS, str(failing), *on_cpu]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(on_cpu)


HUGE = 1 << 19


@pytest.mark.parametrize(
    "op, call, shape",
    [
        (
            "depthwise_conv2d",
            lambda x: dwconv_ext.depthwise_conv2d(x, torch.ones(4, 1, 3, 3), padding=HUGE),
            "[1, 4, 1048579, 1048579]",
        ),
        (
            "depthwise_conv2d",
            lambda x: nn.Sequential(dwconv_ext.DepthwiseConv2d(4, 4, 3, padding=HUGE))(x),
            "[1, 4, 1048579, 1048579]",
        ),
        (
            "depthwise_conv_transpose2d",
            lambda x: dwconv_ext.depthwise_conv_transpose2d(x, torch.ones(4, 1, 3, 3), stride=HUGE),
            "[1, 4, 2097155, 2097155]",
        ),
        ("separable_conv2d", lambda x: dwconv_ext.FusedDSConv(4, 8, padding=HUGE).eval()(x), "[1, 8, 1048579, 1048579]"),
    ],
)
@torch.no_grad()
def test_an_output_that_does_not_fit(op, call, shape):
    size = torch.Size(eval(shape)).numel() * 4
    with pytest.raises(RuntimeError) as caught:
        call(torch.ones(1, 4, 5, 5))
    wanted = f"{op}: DefaultCPUAllocator: can't allocate memory: Tried to allocate {size} bytes for a tensor of shape {shape}"
    assert wanted in str(caught.value) and "dtype torch.float32" in str(caught.value)
