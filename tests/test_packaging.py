"""What importing costs and says, and what the build leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
    """Processor time, which other programs lengthen little; and nothing but Python's own library comes along."""
    seconds = []
    for _ in range(3):
        first, *packages = python("-c", IMPORT).stdout.split()
        seconds.append(float(first))
        assert set(packages) <= {"dwconv_ext", *sys.stdlib_module_names}
    assert min(seconds) <= 0.2


COUNT = """
import torch
{imports}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    dwconv_ext.depthwise_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), padding=1)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("first", ["dwconv_ext", "torch.utils.flop_counter"])
def test_the_flop_counter_knows_the_ops_whatever_is_imported_first(first):
    done = python("-c", COUNT.format(imports=f"import {first}\nimport dwconv_ext"))
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
