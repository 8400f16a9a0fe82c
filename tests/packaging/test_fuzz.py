"""tools/fuzz: each target is built and runs, and a false invariant would end it. Its hour is run by hand."""

from __future__ import annotations

import os

import fuzz
import pytest

COMPILERS = [os.environ.get("CLANG", "clang++"), *(f"clang++-{version}" for version in range(22, 14, -1))]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = next((each for each in COMPILERS if fuzz.has_libfuzzer(each)), None)
    return found or pytest.skip("no clang with libFuzzer")


def test_cuda_s_plans(compiler):
    outcome = fuzz.run("cuda_plans", compiler, 2)
    assert outcome.passed and outcome.executions > 100, outcome.output


@pytest.mark.slow  # compiles the CPU's kernels
@pytest.mark.parametrize("target", ["cpu_plans", "packed"])
def test_the_cpu_s(target, compiler):
    outcome = fuzz.run(target, compiler, 60)
    assert outcome.passed and outcome.executions > 1000, outcome.output
