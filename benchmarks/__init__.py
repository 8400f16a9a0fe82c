"""The benchmark program: ``python -m benchmarks --help``."""
