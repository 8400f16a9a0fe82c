"""Many callers at once: threads that share modules and caches, forked and spawned processes, interpreters that are refused."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocks import randomised
from torch import Tensor, nn

import dwconv_ext
from dwconv_ext import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConvTranspose2d, FusedDSConv, InvertedResidual

ROOT = Path(__file__).parents[2]
Job = Callable[[], list[Tensor]]


def picture(channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(2, channels, side, side).to(dtype).contiguous(memory_format=layout)


def inference(module: nn.Module, x: Tensor) -> Job:
    def job() -> list[Tensor]:
        with torch.no_grad():
            return [module(x)]

    return job


def gradients(module: nn.Module, x: Tensor) -> Job:
    """Of a module that others use at the same time: nothing is accumulated in its parameters."""

    def job() -> list[Tensor]:
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(given)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [given, *module.parameters()])]

    return job


def step(x: Tensor, w: Tensor) -> Job:
    def job() -> list[Tensor]:
        state = torch.zeros(2, x.shape[1], 3)
        return [dwconv_ext.depthwise_conv1d_step(x[..., t], state, w, act="silu") for t in range(4)] + [state]

    return job


def jobs() -> tuple[list[Job], list[Job]]:
    """Of modules in evaluation and in training mode, of several shapes, dtypes and layouts, each used by all threads; and those
    in which torch computes too, whose bits depend on the number of threads."""
    torch.manual_seed(0)
    found: list[Job] = []
    torchs: list[Job] = []
    serving = [randomised(m).eval() for m in (FusedDSConv(24, 40), InvertedResidual(24, 24, 1, 4), FusedDSConv(24, 24, stride=2))]
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for side in (7, 14, 33):
                x = picture(24, side, dtype, layout)
                found += [inference(m if dtype is torch.float32 else m.to(dtype), x) for m in copy.deepcopy(serving)]
                found.append(gradients(DepthwiseConv2d(24, 24, 5, padding=2, dtype=dtype), x))
                found.append(gradients(DepthwiseConvTranspose2d(24, 24, 4, 2, 1, dtype=dtype), x))
    for side in (8, 19):
        block = FusedDSConv(24, 40)
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None  # in training mode, for good
        torchs.append(gradients(block, picture(24, side, torch.float32, torch.channels_last)))
    line = torch.randn(2, 24, 301)
    found.append(gradients(DepthwiseConv1d(24, 24, 4, causal=True), line))
    found.append(step(line, torch.randn(24, 1, 4)))
    return found, torchs


def run_together(found: tuple[list[Job], list[Job]], threads: int, seconds: float) -> int:
    """How many jobs were done; raises what the first thread that failed raised."""
    torchs = found[1]
    work = found[0] + torchs
    torch.set_num_threads(1)
    wanted = [job() for job in work]
    until, done, failures = time.monotonic() + seconds, [0] * threads, []

    def caller(number: int) -> None:
        choose = random.Random(number)
        try:
            while time.monotonic() < until and not failures:
                if choose.random() < 0.05:
                    torch.set_num_threads(choose.choice((1, 2, 3)))
                if choose.random() < 0.01:
                    dwconv_ext.clear_caches()
                at = choose.randrange(len(work))
                for got, want in zip(work[at](), wanted[at], strict=True):
                    if work[at] in torchs:
                        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)  # of cancelled sums
                    else:
                        assert torch.equal(got, want), at
                done[number] += 1
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(threads)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    if failures:
        raise failures[0]
    return sum(done)


@pytest.fixture
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_kept")
def test_threads_get_what_one_alone_gets():
    assert run_together(jobs(), 64, 5) > 64


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.slow
@pytest.mark.usefixtures("threads_kept")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_ten_minutes_of_it():
    """Results as alone, and no growth of memory: each minute ends with no more than the second did, and a tenth."""
    work, sizes, count = jobs(), [], 0
    for _ in range(10):
        count += run_together(work, 64, 60)
        sizes.append(resident())
    print(f"{count} calls by 64 threads, resident MB after each minute: {[size >> 20 for size in sizes]}")
    assert max(sizes[2:]) < 1.1 * sizes[1], sizes


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


FORKED = """
import os, torch, dwconv_ext
torch.set_num_threads(2)
x, w = torch.randn(4, 32, 40, 40), torch.randn(32, 1, 3, 3)
block = dwconv_ext.FusedDSConv(32, 32).eval()
def results():
    with torch.no_grad():
        grads = torch.ops.dwconv_ext.depthwise_conv2d_backward(x, x, w, [1, 1], [1, 1], [1, 1], [True, True, True])
        return [t.numpy() for t in (dwconv_ext.depthwise_conv2d(x, w, padding=1), block(x), *grads)]  # torch.equal would hang
want = results()
def same():
    return all((a == b).all() for a, b in zip(results(), want))
def in_child(work):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0
assert in_child(lambda: same() and same() and in_child(same)), "the child differs"
assert same()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_with_several_threads():
    """A child of a process that has computed, and a child of that child."""
    done = python(FORKED, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout + done.stderr


LOADED = """
import torch, dwconv_ext
class Data(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i):
        return dwconv_ext.depthwise_conv2d(torch.full((1, 8, 9, 9), float(i)), torch.ones(8, 1, 3, 3))
if __name__ == "__main__":
    data = Data()
    want = torch.stack([data[i] for i in range(6)])
    for how in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context=how)
        assert torch.equal(torch.cat(list(loader)), want), how
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_data_loaders_after_use(tmp_path):
    (tmp_path / "loaded.py").write_text(LOADED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "loaded.py"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
try:
    import dwconv_ext
except ImportError as error:
    print("refused:", error)
'''
interpreters.run_string(interpreters.create(), code)
"""


def test_interpreters_that_are_refused():
    done = python(SUBINTERPRETER)
    assert "refused: dwconv_ext does not support subinterpreters" in done.stdout, done.stdout + done.stderr
    pretended = "sysconfig.get_config_var = lambda name, real=sysconfig.get_config_var: name == 'Py_GIL_DISABLED' or real(name)"
    done = python(f"import sysconfig; {pretended}; import dwconv_ext")
    assert done.returncode == 1 and "ImportError: dwconv_ext does not support free-threaded Python" in done.stderr, done.stderr


def test_working_memory_is_given_back():
    code = """
import torch, dwconv_ext
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) << 12
x, w = torch.randn(1, 1 << 15, 1, 1), torch.randn(1 << 15, 1, 9, 9)
dwconv_ext.depthwise_conv2d(x, w, padding=4)  # 10.6 MB of packed weights, which are kept
before = resident()
dwconv_ext.clear_caches()
assert before - resident() > 8 << 20, (before, resident())
"""
    if sys.platform != "linux" or "ASAN_OPTIONS" in os.environ:
        pytest.skip("/proc, without a sanitizer")
    done = python(code)
    assert done.returncode == 0, done.stderr
