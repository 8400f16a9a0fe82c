"""Builds dwconv_ext: the CPU half always, the CUDA half where torch and nvcc allow it.

DWCONV_EXT_CUDA=0|1   leave the CUDA half out, or fail where it cannot be built
TORCH_CUDA_ARCH_LIST  architectures of the CUDA half ("8.0;9.0+PTX"); by default the list in default_architectures()
DWCONV_EXT_CXXFLAGS   further flags of the CPU half's compiler
MAX_JOBS              parallel compilations
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

SUPPORTED = "Linux on x86-64 or AArch64 and macOS on arm64"
if platform.system() not in ("Linux", "Darwin") or sys.maxsize < 2**32 or sys.byteorder != "little":
    # Another processor's build has the portable kernels alone.
    raise SystemExit(
        f"dwconv_ext: {platform.system()} on {platform.machine()} ({sys.byteorder}-endian) is not supported: it is built for "
        f"{SUPPORTED}, and from portable kernels for other 64-bit little-endian processors under Linux"
    )

import resource  # noqa: E402 (not on Windows)

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import Extension, setup  # noqa: E402

# It says where nvcc is but no GPU, which a build does not need.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime is found" not in record.getMessage())

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import hopper  # noqa: E402

os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # pip's ninja, also where the environment is not activated
PYBIND11 = pybind11.get_include()  # first on the include path: torch's bundled copy refuses the stable ABI's macros


def find_nvcc() -> Path | None:
    """CUDA_HOME, the PATH, /usr/local/cuda*, then pip's nvidia-cuda-nvcc."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path:
        homes.append(Path(on_path).resolve().parent.parent)
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    homes += [*sorted(site.glob("cu1*"), reverse=True), site / "cuda_nvcc"]
    for home in homes:
        # A wrapper script on the PATH may have no toolkit around it, hence the headers' test.
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home / "bin" / "nvcc"
    return None


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version printed no release")
    return found.group(1)


def cuda_decision() -> tuple[Path | None, str]:
    """The nvcc to build with, or None; and why."""
    wish = os.environ.get("DWCONV_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"DWCONV_EXT_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "DWCONV_EXT_CUDA=0"
    nvcc = find_nvcc()
    torch_cuda = torch.version.cuda
    if torch_cuda is None:
        why = f"torch {torch.__version__} is a CPU-only build"
    elif nvcc is None:
        why = "no nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda* or from pip's nvidia-cuda-nvcc"
    else:
        version = nvcc_version(nvcc)
        if version.split(".")[0] == torch_cuda.split(".")[0]:
            return nvcc, f"{nvcc} {version}, torch's CUDA {torch_cuda}"
        why = (
            f"{nvcc} is CUDA {version} but torch {torch.__version__} is built for CUDA {torch_cuda}: the major versions must "
            f"agree. Point CUDA_HOME at a CUDA {torch_cuda.split('.')[0]} toolkit, install a torch built for CUDA "
            f"{version.split('.')[0]}, or set DWCONV_EXT_CUDA=0 for the CPU half alone"
        )
        raise SystemExit(f"dwconv_ext: cannot build the CUDA half: {why}")
    if wish == "1":
        raise SystemExit(f"dwconv_ext: DWCONV_EXT_CUDA=1, but {why}")
    return None, why


def default_architectures(nvcc: Path) -> str:
    """sm_75 to sm_120 as far as this nvcc goes, PTX for what comes later. sm_86 and sm_89 run sm_80's code as it is."""
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = [a for a in ("75", "80", "90", "100", "120") if a in known]
    return ";".join(f"{a[:-1]}.{a[-1]}" for a in wanted) + "+PTX"


def architecture_flags(listed: str) -> list[str]:
    """nvcc's -gencode flags for a TORCH_CUDA_ARCH_LIST; none where it has entries that only torch knows (then torch makes them).

    But for HOPPER's the kernels use nothing newer than sm_80, so that every architecture from there on is assembled from the same
    compute_80 code: the compiler's larger half runs once for all of them.
    """
    targets: dict[str, list[str]] = {}
    for item in re.split(r"[;\s]+", listed.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", item)
        if found is None:
            return []
        number = found[1] + found[2]
        virtual = "80" if int(number) >= 80 else number
        targets.setdefault(virtual, []).append(f"sm_{number}")
        if found[3]:
            targets[virtual].append(f"compute_{virtual}")
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]" for virtual, codes in targets.items()]


nvcc, reason = cuda_decision()
if nvcc is None:
    print(f"dwconv_ext: building the CPU half only: {reason}", file=sys.stderr)
else:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(nvcc))
    os.environ["CUDA_HOME"] = str(nvcc.parent.parent)
    print(f"dwconv_ext: building the CPU and CUDA halves: {reason}", file=sys.stderr)

