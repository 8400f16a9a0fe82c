"""The AVX-512, AVX512-BF16 and AMX kernels on any x86-64 CPU with AVX2, from their own sources.

``include/`` stands before ``csrc/`` on the include path, with another of each of the three headers that see the instruction set:

    cpu/kernels/isa/isa_targets.h         what the compiler may use: AVX2, and no intrinsics of 64 bytes
    cpu/kernels/pointwise/amx_tiles.h     the tiles' instructions in software, with the checks that the processor makes
    cpu/runtime/isa_support.h             every set is there

Used by ``make sanitize``, tests/kernels/test_emulated_isa.py and tools/mutate.py. Prints the flags:

python tools/cpu_emulator/__init__.py
"""

from __future__ import annotations

from pathlib import Path


def flags(root: Path) -> str:
    """DWCONV_EXT_CXXFLAGS for the checkout at `root`: the emulation, scratch that begins as NaN, and the same kernels for fewer
    sizes."""
    return f"-iquote {root}/tools/cpu_emulator/include -DDWCONV_POISON_SCRATCH -DDWCONV_FEW_KERNELS"


if __name__ == "__main__":
    print(flags(Path(__file__).resolve().parents[2]))
