"""The AVX-512, AVX512-BF16 and AMX kernels on any x86-64 CPU: compiled without their instructions, on NaN scratch, and tested."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_emulator import flags
from cuda_emulator import one_at_a_time

import dwconv_ext

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulated"
# Unoptimised, and without the kernels' forced inlining: the compiler takes minutes to schedule 64-byte vectors onto narrower
# registers, and the tests are small.
FLAGS = f"-O0 -w -Dalways_inline=unused {flags(ROOT)}"
FILES = (
    "kernels",
    "memory",
    "plan",
    "depthwise",
    "depthwise_packed",
    "conv_transpose",
    "conv1d",
    "separable",
    "pointwise",
    "inverted_residual",
    "patches",
    "squeeze_excitation",
    "channels",
    "fused_ds_conv",
    "batch_norm",
)

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx2" not in dwconv_ext._C.supported_isas(), reason="the emulation is compiled for AVX2"
)


@pytest.fixture(scope="module")
def library():
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    environment = {**os.environ, "DWCONV_EXT_CUDA": "0", "DWCONV_EXT_CXXFLAGS": FLAGS}
    with one_at_a_time(BUILD):
        done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "lib"


def test_every_row_case_and_block(library):
    files = [str(next(ROOT.glob(f"tests/*/test_{name}.py"))) for name in FILES]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={library} tests/support tests",
        "-k",
        "(avx512 or amx or random) and not emulator",
        "-m",
        "not slow",
        "-rA",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "DWCONV_EXT_ISA"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = set(re.findall(r"PASSED .*test_row\[(\w+)-", done.stdout))
    assert {"avx512", "avx512_bf16", "amx"} <= passed, sorted(passed)
