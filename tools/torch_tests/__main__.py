"""PyTorch's own tests with its depthwise convolutions routed to this package, beside the same tests without.

    python tools/torch_tests FOLDER     # a checkout of PyTorch, of which its tests alone are read

Runs test/nn/test_convolution.py and, of test_ops, test_ops_gradients, test_ops_fwd_gradients, the tests of the four convolutions.
Prints a row a file, and each test that passes without us and does not with us; exits with their number.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPS = "(nn_functional_conv1d or nn_functional_conv2d or conv_transpose1d or conv_transpose2d) and not cuda"
FILES = {
    "nn/test_convolution.py": "",
    "test_ops.py": OPS,
    "test_ops_gradients.py": OPS,
    "test_ops_fwd_gradients.py": OPS,
    "functorch/test_ops.py": OPS,
}


def outcomes(file: Path, chosen: str, routed: bool) -> tuple[dict[str, str], str]:
    """Each test's outcome, and the plugin's line of calls."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "routed",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        file.name,
    ]
    path = os.pathsep.join([str(ROOT / "tools" / "torch_tests"), str(ROOT), str(file.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "DWCONV_ROUTE": str(int(routed)), "PYTORCH_TEST_WITH_SLOW": "0"}
    done = subprocess.run(
        [*command, *(["-k", chosen] if chosen else [])], cwd=file.parent, env=environment, capture_output=True, text=True
    )  # fmt: skip
    found = {name: kind for kind, name in re.findall(r"^(PASSED|FAILED|XFAIL|XPASS|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)}
    if not found:
        sys.exit(f"torch_tests: {file} ran no test:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found, next((line for line in done.stdout.splitlines() if line.startswith("depthwise calls")), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of PyTorch")
    parser.add_argument("--only", choices=FILES, action="append", help="these files alone")
    options = parser.parse_args()
    worse: list[str] = []
    print(f"{'file':28} {'tests':>6} {'pass: torch':>12} {'with ours':>10}   calls routed")
    for name in options.only or FILES:
        file = options.folder / "test" / name
        if not file.is_file():
            sys.exit(f"torch_tests: {file} is missing: the folder must be a checkout of PyTorch")
        torchs, _ = outcomes(file, FILES[name], False)
        ours, calls = outcomes(file, FILES[name], True)
        passed = [sum(kind in ("PASSED", "XFAIL") for kind in each.values()) for each in (torchs, ours)]
        print(f"{name:28} {len(torchs):6} {passed[0]:12} {passed[1]:10}   {calls.partition(': ')[2]}", flush=True)
        worse += [f"{name}: {test}" for test, kind in torchs.items() if kind == "PASSED" and ours.get(test) != "PASSED"]
    print(*(worse or ["no test that passes without us fails with us"]), sep="\n")
    return min(len(worse), 100)


if __name__ == "__main__":
    sys.exit(main())
