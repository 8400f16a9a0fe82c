"""The benchmark program: ``python -m benchmarks --help``."""

import logging

# torch's timer and torch.compile import torch's C++ build tools, which say where nvcc is but no GPU. Nothing is built with them
# here, and what needs a GPU says so itself.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime is found" not in record.getMessage())
