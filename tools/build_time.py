"""``make build-time``: what each source file takes to compile, by the build's own commands, as docs/build_time.md keeps it.

Each command is run alone. Processor time is the compiler's and all of its children's, memory the largest of these processes'.
The unit T, which makes machines comparable: the processor time that ``g++ -O3 -std=c++20 -fPIC -c`` takes for a file that holds
only ``#include <torch/extension.h>``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

# torch is not imported: a child's peak memory begins with its parent's.
ROOT = Path(__file__).parent.parent
DEVELOPMENT = "8.0;9.0+PTX"  # the Makefile's
PAGE = """\
# What the build takes

Written by `make -s build-time > docs/build_time.md`: the build's own commands, each run alone.
Processor time is the compiler's and its children's, memory the largest process's. T is what
`g++ -O3 -std=c++20 -fPIC -c` takes for a file that holds only `#include <torch/extension.h>`.

{machine}

| what | processor time | in T | memory |
| --- | ---: | ---: | ---: |
| T | {unit:.1f} s | 1.00 | {memory:.0f} MB |"""


class Cost(NamedTuple):
    seconds: float
    megabytes: float


def measured(command: str, folder: str) -> Cost:
    process = subprocess.Popen(command, shell=True, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"build_time: this failed: {command}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def unit(folder: str) -> Cost:
    source = Path(folder, "unit.cpp")
    source.write_text("#include <torch/extension.h>\n")
    headers = Path(importlib.util.find_spec("torch").origin).parent / "include"
    includes = [f"-I{path}" for path in (headers, headers / "torch/csrc/api/include", sysconfig.get_path("include"))]
    return measured(shlex.join(["g++", "-O3", "-std=c++20", "-fPIC", "-c", *includes, str(source), "-o", f"{source}.o"]), folder)


def commands(folder: Path, architectures: str | None) -> dict[str, str]:
    """The compiler's command for each source file, of the CPU half or of the CUDA half for these architectures ("" for all).

    setup.py runs with a ninja that writes down what it would do, a linker that prints its version, and for the file that setup.py
    compiles itself an nvcc that does nothing.
    """
    ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts"), "ninja"))
    script = folder / "bin" / "ninja"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] && exec {ninja} $1\nexec {ninja} -t compdb > {folder}/compdb.$$\n")
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "DWCONV_EXT_CUDA": "0" if architectures is None else "1",
        "NVCC_APPEND_FLAGS": "--dryrun",
        "LDFLAGS": "--version",
    }
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    if architectures:
        environment["TORCH_CUDA_ARCH_LIST"] = architectures
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder), "--build-lib", str(folder / "lib")]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"setup.py failed: {done.stderr.strip()}")
    found: dict[str, str] = {}
    for database in folder.glob("compdb.*"):
        for entry in json.loads(database.read_text()):
            found[str(Path(entry["file"]).relative_to(ROOT))] = entry["command"]
            Path(entry["directory"], entry["output"]).parent.mkdir(parents=True, exist_ok=True)
    for line in done.stdout.splitlines():
        words = line.split()
        if words[1:] and words[0].endswith("nvcc") and "-c" in words:  # setup.py's own
            found[str(Path(words[words.index("-c") + 1]).relative_to(ROOT))] = line
    return {file: command for file, command in found.items() if file.startswith("csrc/cuda") == (architectures is not None)}


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts = f"torch {importlib.metadata.version('torch')}. {datetime.date.today().isoformat()}, commit {commit or 'unknown'}."
    return f"{model}, {os.cpu_count()} cores. {compiler}.\n{facts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", metavar="TEXT", default="", help="only source files whose path contains TEXT")
    parser.add_argument("--cpu", action="store_true", help="the CPU half alone")
    options = parser.parse_args()
    halves: dict[str, str | None] = {"CPU half": None}
    if not options.cpu:
        halves |= {f"CUDA half, {DEVELOPMENT}": DEVELOPMENT, "CUDA half, all architectures": ""}
    with tempfile.TemporaryDirectory(prefix="dwconv_ext_build_time_") as folder:
        one = unit(folder)
        rows, sums, costs = [], [], {}
        for i, (half, architectures) in enumerate(halves.items()):
            total = 0.0
            try:
                found = commands(Path(folder, str(i)), architectures)
            except RuntimeError as error:  # no nvcc, or a CPU-only torch
                print(f"build_time: {half} is left out: {error}", file=sys.stderr)
                continue
            for file, command in found.items():
                if options.files not in file:
                    continue
                cost = costs[file] = measured(command, str(Path(folder, str(i))))
                total += cost.seconds
                rows.append((half, file, cost))
                print(f"{half}: {file}: {cost.seconds:.1f} s", file=sys.stderr)
            sums.append((half, total))
    if not rows:
        sys.exit(f"build_time: no source file's path contains {options.files!r}")
    longest = max(costs, key=lambda file: costs[file].seconds)
    print(PAGE.format(machine=machine(), unit=one.seconds, memory=one.megabytes))
    for half, total in sums:
        print(f"| **{half}** | {total:.1f} s | {total / one.seconds:.2f} | |")
    for half, file, cost in sorted(rows, key=lambda row: (list(halves).index(row[0]), -row[2].seconds)):
        mark = "**" if file == longest and cost == costs[file] else ""
        figures = f"{cost.seconds:.1f} s | {cost.seconds / one.seconds:.2f} | {cost.megabytes:.0f} MB"
        print(f"| {mark}`{file}`{mark}{', all' if half.endswith('all architectures') else ''} | {figures} |")


if __name__ == "__main__":
    main()
