"""Every row of the CPU's kernel table on small problems against float64: a program without torch or Python.

Planned by the package's own planner and called as the ops call them (``main.cpp``, ``depthwise.h``, ``blocks.h``), on tensors and
scratch that end where nothing may be read. It runs where there is no torch, under an emulator for one:

python tools/kernel_rows/__init__.py                                                              this machine
python tools/kernel_rows/__init__.py aarch64-linux-gnu-g++ qemu-aarch64-static -cpu max           AArch64 on x86-64, all sets
python tools/kernel_rows/__init__.py aarch64-linux-gnu-g++ qemu-aarch64-static -cpu cortex-a72    one without bfloat16
KERNEL_ROWS_READABLE=1 python tools/kernel_rows/__init__.py c++ qemu-x86_64-static -cpu Haswell   AVX2 (values.h)

The instruction set that DWCONV_EXT_ISA names runs alone, as in the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kernels/isa/*", "plan/*plan", "plan/heuristics", "runtime/*")
# The same kernels for fewer sizes, and little optimised: a minute of compilation instead of four.
FLAGS = ["-O1", "-DDWCONV_FEW_KERNELS"]


def build(compiler: str, folder: str | Path, flags: list[str] = FLAGS) -> Path:
    """The program, statically linked, so that an emulator needs nothing else."""
    sources = [
        *(p for pattern in SOURCES for p in sorted(ROOT.glob(f"csrc/cpu/{pattern}.cpp"))),
        Path(__file__).parent / "main.cpp",
    ]
    objects = []
    for source in sources:
        objects.append(str(Path(folder, source.stem + ".o")))
        options = ["-std=c++20", "-ffp-contract=fast", "-w", f"-I{ROOT}/csrc", *flags]
        subprocess.run([compiler, *options, "-c", str(source), "-o", objects[-1]], check=True)
    program = Path(folder, "kernel_rows")
    subprocess.run([compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def run(program: Path, emulator: list[str], isa: str = "", readable: bool = False) -> subprocess.CompletedProcess[str]:
    """readable: what lies behind tensors and scratch is NaN that may be read, for an emulator that does so (values.h)."""
    environment = {**os.environ, "DWCONV_EXT_ISA": isa, **({"KERNEL_ROWS_READABLE": "1"} if readable else {})}
    return subprocess.run([*emulator, str(program)], capture_output=True, text=True, env=environment)


if __name__ == "__main__":
    compiler, *emulator = sys.argv[1:] or ["c++"]
    with tempfile.TemporaryDirectory() as folder:
        done = run(build(compiler, folder), emulator, os.environ.get("DWCONV_EXT_ISA", ""))
    print(done.stdout + done.stderr, end="")
    sys.exit(done.returncode)
