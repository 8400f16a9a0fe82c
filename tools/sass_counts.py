"""Instructions per output of the depthwise kernels' inner loops, read from the machine code that nvcc made.

python tools/sass_counts.py                           of the built library, for sm_90
python tools/sass_counts.py k.cubin -k rows_nhwc      of a cubin (nvcc -cubin) of one file, kernels whose names match

The inner loop is the innermost backward branch whose body has most multiply-adds. What one trip through it issues is counted
along one path: of all paths through the body that store the trip's outputs once, that with the most loads and multiply-adds, so
that nothing is skipped, and of those the shortest, which applies no activation. How many outputs a trip makes comes from the
kernel's template arguments and the constants of its headers; the path's multiply-adds, which must be that many times the filter's
taps, are the check of it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc/cuda/kernels"
DTYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def cuobjdump(file: str | Path, *arguments: str) -> str | None:
    """What the tool prints of a file; None where there is none, neither Triton's, which comes with torch, nor a toolkit's."""
    tool = shutil.which("cuobjdump")
    try:
        import triton

        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    if tool is None:
        return None
    return subprocess.run([tool, *arguments, str(file)], capture_output=True, text=True, check=True).stdout


def functions(sass: str) -> dict[str, str]:
    """The code of each function in what `cuobjdump --dump-sass` printed."""
    parts = re.split(r"Function : (\S+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    name: str  # with its suffixes
    operands: str

    @property
    def kind(self) -> str:
        base = self.name.split(".")[0]
        if base in ("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD"):
            return "sums"
        widens = r"0x10000\b|0xffff0000"  # a bfloat16, which is the upper half of a float32
        if base in ("F2F", "F2FP", "HADD2", "PRMT") or (base in ("IMAD", "LOP3") and re.search(widens, self.operands)):
            return "conversions"
        if base in ("LDG", "STG", "LDGSTS"):
            return "global"
        if base in ("LDS", "STS", "LDSM"):
            return "shared"
        if base in ("BRA", "BSSY", "BSYNC", "EXIT", "BAR", "WARPSYNC", "NOP", "DEPBAR", "LDGDEPBAR"):
            return "control"
        if base in ("ISETP", "FSETP", "DSETP", "PLOP3", "P2R", "R2P", "UISETP", "UPLOP3", "VOTE") or "LOP3.LUT P" in self.text:
            return "predicates"
        if base in ("MOV", "CS2R", "UMOV", "SEL", "FSEL") or "IMAD.MOV" in self.name or "-RZ, RZ" in self.operands:
            return "moves"
        return "addresses"  # and whatever else is integer

    @property
    def works(self) -> bool:
        return self.name.split(".")[0] in ("FFMA", "DFMA", "LDG", "LDGSTS", "LDS")

    @property
    def stored(self) -> int:
        """Bytes, to global memory."""
        if not self.name.startswith("STG"):
            return 0
        return next((size for suffix, size in ((".U16", 2), (".64", 8), (".128", 16)) if suffix in self.name), 4)

    @property
    def text(self) -> str:
        return f"{self.name} {self.operands}"

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None


def instructions(code: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+ )?\s*(\S+)\s*([^;]*?)\s*;", code)
    return [Instruction(int(address, 16), predicate.strip(), name, operands) for address, predicate, name, operands in found]


class Function:
    def __init__(self, code: str) -> None:
        self.code = instructions(code)
        self.at = {instruction.address: i for i, instruction in enumerate(self.code)}

    def path(self, first: int, last: int, stored: int) -> list[Instruction]:
        """The instructions first .. last, along branches forwards, that store so many bytes: of the paths that do most work the
        shortest; without stores where no path stores as many."""
        # From an instruction and the bytes yet to be stored to the last: work, minus the length.
        best: dict[tuple[int, int], tuple[int, int]] = {(last, 0): (0, 0)}
        follow: dict[tuple[int, int], int] = {}
        for i in range(last - 1, first - 1, -1):
            instruction = self.code[i]
            nexts = []
            target = self.at.get(instruction.target) if instruction.target is not None else None
            if target is not None and target > i:
                nexts.append(target)
            always = not instruction.predicate and "UP" not in instruction.operands
            if not (always and instruction.name.startswith(("BRA", "EXIT"))):
                nexts.append(i + 1)
            for left in range(instruction.stored, stored + 1):
                reached = [(best[n, left - instruction.stored], n) for n in nexts if (n, left - instruction.stored) in best]
                if reached:
                    (work, length), follow[i, left] = max(reached)
                    best[i, left] = (work + instruction.works, length - 1)
        left = stored if (first, stored) in best else 0
        if (first, left) not in best:
            return []
        i, found = first, []
        while i != last:
            found.append(self.code[i])
            i, left = follow[i, left], left - self.code[i].stored
        return [*found, self.code[last]]

    def inner_loop(self, stored: int) -> tuple[list[Instruction], list[Instruction]] | None:
        """(a trip through the inner loop, which stores so many bytes; what comes before it, the loops in it once)."""
        loops = [(self.at[b.target], i) for i, b in enumerate(self.code) if b.target in self.at and self.at[b.target] < i]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        paths = {begin: self.path(begin, end, stored) for begin, end in inner}
        if not any(paths.values()):
            return None
        begin = max(paths, key=lambda first: (sum(i.kind == "sums" for i in paths[first]), first))
        return paths[begin], self.path(0, begin, 0)[:-1]


@cache
def constant(name: str) -> int:
    """A constexpr int of the kernels' headers."""
    for header in [*sorted(KERNELS.rglob("*.cuh")), KERNELS / "args.h"]:
        found = re.search(rf"constexpr int [^;]*\b{name} = (\d+)", header.read_text())
        if found:
            return int(found[1])
    raise KeyError(name)


