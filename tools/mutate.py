"""Plants the faults of mutations/, one at a time, and reports which of them the tests find.

    python tools/mutate.py                 all, and writes docs/mutations.md
    python tools/mutate.py NAME ...        these alone, and writes nothing
    python tools/mutate.py --first         without the tests that are not named with the fault

What is changed is a copy of the checkout in build/mutants. Faults in C++ are compiled into it all at once, each beside what it
replaces, and the environment variable DWCONV_PLANTED chooses one when the library is loaded; the copy is compiled as the tests'
emulated build is (test_emulated_isa.py), so that every instruction set's kernels run on any machine, and the CUDA kernels
run in the emulator. Faults in Python are written into the copy and taken out again.

A fault is found where a test fails, or its process dies, with it, and the same test passes without any. The tests named with the
fault are tried first; where they pass, all others. What is found by neither is a test to write, or no fault.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo  # with what else the tests import: run_tests
from cpu_emulator import flags
from mutations import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
PAGE = ROOT / "docs" / "mutations.md"
FLAGS = f"-O0 -w {flags(COPY)}"
FIRST_SECONDS, ALL_SECONDS = 1200, 7200  # of a test run

# Tests of how the package is built, packed and shown, which build it themselves: none of a fault's business.
APART = ("emulated_isa", "x86_cpus", "build", "cuda_build", "benchmarks", "examples", "traffic")

HEADER = """#pragma once
extern const unsigned long planted_fault;
static inline __attribute__((always_inline)) bool planted(unsigned long fault) { return planted_fault == fault; }
"""
SOURCE = """#include "{header}"
#include <stdlib.h>
static unsigned long chosen() {{
  const char* const number = getenv("DWCONV_PLANTED");
  return number == nullptr ? 0 : strtoul(number, nullptr, 10);
}}
const unsigned long planted_fault = chosen();
"""
# One for the CPU library and one for the emulator's: their builds take all sources of these names.
SOURCES = ("csrc/cpu/ops/planted_fault.cpp", "csrc/cuda/plan/planted_fault.cpp")


def number(fault: Fault) -> int:
    """Which stays the same where others come and go, so that little is compiled anew."""
    return zlib.crc32(fault.name.encode())


def is_python(fault: Fault) -> bool:
    return fault.file.endswith(".py")


def place(fault: Fault, files: list[str]) -> str:
    """The fault's file, a path from the root."""
    found = [file for file in files if f"/{file}".endswith(f"/{fault.file}")]
    if len(found) != 1:
        raise SystemExit(f"{fault.name}: {len(found)} files are called {fault.file}: {found}")
    return found[0]


def planted(fault: Fault, text: str) -> str:
    """The file's text with the fault in it: beside what it replaces in C++, in its place in Python."""
    before, part, after = re.split("[«»]", fault.text) if "«" in fault.text else ("", fault.text, "")
    if (count := text.count(before + part + after)) != 1:
        raise SystemExit(f"{fault.name}: {fault.file} has its text {count} times, not once: look at the source that moved on")
    if is_python(fault):
        wrong = fault.wrong
    elif part.endswith(";"):
        wrong = f"if (::planted({number(fault)}ul)) {{ {fault.wrong} }} else {{ {part} }}"
    else:
        wrong = f"(::planted({number(fault)}ul) ? ({fault.wrong}) : ({part}))"
    return text.replace(before + part + after, before + wrong + after)


