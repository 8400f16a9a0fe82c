"""The faults that tools/mutate.py plants, one at a time: what each is, where, and which tests to ask first."""

from . import cpu, cpu_kernels, cuda, python
from .fault import Fault

FAULTS = [*cpu_kernels.FAULTS, *cpu.FAULTS, *cuda.FAULTS, *python.FAULTS]

__all__ = ["FAULTS", "Fault"]
