"""The kernels' rows on AArch64: cross-compiled without torch, run by an emulator of the processor (tools/kernel_rows)."""

from __future__ import annotations

import platform
import re
import shutil

import kernel_rows
import pytest

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,  # a minute of compilation
    pytest.mark.skipif(platform.machine() == "aarch64", reason="the suite itself runs them"),
    pytest.mark.skipif(COMPILER is None, reason="no cross compiler: apt-get install g++-aarch64-linux-gnu"),
    pytest.mark.skipif(QEMU is None, reason="no emulator: apt-get install qemu-user-static"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel_rows.build(COMPILER, tmp_path_factory.mktemp("aarch64"))


@pytest.mark.parametrize("cpu, sets", [("max", ["baseline", "neon", "neon_bf16"]), ("cortex-a72", ["baseline", "neon"])])
def test_every_row_that_the_cpu_has(program, cpu, sets):
    done = kernel_rows.run(program, [QEMU, "-cpu", cpu])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): \d+ rows, [1-9]", done.stdout, re.MULTILINE) == sets
    assert re.search(r"^\d+ passed, 0 failed$", done.stdout, re.MULTILINE)


def test_a_set_that_the_cpu_lacks_is_an_error(program):
    done = kernel_rows.run(program, [QEMU, "-cpu", "cortex-a72"], isa="neon_bf16")
    wanted = "DWCONV_EXT_ISA: 'neon_bf16' is not available here; this CPU and build run: baseline, neon"
    assert done.returncode == 2 and done.stderr.strip() == wanted
