"""The kernels' rows on AArch64: cross-compiled without torch, run by an emulator of the processor (tools/kernel_rows)."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import kernel_rows
import pytest

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CLANG = next(filter(None, (shutil.which(f"clang++{version}") for version in ("", *(f"-{n}" for n in range(22, 15, -1))))), None)

emulated = [
    pytest.mark.slow,  # minutes of compilation
    pytest.mark.skipif(platform.machine() == "aarch64", reason="the suite itself runs them"),
    pytest.mark.skipif(COMPILER is None, reason="no cross compiler: apt-get install g++-aarch64-linux-gnu"),
    pytest.mark.skipif(QEMU is None, reason="no emulator: apt-get install qemu-user-static"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel_rows.build(COMPILER, tmp_path_factory.mktemp("aarch64"))


@pytest.mark.parametrize(
    "cpu, sets",
    [
        pytest.param("max", ["baseline", "neon", "neon_bf16"], marks=emulated),
        pytest.param("cortex-a72", ["baseline", "neon"], marks=emulated),
    ],
)
def test_every_row_that_the_cpu_has(program, cpu, sets):
    done = kernel_rows.run(program, [QEMU, "-cpu", cpu])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): \d+ rows, [1-9]", done.stdout, re.MULTILINE) == sets
    assert re.search(r"^\d+ passed, 0 failed$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("cpu", [pytest.param("cortex-a72", marks=emulated)])
def test_a_set_that_the_cpu_lacks_is_an_error(program, cpu):
    done = kernel_rows.run(program, [QEMU, "-cpu", cpu], isa="neon_bf16")
    wanted = "DWCONV_EXT_ISA: 'neon_bf16' is not available here; this CPU and build run: baseline, neon"
    assert done.returncode == 2 and done.stderr.strip() == wanted


@pytest.mark.skipif(CLANG is None, reason="no clang++ of version 16 or newer")
def test_clang_compiles_the_kernels_for_macos(tmp_path):
    """As far as it can without Apple's headers, of which the kernels need the memory functions alone."""
    version = re.search(r"version (\d+)", subprocess.run([CLANG, "--version"], capture_output=True, text=True).stdout)
    if version is None or int(version[1]) < 16:
        pytest.skip(f"{CLANG} is older than 16")
    (tmp_path / "string.h").write_text(
        '#include <stddef.h>\nextern "C" { void* memcpy(void*, const void*, size_t); void* memset(void*, int, size_t); }\n'
    )
    sources = [p for p in sorted(kernel_rows.ROOT.glob("csrc/cpu/kernels/isa/*.cpp")) if p.stem.startswith(("neon", "baseline"))]
    assert len(sources) == 12
    for source in sources:
        command = [
            CLANG,
            "--target=arm64-apple-macos13",
            "-ffreestanding",
            "-fsyntax-only",
            "-std=c++20",
            "-Wall",
            "-Wno-unused-function",
        ]
        command += ["-Werror", f"-I{kernel_rows.ROOT}/csrc", "-isystem", str(tmp_path), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
