"""``python -m dwconv_ext``: what was built, and what this machine runs."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path

import torch

import dwconv_ext
from dwconv_ext import _C, _C_cuda, cuda_status


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _kernels() -> str:
    """The rows of the chosen instruction set and of those below it, whose rows it runs where it has none of its own."""
    sets = _C.supported_isas()
    sets = sets[: sets.index(_C.selected_isa()) + 1]
    return ", ".join(f"{name} ({n})" for name, n in Counter(r["name"] for r in _C.kernel_table() if r["isa"] in sets).items())


def _build_times() -> str:
    """What setup.py noted of the compilation, of each half."""
    try:
        times = json.loads(Path(_C.__file__).with_name("_build_times.json").read_text())
    except FileNotFoundError:
        return "not noted"
    halves = {"_C": "CPU", "_C_cuda": "CUDA"}
    return "; ".join(
        f"{halves[name]} half {half['elapsed_s']} s, {half['processor_s']} s of processor time "
        f"({half['compiled']} of {half['files']} files)"
        for name, half in times.items()
    )


def report() -> dict[str, str]:
    """The facts that an issue report should have, by name."""
    l1, l2, l3 = _C.cache_bytes()
    facts = {
        "dwconv_ext": f"{dwconv_ext.__version__}, built against torch {_C.build_torch} by {_C.build_compiler}",
        "build": _build_times(),
        "torch": f"{torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "CPU": f"{_processor()}, L1 {l1 >> 10} KiB, L2 {l2 >> 10} KiB, L3 {l3 >> 20} MiB",
        "instruction sets": " ".join(_C.cpu_flags()),
        "kernel sets": f"{_C.selected_isa()} chosen of {', '.join(_C.supported_isas())}",
        "kernels": _kernels(),
        "threads": str(torch.get_num_threads()),
    }
    if _C_cuda is None:
        facts["CUDA"] = f"no: {cuda_status}"
    else:
        facts["CUDA"] = f"built with {_C_cuda.cuda_version} for {_C_cuda.architectures}"
        if torch.cuda.is_available():
            devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            facts["CUDA devices"] = ", ".join(f"{d.name} (sm_{d.major}{d.minor})" for d in devices)
        else:
            facts["CUDA devices"] = "none"
    return facts


def main() -> None:
    facts = report()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
