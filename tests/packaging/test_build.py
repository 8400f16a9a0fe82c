"""setup.py's decisions, what a build is made of, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulator as emulator
import mutate
import pytest
import torch
from mutations import FAULTS

from dwconv_ext import _extension

ROOT = Path(__file__).parents[2]
HAS_CUDA_TORCH = torch.version.cuda is not None


def setup(*, cuda: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """setup.py as far as its decision: asking for the name builds nothing."""
    env = {k: v for k, v in os.environ.items() if k not in ("DWCONV_EXT_CUDA", "CUDA_HOME", "CUDA_PATH")}
    if cuda is not None:
        env["DWCONV_EXT_CUDA"] = cuda
    command = [sys.executable, "setup.py", "-q", "--name"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**env, **environment})


# Rows of csrc/cpu/kernels.inc over all instruction sets, x86-64's and AArch64's, and of csrc/cuda/kernels.inc: each is compiled
# in every build for such a machine.
INSTANCES = {"cpu": 587, "cuda": 488}


def cpu_instances() -> int:
    """As the preprocessor counts them: a CPU's own kernel table has no more than what it can run."""
    count = 0
    for unit in sorted((ROOT / "csrc" / "cpu" / "kernels" / "isa").glob("*.cpp")):
        defines = unit.read_text() + (ROOT / "csrc" / re.search(r'#include "(.*)"', unit.read_text())[1]).read_text()
        wanted = re.findall(r"^#define (?:DWCONV_VECTOR_BYTES|DWCONV_[A-Z0-9_]+$).*", defines, re.M)
        source = "\n".join([*wanted, f'#include "{ROOT}/csrc/cpu/kernels.inc"', ""])
        command = [os.environ.get("CXX", "c++"), "-E", "-P", "-x", "c++", "-"]
        rows = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
        found = len(re.findall(r"\bDWCONV_[A-Z_]+\(", rows))
        assert found > 0, unit
        count += found
    return count


@pytest.mark.parametrize("device", INSTANCES)
def test_kernel_instances_stay_few(device):
    """More of them must be worth every build's time: see docs/guide/adding-a-kernel.md, then change the number."""
    count = cpu_instances() if device == "cpu" else len(emulator.load().kernel_table())
    assert count <= 1.1 * INSTANCES[device], f"{count} kernel instances, {INSTANCES[device]} when last counted"
    assert count >= 0.9 * INSTANCES[device], f"{count} kernel instances: write the smaller number down"


def fake_toolkit(folder: Path, release: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("")
    nvcc = folder / "bin" / "nvcc"
    print_release = f"echo 'Cuda compilation tools, release {release}, V'"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --list-gpu-arch) echo compute_90;; *) {print_release};; esac\n")
    nvcc.chmod(0o755)
    return folder


def test_cuda_can_be_left_out():
    result = setup(cuda="0")
    assert result.returncode == 0, result.stderr
    assert "building the CPU half only: DWCONV_EXT_CUDA=0" in result.stderr


@pytest.mark.skipif(not HAS_CUDA_TORCH, reason="needs a CUDA build of torch")
def test_toolkit_of_torchs_major_version(tmp_path):
    major = torch.version.cuda.split(".")[0]
    result = setup(CUDA_HOME=str(fake_toolkit(tmp_path / "toolkit", f"{major}.9")))
    assert (
        result.returncode == 0 and f"building the CPU and CUDA halves: {tmp_path}/toolkit/bin/nvcc {major}.9" in result.stderr
    ), result.stderr


@pytest.mark.skipif(not HAS_CUDA_TORCH, reason="needs a CUDA build of torch")
def test_toolkit_of_another_major_version_is_refused(tmp_path):
    result = setup(CUDA_HOME=str(fake_toolkit(tmp_path / "toolkit", "11.8")))
    assert result.returncode != 0
    assert "is CUDA 11.8 but torch" in result.stderr and "DWCONV_EXT_CUDA=0" in result.stderr, result.stderr


@pytest.mark.skipif(HAS_CUDA_TORCH, reason="needs a CPU-only torch")
def test_cpu_only_torch():
    assert "is a CPU-only build" in setup().stderr
    assert setup(cuda="1").returncode != 0


def test_nonsense_is_refused():
    result = setup(cuda="yes")
    assert result.returncode != 0 and "DWCONV_EXT_CUDA: expected 0 or 1, got 'yes'" in result.stderr


