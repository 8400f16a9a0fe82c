"""Which instruction set is chosen on x86-64 CPUs and systems that are not here: tables of what they say of themselves."""

from __future__ import annotations

import platform
import re

import pytest
from x86_cpus import CPUS, Cpu

import dwconv_ext

_C = dwconv_ext._C
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64")


def chosen(cpu: Cpu, tiles_permitted: bool = True) -> str:
    return _C.x86_isa(**cpu.answers(), tiles_permitted=tiles_permitted)[0]


@pytest.mark.parametrize("name", CPUS)
def test_a_system_that_saves_all_registers(name):
    assert chosen(CPUS[name]) == CPUS[name].isa


@pytest.mark.parametrize(
    "name, xcr0, tiles_permitted, isa",
    [
        ("Haswell", 0x0, True, "baseline"),  # a kernel booted with noxsave
        ("Haswell", 0x3, True, "baseline"),
        ("Skylake-SP", 0x0, True, "baseline"),
        ("Skylake-SP", 0x3, True, "baseline"),
        ("Skylake-SP", 0x7, True, "avx2"),  # an older hypervisor
        ("Skylake-SP", 0x27, True, "avx2"),  # the masks alone,
        ("Skylake-SP", 0x67, True, "avx2"),  # without the upper 16 registers,
        ("Skylake-SP", 0xA7, True, "avx2"),  # without the upper halves of the lower
        ("Sapphire Rapids", 0x7, True, "avx2"),
        ("Sapphire Rapids", 0xE7, True, "avx512_bf16"),  # Linux before 5.16
        ("Sapphire Rapids", 0x202E7, True, "avx512_bf16"),  # the tiles' shapes and not the tiles
        ("Sapphire Rapids", 0x602E7, False, "avx512_bf16"),  # a sandbox
        ("Sapphire Rapids", 0x60007, True, "avx2"),  # tiles alone
        ("Haswell", -1 & 2**64 - 1, True, "avx2"),  # registers that it has not
        ("Merom", -1 & 2**64 - 1, True, "baseline"),
    ],
)
def test_a_system_that_forbids(name, xcr0, tiles_permitted, isa):
    cpu = CPUS[name]._replace(xcr0=xcr0)
    assert chosen(cpu, tiles_permitted) == isa
    flags = _C.x86_isa(**cpu.answers(), tiles_permitted=tiles_permitted)[1]
    assert ("avx512f" in flags) == (isa.startswith("avx512") or isa == "amx") and ("avx" in flags) == (isa != "baseline")


# Intel's manual, volume 2, CPUID; and the set that is left without the flag.
BITS = {
    "avx": ("leaf1_ecx", 28, "baseline"),
    "f16c": ("leaf1_ecx", 29, "baseline"),
    "fma": ("leaf1_ecx", 12, "baseline"),
    "avx2": ("leaf7_ebx", 5, "baseline"),
    "avx512f": ("leaf7_ebx", 16, "avx2"),
    "avx512dq": ("leaf7_ebx", 17, "avx2"),
    "avx512bw": ("leaf7_ebx", 30, "avx2"),
    "avx512vl": ("leaf7_ebx", 31, "avx2"),
    "avx512bf16": ("leaf7_1_eax", 5, "avx512"),
    "amx_bf16": ("leaf7_edx", 22, "avx512_bf16"),
    "amx_tile": ("leaf7_edx", 24, "avx512_bf16"),
}


@pytest.mark.parametrize("flag", BITS)
def test_a_cpu_that_lacks_one_flag(flag):
    leaf, bit, isa = BITS[flag]
    all_of_them = CPUS["Sapphire Rapids"]
    without = all_of_them._replace(**{leaf: getattr(all_of_them, leaf) & ~(1 << bit)})
    assert chosen(without) == isa
    flags = [_C.x86_isa(**cpu.answers(), tiles_permitted=True)[1] for cpu in (all_of_them, without)]
    assert set(flags[0]) == {"sse2", *BITS} and set(flags[1]) == {"sse2", *BITS} - {flag}


def test_this_cpu_is_read_as_linux_reads_it():
    try:
        with open("/proc/cpuinfo") as file:
            flags = re.search(r"^flags\s*:(.*)$", file.read(), re.MULTILINE)[1].split()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    named = {"avx512bf16": "avx512_bf16"}
    assert {named.get(flag, flag) for flag in _C.cpu_flags()} == {"sse2", *(named.get(f, f) for f in BITS)} & set(flags)