@dataclass
class Kernel:
    name: str
    dtype: str
    taps: str  # Forward, Transposed, or Line: of one row
    filter: int
    stride: int
    numbers: list[int]  # further template arguments

    def outputs(self) -> tuple[int, float] | None:
        """(outputs of one trip: pixels times channels, multiply-adds of one)."""
        k, s, open_rows = self.filter, self.stride, (self.filter - 1) // self.stride + 1
        each = k * k / (s * s if self.taps == "Transposed" else 1)
        if self.taps == "Line":  # a group of outputs of a thread's channels, or a run of a line
            if not self.name.startswith("depthwise_backward_weight"):  # long activations are loops in theirs
                return None
            group = constant("kLineGroup") * constant("kLineBytes") if self.name.endswith("nhwc") else constant("kChunkBytes")
            return group // BYTES[self.dtype], k
        if self.name in ("depthwise_rows_nhwc", "depthwise_backward_weight_rows_nhwc"):  # a turn of the rows in progress
            return open_rows * constant("kStripColumns") * self.numbers[0], each
        if self.name in ("depthwise_rows_nchw", "depthwise_backward_weight_rows_nchw"):
            return open_rows * self.numbers[0] // BYTES[self.dtype], each
        if self.name == "depthwise_nhwc":  # a patch
            return constant("kPatchRows") * constant("kPatchColumns") * constant("kThreadChannels"), each
        if self.name == "depthwise_backward_weight_nhwc":
            return 2 * 4 * constant("kWeightChannels"), each
        return None


def kernel_of(mangled: str) -> Kernel | None:
    types = "|".join(DTYPES)
    found = re.search(rf"\d+(depthwise_\w+?)I({types})NS\w*_\d*(Forward|Transposed)ILi(\d)ELi(\d)EEE?((?:Li\d+E)*)E", mangled)
    line = re.search(rf"\d+(depthwise_(?:backward_weight_)?lines_\w+?)I({types})Li(\d)EE", mangled)
    if line is not None:
        return Kernel(line[1], DTYPES[line[2]], "Line", int(line[3]), 1, [])
    if found is None:
        return None
    name, dtype, taps, k, s, numbers = found.groups()
    return Kernel(name, DTYPES[dtype], taps, int(k), int(s), [int(n) for n in re.findall(r"Li(\d+)E", numbers)])


