"""Instructions per output of the CPU kernels' main inner loops, read from the machine code of each instruction set.

python tools/isa_counts.py build/temp.linux-x86_64-cpython-311/csrc/cpu/kernels/isa/avx2_*.o    what setup.py compiled
python tools/isa_counts.py --compile aarch64-linux-gnu-g++ neon neon_bf16 build/temp...         and two sets more

An inner loop is the smallest loop with multiply-adds (and, where a trip makes outputs, their stores). What one trip issues is
counted along one path through its body: of all paths, that with the most multiply-adds, so that no row is skipped, and of those
the shortest, which applies no activation. A loop within it runs once: one tap plane, no channel multiplier.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Kernel, the function's name without namespaces, multiply-adds of an output, whether a trip stores it.
LOOPS = [
    ("pointwise product, 64 channels, float32", r"gemm_rows<float, float, float, \d+, \d>", 64, False),
    ("pointwise product, 64 channels, bfloat16 pairs", r"gemm_rows<BFloat16, BFloat16Pair, float, \d+, \d>", 64, False),
    *(
        (f"3x3 {layout}, {dtype.lower()}", function.format({"float32": "float"}.get(dtype, dtype)), 9, True)
        for layout, function in [
            ("channels_last, channels are lanes", r"RowPair<{}, 3, 1>::all_channels<\d, 0, 0>"),
            ("channels_last, flat", r"FlatRows<{}, 3, 4>::all_columns<true>"),
            ("NCHW, rows", r"tile_of_rows<{}, 3, true>"),
        ]
        for dtype in ("float32", "BFloat16", "Float16")
    ),
]
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "avx512_bf16": 64, "amx": 64, "neon": 16, "neon_bf16": 16}
MULTIPLY_ADD = re.compile(r"v?fmla$|vfmadd\d*ps$|bfdot$|vdpbf16ps$")
PAIRS = re.compile(r"bfdot$|vdpbf16ps$")
BRANCH = re.compile(r"(b|b\..+|cbn?z|tbn?z|j.+)$")
STORE = re.compile(r"st[rpu].*|v?p?extr[wdq]|vextract.*|vcvtps2ph.*|vmov.*|vpmov.*")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch within the function; -1 of one that cannot be followed."""
        if self.name in ("ret", "br"):
            return -1
        if not BRANCH.match(self.name):
            return None
        found = re.search(r"(?:^|[\s,])([0-9a-f]+) <", self.operands)
        return int(found[1], 16) if found else -1

    @property
    def falls_through(self) -> bool:
        return self.name not in ("b", "br", "ret", "jmp")

    @property
    def multiplies(self) -> bool:
        return MULTIPLY_ADD.match(self.name) is not None

    @property
    def stores(self) -> bool:
        """A vector's."""
        if self.name.startswith("st"):
            return re.match(r"\s*\{?[qdv]\d", self.operands) is not None
        return STORE.match(self.name) is not None and self.operands.rstrip().endswith(")")

    @property
    def loads(self) -> bool:
        return self.name.startswith("ld") or (
            "(" in self.operands and not self.stores and not self.name.startswith(("lea", "prefetch"))
        )


