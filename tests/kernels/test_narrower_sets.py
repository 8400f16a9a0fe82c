"""The tests marked isa again as on a machine with fewer instruction sets: the kernels', torch's and oneDNN's are held down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dwconv_ext

ROOT = Path(__file__).parents[2]
# What torch and oneDNN call the sets that the kernels are built for.
NAMES = {
    "baseline": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
}
FILES = [
    file
    for file in sorted(ROOT.glob("tests/*/test_*.py"))
    if re.search(r"^(@|pytestmark = )pytest\.mark\.isa", file.read_text(), re.MULTILINE)
]
NARROWER = [isa for isa in dwconv_ext._C.supported_isas() if isa in NAMES and isa != dwconv_ext._C.selected_isa()]


@pytest.mark.parametrize("isa", NARROWER)
def test_what_depends_on_instruction_sets(isa):
    torch_name, onednn_name = NAMES[isa]
    held = {"DWCONV_EXT_ISA": isa, "ATEN_CPU_CAPABILITY": torch_name, "ONEDNN_MAX_CPU_ISA": onednn_name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "isa and not slow", "-k", "not emulator"]
    command += map(str, FILES)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **held})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