@pytest.mark.parametrize("system, refused", [("Windows", True), ("Linux", False)])
def test_other_systems_are_refused_in_a_sentence(system, refused):
    code = (
        f"import platform, runpy, sys; platform.system = lambda: {system!r}\n"
        "sys.argv = ['setup.py', '-q', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {**os.environ, "DWCONV_EXT_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode != 0) == refused, done.stderr
    wanted = "is not supported: it is built for Linux on x86-64 or AArch64 and macOS on arm64"
    assert (wanted in done.stderr) == refused


PACKAGE = ROOT / "dwconv_ext"
WITH_EXAMPLES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0 and len(WITH_EXAMPLES) >= 7


def test_constraints_pin_what_is_required():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for extra in ("test", "bench", "examples", "dev", "wheel"):
        lines = subprocess.run(
            [sys.executable, "tools/requirements.py", extra], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        required = {re.split(r"[><=\[]", line)[0].lower().replace("_", "-") for line in lines.split()}
        assert required <= pinned, f"not pinned: {required - pinned}"


def test_unknown_extra():
    result = subprocess.run([sys.executable, "tools/requirements.py", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "no extra nonsense" in result.stderr


@pytest.mark.parametrize("path", [p for p in sorted((ROOT / "csrc").rglob("kernels/**/*")) if p.is_file()], ids=lambda p: p.name)
def test_kernel_files_are_torch_free(path):
    includes = re.findall(r"#include [<\"]([^>\"]+)", path.read_text())
    assert not [i for i in includes if i.startswith(("torch", "ATen", "c10"))]
    if "cpu" in path.parts:
        standard = {"stdint.h", "string.h", "immintrin.h", "arm_neon.h"}
        assert all(i in standard or (ROOT / "csrc" / i).exists() for i in includes)


ROOMS = ("common", "kernels", "plan", "runtime", "ops")  # each may include those before it and its own


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_no_include_goes_up(device):
    def room(path: str) -> int | None:
        parts = path.split("/")
        assert parts[0] in ("common", device) or len(parts) == 1, f"{path}: not of {device}"
        return 0 if parts[0] == "common" else ROOMS.index(parts[1]) if len(parts) > 2 else None

    for folder in ("common", device):
        for path in sorted((ROOT / "csrc" / folder).rglob("*.[hc]*")):
            own = room(str(path.relative_to(ROOT / "csrc")))
            for include in re.findall(r'#include "(.+)"', path.read_text()):
                wanted = room(include)
                assert None in (own, wanted) or wanted <= own, f"{path.relative_to(ROOT)} includes {include}"


@pytest.mark.skipif(not HAS_CUDA_TORCH, reason="needs a CUDA build of torch")
@pytest.mark.parametrize("built, says", [("11.8", "was built for CUDA 11.8"), ("DWCONV_EXT_CUDA=0", "was not built (DWCONV")])
def test_a_cuda_half_that_does_not_fit_is_not_loaded(built, says, monkeypatch):
    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: pytest.fail("it would register its kernels"))
    module, why = _extension.load_cuda(built)
    assert module is None and says in why


def test_every_planted_fault_finds_its_place():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("not a git checkout")
    for fault in FAULTS:
        path = ROOT / mutate.place(fault, files.stdout.split())
        assert mutate.planted(fault, path.read_text()) != path.read_text()


def test_importing_says_nothing():
    done = subprocess.run([sys.executable, "-c", "import dwconv_ext"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_sources_need_no_newer_headers_than_torch_2_10():
    header = Path(torch.__file__).parent / "include/torch/csrc/stable/ops.h"
    minimum, found = (2, 10), {}
    version = None
    for line in header.read_text().splitlines():
        if noted := re.search(r"Build time minimum version: PyTorch (\d+)\.(\d+)", line):
            version = (int(noted[1]), int(noted[2]))
        elif function := re.match(r"inline \S+ (\w+)\(", line):
            found.setdefault(function[1], version)
            version = None
    if not any(found.values()):
        pytest.skip("this torch's headers do not say since when they have what")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu")]
    used = {name for source in sources for name in re.findall(r"torch::stable::(\w+)\(", source.read_text())}
    assert used & found.keys() >= {"transpose", "empty", "contiguous"}
    assert {name for name in used if (found.get(name) or minimum) > minimum} == set()
