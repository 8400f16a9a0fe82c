"""Old and odd x86-64: what is chosen for CPUs and systems that are not here, and that it runs (tools/x86_cpus)."""

from __future__ import annotations

import json
import os
import platform
import re

import kernel_rows
import pytest
import x86_cpus
from calls import OPS
from x86_cpus import CPUS, OSXSAVE, QEMU, Cpu

import dwconv_ext
from dwconv_ext._extension import STAGES

_C = dwconv_ext._C
SETS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
EVERY_OP = {op for op in OPS if op not in STAGES and not op.endswith("_pack")} | {"depthwise_conv1d_step"}
ASK = str(x86_cpus.ROOT / "tools" / "x86_cpus" / "ask.py")

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


def check_ask(done, isa, refused=()):
    """What ask.py found: the set, the ops, and a sentence for each name that was refused."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sets = SETS[: SETS.index(isa) + 1]
    assert (found["selected"], found["supported"]) == (isa, sets)
    assert set(found["agreed"]) == EVERY_OP
    assert set(found["refused"]) == set(refused)
    for name, message in found["refused"].items():
        shown = re.sub(rb"[^ -~]", b"?", os.fsencode(name)).decode()
        assert message == f"DWCONV_EXT_ISA: '{shown}' is not available here; this CPU and build run: {', '.join(sets)}"


def test_nonsense_is_an_import_error():
    """And once it is put right, the same process imports the package."""
    nonsense = ["AVX2", " ", "baseline,avx2", "x" * 10_000, "é", "\udcff\udcfe"]
    done = x86_cpus.here(["-W", "ignore", ASK, *nonsense])
    check_ask(done, _C.supported_isas()[-1], nonsense)


# Here, with CPUID and XGETBV answered for another: what the compiled package asks, and that it runs what it chose.


@pytest.fixture(scope="module")
def pretence(tmp_path_factory):
    library = x86_cpus.build_pretence(tmp_path_factory.mktemp("pretence"))
    if library is None:
        pytest.skip("needs a C compiler, and Linux on a CPU whose CPUID can be made to fault")
    return library


@pytest.mark.parametrize(
    "name, changes, refuses_tiles, isa",
    [
        ("Nehalem", {}, False, "baseline"),
        ("Isaiah", {}, False, "baseline"),
        ("Haswell", {"leaf1_ecx": CPUS["Haswell"].leaf1_ecx & ~OSXSAVE}, False, "baseline"),
        ("Skylake-SP", {"xcr0": 0x7}, False, "avx2"),
        ("Sapphire Rapids", {"xcr0": 0xE7}, False, "avx512_bf16"),
        ("Sapphire Rapids", {}, True, "avx512_bf16"),
    ],
)
def test_as_another_cpu(pretence, name, changes, refuses_tiles, isa):
    if isa not in _C.supported_isas():
        pytest.skip(f"this CPU does not run {isa}")
    lacking = [*SETS[SETS.index(isa) + 1 :], "sse9"]
    cpu = CPUS[name]._replace(**changes)
    check_ask(x86_cpus.pretended(pretence, cpu, ["-W", "ignore", ASK, *lacking], refuses_tiles=refuses_tiles), isa, lacking)


def test_amx_that_this_system_itself_refuses(pretence):
    """The CPU is said to have it; Linux knows better."""
    if "amx" in _C.supported_isas() or "avx512_bf16" not in _C.supported_isas():
        pytest.skip("needs AVX512-BF16 and no AMX")
    done = x86_cpus.pretended(pretence, CPUS["Sapphire Rapids"], ["-W", "ignore", ASK, "amx"])
    check_ask(done, "avx512_bf16", ["amx"])
    assert "amx_tile" in json.loads(done.stdout.splitlines()[-1])["flags"]


# Under qemu-user, which executes the model's instructions and no others: an AVX instruction outside of the sets' own files would
# end the process.

needs_qemu = pytest.mark.skipif(QEMU is None, reason="no emulator: apt-get install qemu-user-static")


@needs_qemu
@pytest.mark.parametrize(
    "model, isa",
    [
        ("Nehalem", "baseline"),
        ("Haswell", "avx2"),
        pytest.param("qemu64", "baseline", marks=pytest.mark.slow),
        pytest.param("Opteron_G5", "baseline", marks=pytest.mark.slow),  # Piledriver, as far as it is emulated
        pytest.param("Haswell,-fma", "baseline", marks=pytest.mark.slow),
        pytest.param("Haswell,-f16c", "baseline", marks=pytest.mark.slow),
        pytest.param("Haswell,-xsave", "baseline", marks=pytest.mark.slow),  # AVX2 whose state nobody saves
        pytest.param("max", "avx2", marks=pytest.mark.slow),
    ],
)
def test_every_op_under_qemu(model, isa, tmp_path):
    lacking = [*SETS[SETS.index(isa) + 1 :], "sse9"]
    done = x86_cpus.emulated(model, ["-W", "ignore", ASK, *lacking], tmp_path, capture_output=True)
    check_ask(done, isa, lacking)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel_rows.build("c++", tmp_path_factory.mktemp("x86_64"))


@needs_qemu
@pytest.mark.slow  # minutes of compilation
@pytest.mark.parametrize("model, sets", [("Nehalem", SETS[:1]), ("Haswell,-fma", SETS[:1]), ("Haswell", SETS[:2])])
def test_every_row_under_qemu(program, model, sets):
    done = kernel_rows.run(program, [QEMU, "-cpu", model])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): \d+ rows, [1-9]", done.stdout, re.MULTILINE) == sets
    assert re.search(r"^\d+ passed, 0 failed$", done.stdout, re.MULTILINE)