COLUMNS = ("sums", "conversions", "global", "shared", "addresses", "moves", "predicates", "control")


@dataclass
class Counted:
    kernel: Kernel
    registers: int
    outputs: int  # of a trip, times how often the compiler unrolled it
    trip: Counter
    setup: int  # instructions of a thread before its first trip
    exact: bool  # the multiply-adds are outputs times taps

    def per_output(self, kind: str) -> float:
        return self.trip[kind] / self.outputs

    @property
    def total(self) -> float:
        return sum(self.trip.values()) / self.outputs


def count(mangled: str, code: str, registers: int) -> Counted | None:
    kernel = kernel_of(mangled)
    known = kernel.outputs() if kernel else None
    if known is None:
        return None
    outputs, taps = known
    loop = Function(code).inner_loop(outputs * BYTES[kernel.dtype])
    if loop is None:
        return None
    trip, before = loop
    products = sum(i.name.split(".")[0] in ("FFMA", "DFMA") for i in trip)
    unrolled = max(round(products / (outputs * taps)), 1)
    exact = products == outputs * taps * unrolled
    return Counted(kernel, registers, outputs * unrolled, Counter(i.kind for i in trip), len(before), exact)


def count_file(file: str | Path, pattern: str = "", architecture: str = "sm_90") -> list[Counted]:
    chosen = [] if str(file).endswith(".cubin") else ["--gpu-architecture", architecture]
    sass, usage = cuobjdump(file, "--dump-sass", *chosen), cuobjdump(file, "--dump-resource-usage", *chosen)
    if sass is None or usage is None:
        raise SystemExit("no cuobjdump, neither Triton's nor a toolkit's")
    registers = {name: int(number) for name, number in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", usage)}
    found = [count(name, code, registers[name]) for name, code in functions(sass).items() if re.search(pattern, name)]
    return sorted(filter(None, found), key=lambda c: (c.kernel.name, c.kernel.filter, c.kernel.stride, c.kernel.dtype))


def table(counted: list[Counted]) -> str:
    lines = ["| kernel | dtype | filter | registers | outputs | " + " | ".join(COLUMNS) + " | in all | before the loop |"]
    lines.append("| --- | --- | --- |" + " ---: |" * (len(COLUMNS) + 4))
    for c in counted:
        k = c.kernel
        name = k.name + "".join(f" {n}" for n in k.numbers)
        rows = 1 if k.taps == "Line" else k.filter
        cells = [name, k.dtype, f"{rows}x{k.filter} s{k.stride}{' T' * (k.taps == 'Transposed')}", str(c.registers)]
        cells += [f"{c.outputs}{'' if c.exact else ' ?'}", *(f"{c.per_output(kind):.2f}" for kind in COLUMNS)]
        lines.append("| " + " | ".join([*cells, f"{c.total:.1f}", str(c.setup)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a library or a .cubin; by default the built _C_cuda")
    parser.add_argument("-k", "--kernel", default="", help="a regular expression that mangled names must match")
    parser.add_argument("--arch", default="sm_90", help="of the code in a library (default: %(default)s)")
    options = parser.parse_args()
    file = options.file
    if file is None:
        sys.path.insert(0, str(ROOT))
        import dwconv_ext

        if dwconv_ext._C_cuda is None:
            raise SystemExit(f"no CUDA half: {dwconv_ext.cuda_status}")
        file = dwconv_ext._C_cuda.__file__
    if not Path(file).is_file():
        parser.error(f"file: there is no {file}")
    print(table(count_file(file, options.kernel, options.arch)))


if __name__ == "__main__":
    main()
