"""What importing costs and says, and what the build leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dwconv_ext import __main__
from tools import build_time, hopper

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done


IMPORT = """
import sys, time
import torch
before, begin = set(sys.modules), time.process_time()
import dwconv_ext
print(time.process_time() - begin, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_costs_little_beside_torch():
    """Processor time, which other programs lengthen little, the least of three; and only Python's own library comes along."""

    def seconds() -> float:
        first, *packages = python("-c", IMPORT).stdout.split()
        assert set(packages) <= {"dwconv_ext", *sys.stdlib_module_names}
        return float(first)

    assert any(seconds() <= 0.2 for _ in range(3))


COUNT = """
import torch
{imports}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    dwconv_ext.depthwise_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), padding=1)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "first",
    [
        "import dwconv_ext",
        "import torch.utils.flop_counter",
        "import dwconv_ext, importlib.util; importlib.util.find_spec('torch.utils.flop_counter')",  # looked for, not imported
    ],
)
def test_the_flop_counter_knows_the_ops_whatever_is_imported_first(first):
    done = python("-c", COUNT.format(imports=f"{first}\nimport dwconv_ext"))
    assert int(done.stdout) == 2 * 4 * 5 * 5 * 9


@pytest.mark.parametrize(
    "command",
    [
        ["examples/demo.py", "--help"],
        ["-m", "benchmarks", "depthwise", "--help"],
        ["setup.py", "-q", "--version"],
    ],
    ids=" ".join,
)
def test_torch_does_not_warn_of_a_toolkit_without_a_gpu(command, tmp_path):
    """Where torch's C++ build tools are imported they find a toolkit in CUDA_HOME, and no GPU."""
    said = python(*command, CUDA_HOME=str(tmp_path), DWCONV_EXT_CUDA="0", CUDA_VISIBLE_DEVICES="").stderr
    assert "CUDA_HOME" not in said


def made(*arguments: str) -> list[str]:
    """The commands that make would run."""
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=outside)
    return done.stdout.splitlines()


def test_make_installs_the_package_into_its_own_environment_alone():
    commands = made("-W", "pyproject.toml", "build")
    compiled = [i for i, command in enumerate(commands) if "setup.py -q build_ext --inplace" in command]
    installed = [i for i, command in enumerate(commands) if "pip install" in command and command.endswith("--no-deps -e .")]
    assert len(compiled) == len(installed) == 1 and compiled < installed
    commands = made("-W", "pyproject.toml", f"PYTHON={sys.executable}", "build")
    assert commands == [f"{sys.executable} setup.py -q build_ext --inplace"]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make makes")
def test_the_environment_holds_the_package(tmp_path):
    command = [sys.executable, "-c", "import dwconv_ext; print(dwconv_ext.__file__)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(ROOT / "dwconv_ext/__init__.py"), done.stderr
    done = subprocess.run([sys.executable, "examples/summary.py"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert "4,231,976" in done.stdout, done.stderr


@pytest.fixture
def setup_without_compilers(tmp_path):
    """setup.py where ninja is a shell script and linking does nothing; gives how it ended."""

    def run(ninja: str, *command: str) -> subprocess.CompletedProcess:
        script = tmp_path / "bin" / "ninja"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\n{ninja}\n")
        script.chmod(0o755)
        environment = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "LDFLAGS": "--version"}
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, **environment, "DWCONV_EXT_CUDA": "0"},
        )

    return run


def test_build_times_are_those_of_the_build_that_compiled(setup_without_compilers, tmp_path):
    objects = (
        "sed -n 's/^build \\(.*\\): compile .*/\\1/p' build.ninja | while read -r file; do mkdir -p ${file%/*}; touch $file; done"
    )
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib"]
    done = setup_without_compilers(f"{objects}; sleep 0.2", "build_ext", *folders, str(tmp_path / "first"))
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "first/dwconv_ext/_build_times.json").read_text())["_C"]
    assert first["compiled"] == first["files"] > 5 and first["elapsed_s"] >= 0.2 and first["processor_s"] >= 0
    done = setup_without_compilers("true", "build_ext", *folders, str(tmp_path / "second"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "second/dwconv_ext/_build_times.json").read_text()) == {"_C": first}


def test_an_editable_install_compiles_into_the_usual_folder(setup_without_compilers, tmp_path):
    done = setup_without_compilers(f"pwd > {tmp_path}/where; false", "editable_wheel", "--dist-dir", str(tmp_path))
    assert done.returncode != 0
    where = Path((tmp_path / "where").read_text().strip())
    assert where.parent == ROOT / "build" and where.name.startswith("temp.")


def test_the_report_says_how_long_the_build_took(tmp_path, monkeypatch):
    monkeypatch.setattr(__main__._C, "__file__", str(tmp_path / "_C.so"))
    assert __main__.report()["build"] == "not noted"
    halves = {"_C": (12, 14, 34.5, 60.1), "_C_cuda": (7, 7, 80.0, 99.9)}
    names = ("compiled", "files", "elapsed_s", "processor_s")
    times = {name: dict(zip(names, half, strict=True)) for name, half in halves.items()}
    (tmp_path / "_build_times.json").write_text(json.dumps(times))
    cpu = "CPU half 34.5 s, 60.1 s of processor time (12 of 14 files)"
    assert __main__.report()["build"] == f"{cpu}; CUDA half 80.0 s, 99.9 s of processor time (7 of 7 files)"


def test_build_time_measures_the_builds_own_commands(tmp_path):
    """Every source file of the CPU half, with the build's flags; and where it can be built, of the CUDA half."""
    found = build_time.commands(tmp_path / "cpu", None)
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").rglob("*.cpp")]
    assert set(found) == {str(path.relative_to(ROOT)) for path in sources}
    assert all(" -O3 -std=c++20 " in command and str(tmp_path) in command for command in found.values())
    if torch.version.cuda is None or shutil.which("nvcc") is None:
        return
    found = build_time.commands(tmp_path / "cuda", build_time.DEVELOPMENT)
    assert set(found) == {str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").rglob("*") if p.suffix in (".cu", ".cpp")}
    assert "sm_90a" in found[hopper.SOURCE] and not list(tmp_path.rglob("*.o"))
