"""x86-64 CPUs that this machine is not: what they say of themselves, and two ways to run as one of them.

``CPUS`` has what CPUID answers on real ones, in InstLatx64's collection (github.com/InstLatx64/InstLatx64, commit 087af2c), and
the widest set of kernels that each runs under a system that saves all of its registers.

``emulated`` runs Python under qemu-user, which executes the instructions of the CPU that it is told to be and of no other; it has
AVX2 (from 7.2 on) and no AVX-512. ``pretended`` runs Python here, with CPUID, XCR0 and the system's answer about AMX replaced
(``pretend.cpp``): it shows what is chosen for CPUs and systems of any kind.

python tools/x86_cpus --help
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
OSXSAVE = 1 << 27  # of leaf 1's ECX: the system uses XSAVE, and XCR0 says what it saves


class Cpu(NamedTuple):
    """Registers of CPUID; xcr0 is all that the CPU can save (leaf 13)."""

    isa: str
    leaf1_ecx: int
    leaf7_ebx: int = 0
    leaf7_edx: int = 0
    leaf7_1_eax: int = 0
    xcr0: int = 0

    def answers(self) -> dict[str, int]:
        return {name: value for name, value in self._asdict().items() if name != "isa"}


CPUS = {
    "Merom": Cpu("baseline", 0x0000E3BD),
    "Nehalem": Cpu("baseline", 0x00BCE3BD),
    "Bobcat": Cpu("baseline", 0x00802209),
    "Jasper Lake": Cpu("baseline", 0x4FF8EBBF, 0x2394A2C3, 0xFC000400, 0, 0x3),  # XSAVE, no AVX
    "Sandy Bridge": Cpu("baseline", 0x1FBAE3FF, 0, 0, 0, 0x7),  # AVX alone
    "Bulldozer": Cpu("baseline", 0x1E98220B, 0, 0, 0, 0x7),  # AVX, and FMA of four operands, which the kernels do not use
    "Piledriver": Cpu("baseline", 0x3E98320B, 0x00000008, 0, 0, 0x7),  # FMA and F16C, no AVX2
    "Isaiah": Cpu("baseline", 0x76FA63AB | OSXSAVE, 0x000C25AB, 0, 0, 0x7),  # AVX2, no FMA; read under a system without XSAVE
    "Excavator": Cpu("avx2", 0x7ED8320B, 0x000001A9, 0, 0, 0x7),
    "Haswell": Cpu("avx2", 0x7FFAFBFF, 0x000027AB, 0, 0, 0x7),
    "KX-7000": Cpu("avx2", 0x7FFA73EB, 0x200C25AB, 0x24000000, 0, 0x207),
    "Knights Landing": Cpu("avx2", 0x7FF8F3BF, 0x1C0D23AB, 0, 0, 0xE7),  # AVX-512 without bytes, words and short vectors
    "Alder Lake": Cpu("avx2", 0x7FFAFBFF, 0x239CA7EB, 0xFC1CC410, 0x00400810, 0x207),
    "Skylake-SP": Cpu("avx512", 0x7FFEFBFF, 0xD39FFFFB, 0, 0, 0x2FF),
    "CNS": Cpu("avx512", 0x7FDA73AB, 0xF1BF67AB, 0xB4000000, 0, 0x2FF),
    "Genoa": Cpu("avx512_bf16", 0x7EFA320B, 0xF1BF97A9, 0x10000010, 0x00000020, 0x2E7),
    "Sapphire Rapids": Cpu("amx", 0x7FFEFBFF, 0xF3BFBFFB, 0xFFDD4430, 0x00001C30, 0x602E7),
    "Granite Rapids": Cpu("amx", 0x7FFEFBFF, 0xF3BFBFFB, 0xFFDD4430, 0x40201D30, 0x602E7),
}


def _environment(more: dict[str, str]) -> dict[str, str]:
    """One thread, which an emulator wants, and the best set unless `more` names another."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests/support", "tools"))
    kept = {name: value for name, value in os.environ.items() if name != "DWCONV_EXT_ISA"}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **more}


def emulator(program: str, model: str, folder: Path) -> Path:
    """A script that runs `program` under qemu-user: for what starts processes, which otherwise run on the CPU that is here."""
    assert QEMU is not None, "apt-get install qemu-user-static"
    script = Path(folder, Path(program).name)
    script.write_text(f'#!/bin/sh\nexec {QEMU} -cpu {model} {program} "$@"\n')
    script.chmod(0o755)
    return script


def emulated(model: str, arguments: list[str], folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Python's run with these arguments on a model that qemu-user knows, its child processes and C++ compiler too."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    environment = _environment({"CXX": str(emulator(compiler, model, folder))} if compiler else {})
    python = emulator(sys.executable, model, folder)
    return subprocess.run([str(python), *arguments], cwd=ROOT, env=environment, text=True, **options)


def build_pretence(folder: Path) -> Path | None:
    """The library, or None where it cannot be built or this CPU's CPUID does not fault."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        return None
    library = Path(folder, "pretend.so")
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", Path(__file__).with_name("pretend.cpp"), "-o", library], check=True
    )
    tried = subprocess.run(["true"], env={**os.environ, "LD_PRELOAD": str(library), "X86_CPU": "0 0 0 0 0"})
    return library if tried.returncode == 0 else None


def here(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Python's run with these arguments, and these variables in its environment."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=_environment(more), text=True, capture_output=True)


def pretended(library: Path, cpu: Cpu, arguments: list[str], *, refuses_tiles: bool = False) -> subprocess.CompletedProcess[str]:
    """The same as on this CPU; where refuses_tiles, under a system that refuses AMX."""
    names = {"LD_PRELOAD": str(library), "X86_CPU": " ".join(f"{value:x}" for value in cpu.answers().values())}
    return here(arguments, **names, **({"X86_NO_TILES": "1"} if refuses_tiles else {}))
