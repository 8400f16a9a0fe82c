"""What a fault is, and the tests that many are looked for by."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One small fault.

    name: what the reports call it.
    file: a source file's name, which only one file of the repository has.
    text: what stands there, exactly once in the file; with the part that changes in «these» where that is not all of it.
    wrong: what stands there instead. In C++ an expression in the place of an expression, or a statement, which ends in a
        semicolon, in the place of a statement: both are compiled, and a number in the environment chooses (mutate.py).
    imitates: the mistake, in words.
    tests: pytest's arguments for the tests that should find it, tried before all others.
    """

    name: str
    file: str
    text: str
    wrong: str
    imitates: str
    tests: str


# Tests that are asked by many, one instruction set's first.
ISA = "tests/ops/test_depthwise.py -k 'test_every_implementation and avx2- and {}'"
ROWS = "tests/kernels/test_kernels.py -k 'test_row and {}'"
BLOCKS = "tests/ops/test_separable.py -k 'test_every_implementation and {}'"
NORM = "tests/ops/test_batch_norm.py -k 'test_shapes and avx2'"
KERNEL = "tests/cuda/test_cuda.py -k 'test_every_kernel_runs and {}'"
CUDA_CASE = "tests/ops/test_depthwise.py -k 'test_every_implementation and emulator and {}'"
CUDA_BLOCK = "tests/ops/test_separable.py -k 'emulator and {}'"
CUDA_ORDER = "tests/cuda/test_cuda.py -k 'test_depthwise_bits_do_not_depend'"
CUDA_POINTWISE = "tests/ops/test_pointwise.py -k 'emulator and {}'"
INVERTED = "tests/ops/test_inverted_residual.py -k '{}'"
