"""The package as on x86-64 CPUs and systems that are not here: what it chooses, and that every op runs (tools/x86_cpus)."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess

import kernel_rows
import pytest
import x86_cpus
from calls import OPS
from x86_cpus import CPUS, OSXSAVE, QEMU

import dwconv_ext
from dwconv_ext._extension import STAGES

_C = dwconv_ext._C
SETS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
EVERY_OP = {op for op in OPS if op not in STAGES and not op.endswith("_pack")} | {"depthwise_conv1d_step"}
ASK = str(x86_cpus.ROOT / "tools" / "x86_cpus" / "ask.py")

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64")


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


def test_the_library_alone_says_so_at_the_first_call():
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "torch.ops.dwconv_ext.global_average_pool(torch.ones(1, 1, 3, 3), True)"
    )
    done = x86_cpus.here(["-c", code, _C.__file__], DWCONV_EXT_ISA="sse9")
    assert done.returncode == 1 and "RuntimeError: DWCONV_EXT_ISA: 'sse9' is not available here" in done.stderr, done.stderr


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
    done = kernel_rows.run(program, [QEMU, "-cpu", model], readable="avx2" in sets)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): \d+ rows, [1-9]", done.stdout, re.MULTILINE) == sets
    assert re.search(r"^\d+ passed, 0 failed$", done.stdout, re.MULTILINE)


BASELINE = ["qemu64", "core2duo", "Penryn", "Nehalem", "SandyBridge", "IvyBridge", "Opteron_G4", "Opteron_G5"]
BASELINE += [f"Haswell,-{flag}" for flag in ("fma", "f16c", "avx2", "avx", "xsave")]
AVX2 = ["Haswell", "Broadwell", "EPYC", "Skylake-Server", "Cooperlake", "KnightsMill", "max"]  # no emulator of AVX-512


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("model, isa", [*((model, "baseline") for model in BASELINE), *((model, "avx2") for model in AVX2)])
def test_names_that_a_model_lacks(program, model, isa):
    has = SETS[: SETS.index(isa) + 1]
    for name in [*SETS[len(has) :], "sse9"]:
        done = kernel_rows.run(program, [QEMU, "-cpu", model], name)
        wanted = f"DWCONV_EXT_ISA: '{name}' is not available here; this CPU and build run: {', '.join(has)}"
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == wanted  # after the emulator's warnings


# What is in a set's instructions and not in a narrower one's, in GNU's assembler, and the sets whose functions may have it.
WIDER = {
    "avx2": (r"\tv[a-z]|\t(andn|bextr|bls\w+|s[ah][lr]x|rorx|mulx|pdep|pext|lzcnt)\b", SETS[1:]),
    "avx512": (r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", SETS[2:]),
    "avx512_bf16": (r"\tv(dp|cvtne2?ps2)bf16", SETS[3:]),
    "amx": (r"\t(tdp|tile|ldtile)", SETS[4:]),
}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump: apt-get install binutils")
def test_only_the_sets_own_functions_have_their_instructions():
    """All of the library, what no test runs too: a helper of the same name in two sets' files would be linked once, for both."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-j", ".text", _C.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    wider = [(name, re.compile(pattern), sets) for name, (pattern, sets) in WIDER.items()]
    function, isa, found, wrong = "", "", set(), set()
    for line in lines:
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
            own = re.search(r"6dwconv(?:4(avx2)|6(avx512)|11(avx512_bf16)|3(amx))", function)  # as names are mangled
            isa = own[own.lastindex] if own else ""
            continue
        for name, pattern, sets in wider:
            if pattern.search(line):
                found.add(name)
                if isa not in sets:
                    wrong.add((function, line.split("\t", 1)[1]))
    if not any("6dwconv" in line for line in lines if line.endswith(">:")):
        pytest.skip("the library's functions have no names: it is stripped")
    assert {"avx2", "avx512"} <= found
    assert not wrong, sorted(wrong)[:10]
