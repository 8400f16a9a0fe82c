"""The tables of README.md and docs/benchmarks.md, from saved results: ``python -m benchmarks.pages`` writes them anew.

Each stands between the comments ``<!-- NAME -->`` and ``<!-- /NAME -->``. Nothing is measured here.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from .network import OURS as WAYS
from .network import PEERS, summary
from .network import Row as Network
from .report import RESULTS
from .suites import BASELINE, BASELINE_CHANNELS_LAST, FLOAT32, NO_PEERS, OURS
from .timing import geometric_mean

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs/benchmarks.md"

# Columns of the table of layers: a machine's files, and of the H200 the batch, whose files are one.
MACHINES = {
    "zen4": ("amd-epyc-l1-32k-avx512-bf16", 0),
    "zen5": ("amd-epyc-l1-48k-avx512-bf16", 0),
    "xeon": ("intel-xeon-l1-48k-amx", 0),
    "avx2": ("amd-epyc-l1-32k-avx2", 0),
    "h200, batch 128": ("nvidia-h200", 128),
    "h200, batch 1": ("nvidia-h200", 1),
}
ZEN4 = RESULTS / "amd-epyc-l1-32k-avx512-bf16"
RATIO = "{:.2f}x".format
EAGER = ("eager", "eager channels_last")


def table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --- README.md -------------------------------------------------------------------------------------------------------------


def readme_results(text: str) -> Path:
    """The figures that the README's picture was drawn of."""
    return (ROOT / re.search(r"!\[[^\]]*\]\(([^)\s]+\.png)\)", text)[1]).with_suffix(".json")


def readme_networks(results: dict) -> str:
    """Whole networks: times at batch 1 of plain PyTorch in its faster layout, the fastest of the peers and dwconv_ext's fastest
    way; and speed-ups, medians over rounds of the ratio of what ran side by side in one round."""
    rows = {(row.network, row.batch): row for row in (Network(**r) for r in results["results"])}
    networks = dict.fromkeys(network for network, _ in rows)
    header = ["float32", "eager", "fastest peer", "dwconv_ext", "over eager", "over peer"]
    cells = [["", "batch 1", "", "", "", "", "batch 8", ""]]
    for network in networks:
        one, eight = (rows[network, batch] for batch in (1, 8))
        fastest = (min(ways, key=one.seconds.get) for ways in (EAGER, PEERS, WAYS))
        times = [f"{1e3 * one.seconds[way]:.1f} ms" for way in fastest]
        cells.append([network, *times, *(f"**{RATIO(r)}**" for r in _over(one)), *map(RATIO, _over(eight))])
    means = [geometric_mean(each) for each in zip(*(_over(rows[n, 1]) + _over(rows[n, 8]) for n in networks), strict=True)]
    cells.append(["geometric mean", "", "", "", *(f"**{RATIO(m)}**" for m in means[:2]), *map(RATIO, means[2:])])
    return table([*header, *header[-2:]], cells)


def _over(row: Network) -> tuple[float, float]:
    """Our speed over plain PyTorch's and over the fastest peer's."""
    return min(row.ratios[way] for way in EAGER), summary(row)[1]


# --- docs/benchmarks.md ----------------------------------------------------------------------------------------------------


@cache
def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _layers(machine: str, suite: str, bits: int, direction: str) -> list[dict[str, float]]:
    """Seconds by implementation, for each layer of a machine's run; none where there was no such run."""
    folder, batch = MACHINES[machine]
    if batch:
        name = f"{suite}_{'float32' if bits == 32 else 'float16'}_b{batch}"
        saved = _read(RESULTS / folder / "gpu-check.json")["benchmarks"].get(name, {})
    else:
        saved = _read(RESULTS / folder / f"{suite}-{'float32' if bits == 32 else 'bfloat16'}.json")
    return [r["seconds"] for r in saved.get("results", []) if r["pass"] == direction]


def _better(seconds: dict[str, float]) -> float:
    return min(seconds[name] for name in OURS)


def over_torch(rows: list[dict[str, float]]) -> str:
    """NCHW over nn.Conv2d in NCHW, and our better layout over nn.Conv2d in channels_last."""
    if not rows:
        return ""
    nchw = geometric_mean(s[BASELINE] / s[OURS[0]] for s in rows)
    return f"{RATIO(nchw)}, {RATIO(geometric_mean(s[BASELINE_CHANNELS_LAST] / _better(s) for s in rows))}"


def h200_blocks() -> str:
    """The README's figure of a GPU."""
    return over_torch(_layers("h200, batch 128", "separable", 16, "forward")).split(", ")[1]


def over_peers(rows: list[dict[str, float]]) -> str:
    """Our better layout over the fastest of all others at the same dtype; nothing where torch alone was timed."""
    others = [[t for name, t in s.items() if name not in NO_PEERS and not name.endswith(FLOAT32)] for s in rows]
    if not rows or max(map(len, others)) == 2:
        return ""
    return RATIO(geometric_mean(min(t) / _better(s) for t, s in zip(others, rows, strict=True)))


def layers_table() -> str:
    cells = []
    for bits in (32, 16):
        dtype = "float32" if bits == 32 else "16 bits"
        for name, suite, direction in (
            ("depthwise forward", "depthwise", "forward"),
            ("depthwise backward", "depthwise", "backward"),
            ("block", "separable", "forward"),
            ("pointwise", "pointwise", "forward"),
            ("inverted residual", "inverted", "forward"),
        ):
            rows = [_layers(machine, suite, bits, direction) for machine in MACHINES]
            cells.append([f"{name}, {dtype}", *map(over_torch, rows)])
            if suite != "depthwise":
                cells.append([f"{name}, {dtype}, best peer", *map(over_peers, rows)])
    return table(["over nn.Conv2d", *MACHINES], [line for line in cells if any(line[1:])])


def models_table() -> str:
    """Over plain PyTorch in both layouts, and our better layout in networks over others."""
    rows = _read(ZEN4 / "models-float32.json")["results"]
    cells = []
    for what in ("inference", "training step"):
        line = [f"models, {what}, over eager"]
        for way in ("convert", "backend"):
            means = (
                geometric_mean(r["ratios"][way] for r in rows if (r["what"], r["layout"]) == (what, layout))
                for layout in ("NCHW", "channels_last")
            )
            line.append(", ".join(map(RATIO, means)))
        cells.append(line)
    networks = [summary(Network(**row)) for row in _read(ZEN4 / "network-float32.json")["results"]]
    for i, others in enumerate(("eager in channels_last", "the fastest of ONNX Runtime, OpenVINO, inductor")):
        cells.append([f"networks, inference, over {others}", "", RATIO(geometric_mean(n[i] for n in networks))])
    return table(["zen4, float32", "convert", "backend"], cells)


def written(page: Path) -> str:
    """A page's text with its tables as the saved results have them."""
    text = page.read_text()
    tables = {"networks": readme_networks(_read(readme_results(text)))} if page == README else {}
    if page == BENCHMARKS:
        tables = {"layers": layers_table(), "models": models_table()}
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page.name} must have {begin.strip()} and {end} once")
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for page in (README, BENCHMARKS):
        page.write_text(written(page))
