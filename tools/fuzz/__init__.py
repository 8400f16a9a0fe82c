"""libFuzzer on what is computed before a kernel runs, without torch: a crash, a hang, an overflow or a false invariant ends it.

    python tools/fuzz/__init__.py --seconds 1200      # each of the targets, one after the other; needs clang with libFuzzer
    python tools/fuzz/__init__.py --target cpu_plans

Targets: ``cpu_plans`` and ``cuda_plans``, every plan of any problem that the ops' checks let through on any machine;
``packed``, the headers and places of packed weights. Prints a row a target and exits with the number that failed; the input that
failed is kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
BUILD = ROOT / "build/fuzz"
# What the targets look at, checked for everything undefined, and the rest, whose scratch sizes and tables they use.
CHECKED = {
    "cpu_plans": ("cpu/plan/*plan", "cpu/plan/heuristics", "cpu/runtime/pack_weights"),
    "cuda_plans": ("cuda/plan/*",),
    "packed": ("cpu/plan/*plan", "cpu/plan/heuristics", "cpu/runtime/pack_weights"),
}
KERNELS = ("cpu/kernels/isa/*", "cpu/runtime/cpu_features")  # the compiler's that builds the package
PLAIN = {"cpu_plans": KERNELS, "cuda_plans": (), "packed": KERNELS}
SANITIZERS = "-fsanitize=undefined,address,fuzzer-no-link"
FATAL = "-fno-sanitize-recover=all"
COMMON = ["-std=c++20", "-w", "-O1", "-g1", "-ffp-contract=fast", "-DDWCONV_FEW_KERNELS", f"-I{ROOT}/csrc", f"-I{FOLDER}"]


def has_libfuzzer(compiler: str) -> bool:
    source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    options = ["-x", "c++", "-", "-fsanitize=fuzzer,address,undefined", "-o", os.devnull]
    try:
        return subprocess.run([compiler, *options], input=source, text=True, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def cuda_groups() -> str:
    """C++ that makes the kernel groups of kernels.inc, one after the other, without their kernels."""
    table = (ROOT / "csrc/cuda/kernels.inc").read_text()
    groups = sorted(set(re.findall(r"defined\((DWCONV_GROUP_\w+)\)", table)))
    made = []
    for group in groups:
        space = group.lower()
        name = group.removeprefix("DWCONV_GROUP_").lower()
        made.append(
            f'namespace {space} {{\nstatic const KernelRow kRows[] = {{\n#define {group}\n#include "cuda/kernels.inc"\n}};\n}}'
        )
        made.append(
            f"KernelGroup {name}_kernels() {{ return {{{space}::kRows, sizeof {space}::kRows / sizeof *{space}::kRows}}; }}"
        )
    return "\n".join(made) + "\n"


def build(target: str, compiler: str) -> Path:
    """The target's program; each source file is compiled once, in build/fuzz."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "cuda_groups.inc").write_text(cuda_groups())
    objects = []

    def compile_(source: Path, flags: list[str], label: str, by: str = compiler) -> None:
        made = BUILD / f"{label}-{source.stem}.o"
        read = [source, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.inc")]
        if label == "target":
            read += FOLDER.glob("*.h")
        if not made.exists() or made.stat().st_mtime < max(file.stat().st_mtime for file in read):
            hopper = ["-DDWCONV_HOPPER"] if "cuda" in str(source) else []
            command = [by, *COMMON, *flags, *hopper, f"-I{BUILD}", "-c", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
        objects.append(str(made))

    for pattern in CHECKED[target]:
        for source in sorted((ROOT / "csrc").glob(pattern + ".cpp")):
            compile_(source, [SANITIZERS, FATAL], source.parts[-3])
    for pattern in PLAIN[target]:
        for source in sorted((ROOT / "csrc").glob(pattern + ".cpp")):
            compile_(source, [], "kernels", os.environ.get("CXX", "c++"))
    compile_(FOLDER / f"{target}.cpp", [SANITIZERS, FATAL], "target")
    program = BUILD / target
    subprocess.run([compiler, "-fsanitize=undefined,address,fuzzer", *objects, "-o", str(program)], check=True)
    return program


@dataclass
class Outcome:
    target: str
    executions: int
    edges: int
    seconds: int
    output: str
    passed: bool


def run(target: str, compiler: str, seconds: int) -> Outcome:
    program = build(target, compiler)
    corpus = BUILD / f"corpus-{target}"
    corpus.mkdir(exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-max_len=512", f"-artifact_prefix={BUILD}/{target}-"]
    done = subprocess.run([str(program), *limits, "-print_final_stats=1", str(corpus)], capture_output=True, text=True)
    ran = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    return Outcome(
        target, int(ran[1]) if ran else 0, int(edges[-1]) if edges else 0, seconds, done.stderr[-6000:], done.returncode == 0
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=1200, help="of each target (default: %(default)s)")
    parser.add_argument("--target", choices=CHECKED, action="append", help="this one alone")
    parser.add_argument(
        "--compiler", default=os.environ.get("CLANG", "clang++"), help="clang with libFuzzer (default: %(default)s)"
    )
    options = parser.parse_args()
    if not has_libfuzzer(options.compiler):
        parser.error(f"{options.compiler} is no clang with libFuzzer: name one by --compiler")
    failed = 0
    print("| target | executions | edges | seconds | |\n| --- | ---: | ---: | ---: | --- |")
    for target in options.target or CHECKED:
        found = run(target, options.compiler, options.seconds)
        how = "passed" if found.passed else "FAILED"
        print(f"| {target} | {found.executions:,} | {found.edges} | {found.seconds} | {how} |", flush=True)
        if not found.passed:
            failed += 1
            print(found.output, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