def functions(file: Path) -> dict[str, list[Instruction]]:
    """The code of an object file's functions by name, namespaces left out."""
    is_arm = file.read_bytes()[18] == 0xB7  # e_machine
    tool = "aarch64-linux-gnu-objdump" if is_arm and platform.machine() != "aarch64" else "objdump"
    text = subprocess.run([tool, "-d", "-C", "--no-show-raw-insn", str(file)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", text, re.M):
        lines = re.findall(r"^ *([0-9a-f]+):\t(\S+)[ \t]*([^\n]*?)(?:\s*//.*)?$", body, re.M)
        found[re.sub(r"\bdwconv::(\w+::)?(?=\w)", "", name)] = [Instruction(int(a, 16), n, o) for a, n, o in lines]
    return found


def cost(path: list[Instruction]) -> tuple[int, int]:
    """What the largest of is wanted: most multiply-adds, then fewest instructions."""
    return sum(x.multiplies for x in path), -len(path)


def longest(body: list[Instruction]) -> list[Instruction]:
    """The path from the first instruction to a branch back to it: see above."""
    head, empty = body[0].address, None
    places = {instruction.address: i for i, instruction in enumerate(body)}
    best: list[list[Instruction] | None] = [empty] * (len(body) + 1)
    for i in range(len(body) - 1, -1, -1):
        at, ways = body[i], []
        if at.target == head:
            ways.append([])
        elif at.target is not None and at.target > at.address and places.get(at.target) is not None:
            ways.append(best[places[at.target]])
        if at.falls_through:
            ways.append(best[i + 1])
        ways = [way for way in ways if way is not None]
        if ways:
            best[i] = [at, *max(ways, key=cost)]
    return best[0] or []


def inner_loop(code: list[Instruction], stores: bool) -> list[Instruction]:
    """One trip through it; nothing where there is none."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        if instruction.target is not None and 0 <= instruction.target < instruction.address:
            ends[instruction.target] = i  # the last branch back
    places = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for head, end in ends.items():
        begin = places[head]
        path = longest(code[begin : end + 1])
        if any(x.multiplies for x in path) and (not stores or any(x.stores for x in path)):
            loops.append((begin, end, path))
    inner = [
        path for begin, end, path in loops if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in loops)
    ]
    return max(inner, key=cost, default=[])


def rows(files: list[Path]) -> list[tuple]:
    """Kernel, set, instructions, multiply-adds, loads, outputs of a trip, instructions of an output."""
    table = []
    for file in files:
        isa = re.sub(r"_(blocks|backward|forward_\w+)$", "", file.stem)
        code = functions(file)
        for kernel, pattern, taps, stores in LOOPS:
            found = {name: body for name, body in code.items() if re.search(pattern, name)}
            if not found:
                continue
            largest = max(found, key=lambda name: [int(n) for n in re.findall(r"\b\d+\b", name)])  # the full register tile
            trip = inner_loop(found[largest], stores)
            multiplies = sum(x.multiplies for x in trip)
            lanes = VECTOR_BYTES[isa] // 4 * (2 if any(PAIRS.match(x.name) for x in trip) else 1)
            outputs = multiplies * lanes / taps
            order = [loop[0] for loop in LOOPS].index(kernel)
            loads = sum(x.loads for x in trip)
            table.append((order, VECTOR_BYTES[isa], kernel, isa, len(trip), multiplies, loads, outputs, len(trip) / outputs))
    return [row[2:] for row in sorted(table)]


def compiled(compiler: str, isas: list[str], folder: str) -> list[Path]:
    files = []
    for isa in isas:
        for source in sorted(ROOT.glob(f"csrc/cpu/kernels/isa/{isa}_*.cpp")):
            family = source.stem.removeprefix(isa + "_")
            if family in ("blocks", "forward_nhwc", "forward_nchw"):
                files.append(Path(folder, source.stem + ".o"))
                flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fPIC", "-fwrapv", "-w", f"-I{ROOT}/csrc"]
                subprocess.run([compiler, *flags, "-c", str(source), "-o", str(files[-1])], check=True)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="+", default=[], metavar=("COMPILER", "SET"))
    parser.add_argument("objects", nargs="*", type=Path)
    given = parser.parse_args()
    isas = [name for name in given.compile[1:] if name in VECTOR_BYTES]
    objects = given.objects + [Path(name) for name in given.compile[1:] if name not in VECTOR_BYTES]
    with tempfile.TemporaryDirectory() as folder:
        table = rows([*objects, *(compiled(given.compile[0], isas, folder) if isas else [])])
    if not table:
        sys.exit("isa_counts: none of the kernels is in these files")
    print("| inner loop | set | instructions | multiply-adds | loads | outputs | instructions an output |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for kernel, isa, instructions, multiplies, loads, outputs, each in table:
        print(f"| {kernel} | {isa} | {instructions} | {multiplies} | {loads} | {outputs:g} | {each:.2f} |")


if __name__ == "__main__":
    main()
