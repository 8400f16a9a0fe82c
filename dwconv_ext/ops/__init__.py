"""The ops: what a caller may write, their derivatives, and what torch knows of them besides their kernels."""

from . import flops, registration  # noqa: F401