def write(path: Path, content: bytes) -> None:
    """Where it changes anything: what is as it was is not compiled again."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def make_copy() -> list[str]:
    """The checkout as it is, every C++ fault in it; the copied files."""
    files = [file for file in git("ls-files", "-co", "--exclude-standard").splitlines() if (ROOT / file).is_file()]
    sources = {file for file in files if file.startswith(("csrc/", "dwconv_ext/"))}
    texts: dict[str, str] = {}
    for fault in FAULTS:
        file = place(fault, sorted(sources))
        text = planted(fault, texts.get(file) or (ROOT / file).read_text())  # in Python a look whether it can be
        if not is_python(fault):
            texts[file] = text
    header = COPY / "csrc" / "planted_fault.h"
    for path in [*(COPY / "tests").rglob("*.py"), *(COPY / "dwconv_ext").rglob("*.py")]:  # of an earlier checkout
        if str(path.relative_to(COPY)) not in files:
            path.unlink()
    for file in files:
        content = f'#include "{header}"\n{texts[file]}'.encode() if file in texts else (ROOT / file).read_bytes()
        write(COPY / file, content)
    write(header, HEADER.encode())
    for source in SOURCES:
        write(COPY / source, SOURCE.format(header=header).encode())
    return sorted(sources)


def build() -> None:
    environment = {**os.environ, "DWCONV_EXT_CUDA": "0", "DWCONV_EXT_CXXFLAGS": FLAGS}
    for command in (["setup.py", "-q", "build_ext", "--inplace"], ["tools/cuda_emulator/__init__.py"]):
        subprocess.run([sys.executable, *command], cwd=COPY, env=environment, check=True)


@dataclass
class Outcome:
    fault: Fault
    test: str = ""  # that found it
    how: str = ""  # "fails", "dies" or, where none found it, why
    seconds: float = 0

    @property
    def found(self) -> bool:
        return bool(self.test)


def run_tests(arguments: list[str], fault: Fault | None, seconds: float) -> tuple[int, str]:
    """pytest in the copy: its return code, negative where a signal ended it, and what it printed.

    In a fork of this process, which has imported torch: what takes longest of most runs is done once.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            os.chdir(COPY)
            os.environ.pop("DWCONV_EXT_ISA", None)
            if fault is not None:
                os.environ["DWCONV_PLANTED"] = str(number(fault))
                sys.dont_write_bytecode = is_python(fault)
            code = pytest.main(["-v", "-rfE", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", *arguments])
            sys.stdout.flush()
            os._exit(code)
        end = time.monotonic() + seconds
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 124, f"no end after {seconds} s"
            time.sleep(0.05)
        output.seek(0)
        return os.waitstatus_to_exitcode(status[1]), output.read().decode(errors="replace")


def look_for(fault: Fault, all_tests: bool) -> Outcome:
    runs = [(shlex.split(fault.tests), FIRST_SECONDS)]
    if all_tests:
        apart = (next((COPY / "tests").rglob(f"test_{name}.py")) for name in APART)
        runs.append((["tests", "-m", "not slow", *(f"--ignore={path}" for path in apart)], ALL_SECONDS))
    for arguments, seconds in runs:
        code, out = run_tests(["-x", *arguments], fault, seconds)
        failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", out, re.MULTILINE)
        begun = re.findall(r"^(tests/\S+::.+?)(?: (?:PASSED|FAILED|SKIPPED|XFAIL|ERROR).*)?$", out, re.MULTILINE)
        if code == 1 and failed:
            return Outcome(fault, failed[0], "fails")
        if code < 0 and begun:
            return Outcome(fault, begun[-1].split(" Fatal Python error")[0], "dies")
        if code != 0:
            return Outcome(fault, how=f"pytest {shlex.join(arguments)} gave {code}: {out[-2000:]}")
    return Outcome(fault, how="no test fails")


def try_fault(fault: Fault, files: list[str], all_tests: bool) -> Outcome:
    began = time.perf_counter()
    if not is_python(fault):
        outcome = look_for(fault, all_tests)
    else:
        file = place(fault, files)
        right = (ROOT / file).read_text()
        try:
            (COPY / file).write_text(planted(fault, right))
            outcome = look_for(fault, all_tests)
        finally:
            (COPY / file).write_text(right)
    outcome.seconds = time.perf_counter() - began
    return outcome


def check_without(outcomes: list[Outcome]) -> None:
    """The tests that found something must pass where nothing is planted."""
    tests = sorted({outcome.test for outcome in outcomes if outcome.found})
    code, out = run_tests(tests, None, ALL_SECONDS) if tests else (0, "")
    if code == 0:
        return
    failed = set(re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", out, re.MULTILINE))
    if not failed:
        raise SystemExit(f"without a fault the tests don't end as they should ({code}):\n{out[-4000:]}")
    for outcome in outcomes:
        if outcome.test in failed:
            outcome.test, outcome.how = "", f"{outcome.test} fails without the fault too"


def machine() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}"


def page(outcomes: list[Outcome]) -> str:
    found = sum(outcome.found for outcome in outcomes)
    text = (
        f"`python tools/mutate.py` plants the faults of `tools/mutations/`, one at a time, and runs the tests: {found} of "
        f"{len(outcomes)} are found. {machine()}, commit {git('describe', '--always', '--dirty').strip()}, "
        f"{time.strftime('%Y-%m-%d')}. The test named is the first that failed; the seconds are those until then."
    )
    entries = []
    for o in outcomes:
        found_by = (
            f"found by `{o.test.removeprefix('tests/')}`{' (dies)' * (o.how == 'dies')}" if o.found else f"**not found**: {o.how}"
        )
        entry = f"- **{o.fault.name}** ({o.fault.file}): {o.fault.imitates}; {found_by}, {o.seconds:.0f} s"
        entries.append(textwrap.fill(entry, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(["# Planted faults", "", textwrap.fill(text, 100), "", *entries, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults of mutations/; all where none is named")
    parser.add_argument("--first", action="store_true", help="run only the tests that are named with the fault")
    names, first = vars(parser.parse_args()).values()
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    files = make_copy()
    build()
    outcomes = []
    for fault in FAULTS:
        if names and fault.name not in names:
            continue
        outcomes.append(try_fault(fault, files, not first))
        last = outcomes[-1]
        print(f"{fault.name:24} {last.seconds:6.0f} s  {last.test or 'NOT FOUND: ' + last.how}", flush=True)
    check_without(outcomes)
    if not names:
        PAGE.write_text(page(outcomes))
    missed = [outcome for outcome in outcomes if not outcome.found]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} found")
    sys.exit("\n".join(f"{outcome.fault.name}: {outcome.how}" for outcome in missed) or 0)


if __name__ == "__main__":
    main()
