"""The CUDA kernels on the CPU: builds and loads the module ``_emulator`` (see emulator.h), and puts it behind the ops.

python tools/cuda_emulator/__init__.py       builds it
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("kernels/tables/*.cu")),
    *sorted((ROOT / "csrc/cuda").glob("ops/*.cpp")),
    *sorted((ROOT / "csrc/cuda").glob("plan/*.cpp")),
    ROOT / "csrc/ops.cpp",
    *sorted(HERE.glob("*.cpp")),
]


def cuda_headers() -> Path | None:
    """A folder with cuda_fp16.h: a toolkit's, or the one that comes with a CUDA build of torch."""
    site = Path(sysconfig.get_paths()["purelib"])
    homes = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [*sorted(site.glob("nvidia/cu1*/include"), reverse=True), site / "nvidia/cuda_runtime/include"]
    homes += [Path("/usr/local/cuda/include"), site / "triton/backends/nvidia/include"]
    wanted = ("cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")
    return next((home for home in homes if all((home / name).is_file() for name in wanted)), None)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """pytest-xdist's workers want the same build at once: the first makes it, and the others find it made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder: Path, *flags: str) -> Path:
    """The module in `folder`, by ninja: what is up to date stays. `flags` go to the compiler and the linker."""
    with one_at_a_time(folder):
        return _build(folder, *flags)


def _build(folder: Path, *flags: str) -> Path:
    import ninja
    import pybind11
    import torch
    from torch.utils import cpp_extension

    headers = cuda_headers()
    if headers is None:
        raise RuntimeError("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch")
    own = [HERE / "include", HERE, ROOT / "csrc"]  # in this order: what the first has stands for csrc's
    include = [*own, pybind11.get_include(), headers, *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    common = ["-O2", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    common += ["-Wno-maybe-uninitialized", "-DDWCONV_HOPPER", *(f"-I{path}" for path in include), *flags]
    libraries = Path(torch.__file__).parent / "lib"
    module = folder / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "build.ninja").open("w") as file:
        writer = ninja.Writer(file)
        writer.rule(
            "compile", f"c++ -MD -MF $out.d {' '.join(common)} $extra -x c++ -c $in -o $out", depfile="$out.d", deps="gcc"
        )
        writer.rule("link", f"c++ -shared {' '.join(flags)} $in -L{libraries} -lc10 -ltorch -ltorch_cpu -o $out")
        objects = []
        for source in SOURCES:
            extra = "-DDWCONV_LIBRARY=dwconv_emulator" if source == ROOT / "csrc/ops.cpp" else ""
            name = str(source.relative_to(ROOT)).replace("/", "_")
            objects += writer.build(f"{name}.o", "compile", str(source), variables={"extra": extra})
        writer.build(module.name, "link", objects)
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", os.environ.get("MAX_JOBS", "2")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not build:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return module


@contextmanager
def behind_the_ops() -> Iterator[None]:
    """While open, torch.ops.dwconv_ext runs the emulated CUDA kernels on CPU tensors; autograd and all else stay as they are."""
    import torch

    import dwconv_ext
    from dwconv_ext._extension import ON_CUDA

    library = torch.library.Library("dwconv_ext", "IMPL")
    for op in ON_CUDA:
        library.impl(op, getattr(torch.ops.dwconv_emulator, op), "CPU", allow_override=True)
    dwconv_ext.clear_caches()  # of weights packed for the other kernels
    try:
        yield
    finally:
        library._destroy()
        dwconv_ext.clear_caches()


@cache
def load(module: Path | None = None) -> ModuleType:
    """The module, built if need be. Importing it registers torch.ops.dwconv_emulator."""
    path = module or build(ROOT / "build/emulator")
    spec = importlib.util.spec_from_file_location("_emulator", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    print(build(ROOT / "build/emulator", *sys.argv[1:]))
