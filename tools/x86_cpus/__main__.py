"""The test suite on x86-64 CPUs that this machine is not, under qemu-user: a row each of what was chosen, passed and failed.

python tools/x86_cpus                   Nehalem and Haswell, all that is neither slow nor random: hours
python tools/x86_cpus --every 11        every 11th of these tests
python tools/x86_cpus Nehalem Haswell,-fma -- tests/ops/test_pointwise.py -k mobilenet

A model is one of `qemu-x86_64-static -cpu help`; what follows -- is pytest's, which prints to build/x86_cpus/MODEL.log. Exits
with the number of models on which a test failed or the process died.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from x86_cpus import ROOT, emulated

FOLDERS = ("tests/kernels", "tests/ops", "tests/nn")
# Not the CUDA kernels' emulator and the files that ask it, the random tests, which are many, those about CPUs that are not
# here, and that of memory, of which qemu 7.2 reads what AVX's masked loads leave out.
CUDA = ("emulator", "test_checks", "test_tuner", "test_training")
ELSEWHERE = ("emulated_isa", "narrower_sets", "isa_counts", "aarch64", "x86_isa", "x86_cpus")
CHOSEN = ["-m", "not slow", "-k", " and ".join(f"not {name}" for name in (*CUDA, "random", *ELSEWHERE, "test_memory"))]
SAMPLED = str(Path(__file__).with_name("sampled.py"))


def row(model: str, every: int, arguments: list[str]) -> tuple[str, bool]:
    log = ROOT / "build" / "x86_cpus" / f"{model}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as out:
        python = f"{folder}/{sys.executable.rsplit('/', 1)[-1]}"
        command = ["-u", SAMPLED, python, str(every), "-v", "-p", "no:cacheprovider", *arguments]
        code = emulated(model, command, folder, stdout=out, stderr=out).returncode
    text = log.read_text()
    sets = re.search(r"^dwconv_ext \S+, torch \S+, (.*)$", text, re.MULTILINE)
    counts = Counter(re.findall(r"^tests/\S+::.* (PASSED|FAILED|SKIPPED|ERROR) +\[", text, re.MULTILINE))
    end = "" if code in (0, 1) else f"ended with {code}; last: {text.splitlines()[-1][:80] if text else 'nothing'}"
    cells = [model, sets[1] if sets else "none", counts["PASSED"], counts["FAILED"] + counts["ERROR"], counts["SKIPPED"], end]
    return "| " + " | ".join(map(str, cells)) + " |", code == 0


def main() -> int:
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Nehalem", "Haswell"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th of the tests; best a prime number")
    options = parser.parse_args(given[:at])
    print("| model | sets, the last chosen | passed | failed | skipped | |\n| --- | --- | ---: | ---: | ---: | --- |", flush=True)
    failed = 0
    for model in options.models:
        line, passed = row(model, options.every, given[at + 1 :] or [*CHOSEN, *FOLDERS])
        print(line, flush=True)
        failed += not passed
    return failed


if __name__ == "__main__":
    sys.exit(main())