with_hopper = nvcc is not None and re.search(r"(^|[;\s])(9\.0|Hopper)", os.environ["TORCH_CUDA_ARCH_LIST"]) is not None
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]

CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unused-function",
    "-Wno-maybe-uninitialized",
    "-g0",
    f"-fmacro-prefix-map={ROOT}/=",  # torch's errors name the source file
]
CXX_FLAGS += os.environ.get("DWCONV_EXT_CXXFLAGS", "").split()


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


extensions = [
    CppExtension(
        "dwconv_ext._C",
        # The instruction-set files take longest: first, so that they start first. AMX and AVX512-BF16 have few kernels.
        sorted(sources("csrc/cpu/kernels/isa/*.cpp"), key=lambda path: "amx" in path or "bf16" in path)
        + sources("csrc/*.cpp", "csrc/cpu/[!k]*/*.cpp"),
        include_dirs=[PYBIND11, str(ROOT / "csrc")],
        extra_compile_args=CXX_FLAGS,
        py_limited_api=False,
    )
]
if nvcc is not None:
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(nvcc.parent.parent)  # read from the environment when torch was imported, above
    extensions.append(
        cpp_extension.CUDAExtension(
            "dwconv_ext._C_cuda",
            [source for source in sources("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp") if source != hopper.SOURCE],
            include_dirs=[PYBIND11, str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": [
                    *CXX_FLAGS,
                    f'-DDWCONV_CUDA_VERSION="{nvcc_version(nvcc)}"',
                    f'-DDWCONV_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"',
                    *(["-DDWCONV_HOPPER"] if with_hopper else []),
                ],
                "nvcc": [*NVCC_FLAGS, "--threads=2", *architecture_flags(os.environ["TORCH_CUDA_ARCH_LIST"])],
            },
        )
    )


def compilers_seconds() -> float:
    """Processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def add_once(values: list[str], value: str) -> None:
    """A command that builds twice with the same extensions would else compile all files anew."""
    if value not in values:
        values.append(value)


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools would compile everything anew in a folder of its own
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        super().run()
        kept = {ext.name: self._timed_file(ext) for ext in self.extensions}
        times = {name.split(".")[1]: json.loads(file.read_text()) for name, file in kept.items() if file.exists()}
        Path(self.get_ext_fullpath("dwconv_ext._C")).with_name("_build_times.json").write_text(json.dumps(times) + "\n")

    def _timed_file(self, ext: Extension) -> Path:
        return Path(self.build_temp, f"{ext.name}.time.json")

    def _keep_time(self, ext: Extension, begin: float, used: float) -> None:
        """Of what was compiled: beside the objects, so that a build that finds them up to date has it too, and one that compiles
        a few of them anew keeps that of all."""
        objects = [Path(self.build_temp, source).with_suffix(".o") for source in ext.sources] + [*map(Path, ext.extra_objects)]
        compiled = sum(file.exists() and file.stat().st_mtime >= self.begin for file in objects)
        kept = self._timed_file(ext)
        if compiled and (not kept.exists() or compiled >= json.loads(kept.read_text())["compiled"]):
            elapsed, processor = round(time.time() - begin, 1), round(compilers_seconds() - used, 1)
            facts = {"compiled": compiled, "files": len(objects), "elapsed_s": elapsed, "processor_s": processor}
            kept.write_text(json.dumps(facts) + "\n")

    def _check_cuda_version(self, *args: object) -> None:
        """torch's check compares minors too; cuda_decision() has already compared the majors."""

    def _write_facts(self) -> None:
        """What module.cpp says of the build: a header of its own, so that nothing else is compiled anew where it changes."""
        folder = Path(self.build_temp, "facts").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        cuda = reason if nvcc is None else nvcc_version(nvcc)
        text = f'#define DWCONV_BUILD_TORCH "{torch.__version__}"\n#define DWCONV_BUILD_CUDA "{cuda}"\n'
        header = folder / "build_facts.h"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        add_once(self.extensions[0].include_dirs, str(folder))

    def build_extensions(self) -> None:
        self.begin = time.time()
        self._write_facts()
        if with_hopper:
            self.hopper = hopper.HopperObject(self.build_temp, nvcc, [*cpp_extension.COMMON_NVCC_FLAGS, *NVCC_FLAGS])
            self.hopper.start()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        begin, used = time.time(), compilers_seconds()
        if with_hopper and ext.name == "dwconv_ext._C_cuda":
            add_once(ext.extra_objects, self.hopper.finish())
        super().build_extension(ext)
        self._keep_time(ext, begin, used)


setup(ext_modules=extensions, cmdclass={"build_ext": Build})
