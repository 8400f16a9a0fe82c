"""The table, the JSON file and the Markdown file of a run."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path

import torch

from dwconv_ext.__main__ import report as build_report

from .roofline import Roofline
from .suites import BASELINE, BASELINE_CHANNELS_LAST, FLOAT32, NO_PEERS, OURS, PRODUCT, PRODUCT_SIDE, TWO_OPS, Comparison
from .timing import geometric_mean

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    try:
        result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def machine(device: str) -> dict[str, str]:
    facts = build_report()
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    return {"machine": platform.platform(), **facts, **made()}


def made() -> dict[str, str]:
    """The commit, and the day."""
    return {"commit": _commit(), "date": datetime.date.today().isoformat()}


class Summary:
    """A comparison's figures: times, ratios of our better layout to the others, rates, and the share of the roofline."""

    def __init__(self, comparison: Comparison, roofline: Roofline) -> None:
        self.comparison = comparison
        self.ours = {name: comparison.times[name] for name in OURS}
        self.best = min(self.ours.values())
        others = {name: t for name, t in comparison.times.items() if name not in NO_PEERS}
        self.float32_peers = {name: t for name, t in others.items() if name.endswith(FLOAT32)}
        self.peers = {name: t for name, t in others.items() if name not in self.float32_peers}
        self.limit = roofline.seconds(comparison.bytes, comparison.flops)
        self.bandwidth = roofline.bandwidth(comparison.bytes)

    def row(self) -> dict[str, float]:
        figures = {f"{name} ms": t * 1e3 for name, t in self.comparison.times.items()}
        for name, t in self.ours.items():
            layout = name.removeprefix("dwconv_ext ")
            figures[f"{layout} vs {BASELINE}"] = self.comparison.times[BASELINE] / t
        figures[f"better vs {BASELINE_CHANNELS_LAST}"] = self.comparison.times[BASELINE_CHANNELS_LAST] / self.best
        figures["better vs best peer"] = min(self.peers.values()) / self.best
        if self.float32_peers:
            figures["better vs best float32 peer"] = min(self.float32_peers.values()) / self.best
        if TWO_OPS[0] in self.comparison.times:
            figures["better vs own two ops"] = min(self.comparison.times[name] for name in TWO_OPS) / self.best
        figures["GB/s"] = self.comparison.bytes / self.best / 1e9
        figures["GFLOP/s"] = self.comparison.flops / self.best / 1e9
        figures["roofline %"] = 100 * self.limit / self.best
        if PRODUCT in self.comparison.times:
            figures["sgemm %"] = 100 * self.comparison.flops / self.best * self.comparison.times[PRODUCT] / (2 * PRODUCT_SIDE**3)
        return figures


def rows_of(summaries: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, with the geometric means of the ratios as the last row."""
    columns = list(dict.fromkeys(key for s in summaries for key in s.row()))

    def text(column: str, value: float | None) -> str:
        if value is None:
            return "-"
        if column.endswith(" ms"):
            return f"{value:.3f}"
        return f"{value:.2f}x" if " vs " in column else f"{value:.0f}"

    cells = [[s.comparison.layer.name, *(text(c, s.row().get(c)) for c in columns)] for s in summaries]
    means = ["geometric mean"]
    for column in columns:
        known = [s.row()[column] for s in summaries if column in s.row()] if " vs " in column or column.endswith(" %") else []
        means.append(text(column, geometric_mean(known)) if known else "")
    return ["layer", *columns], [*cells, means]


def print_rows(title: str, header: list[str], cells: list[list[str]], *, last_is_bold: bool) -> None:
    """A table; plain columns where rich is not installed (a machine with a GPU and no registry)."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, *("  ".join(f"{cell:>14}" for cell in row) for row in [header, *cells])]))
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0)
    for i, row in enumerate(cells):
        table.add_row(*row, style="bold" if last_is_bold and i == len(cells) - 1 else None)
    console = Console()
    if not console.is_terminal:  # a file: wide enough for every column
        console = Console(width=40 + 17 * len(header))
    console.print(table)


def print_table(title: str, summaries: list[Summary]) -> None:
    print_rows(title, *rows_of(summaries), last_is_bold=True)


def markdown(title: str, summaries: list[Summary]) -> str:
    """Without the other runtimes' milliseconds, which the JSON file has."""
    header, cells = rows_of(summaries)
    narrow = {f"{name} ms" for name in (*OURS, BASELINE, BASELINE_CHANNELS_LAST)}
    kept = [i for i, name in enumerate(header) if not name.endswith(" ms") or name in narrow]
    header, cells = [header[i] for i in kept], [[row[i] for i in kept] for row in cells]
    return markdown_table(title, header, cells)


def markdown_table(title: str, header: list[str], cells: list[list[str]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def figures_of(summary: Summary) -> dict:
    comparison = summary.comparison
    return {
        "layer": comparison.layer._asdict(),
        "pass": comparison.direction,
        "seconds": comparison.times,
        "bytes": comparison.bytes,
        "flops": comparison.flops,
        "roofline_seconds": summary.limit,
        "bandwidth": summary.bandwidth,
    }


def where(options: argparse.Namespace, facts: dict[str, str]) -> str:
    return facts.get("device", f"{facts['CPU']}, {options.threads} threads")


def folder_of(facts: dict[str, str]) -> Path:
    """Of a machine's results: by its GPU, else its CPU, L1 and instruction set."""
    name = facts.get("device") or f"{facts['CPU'].split(', L2')[0]} {facts['kernel sets'].split(' ')[0]}"
    name = re.sub(r"\((r|tm)\)|processor", "", name.lower()).replace(" kib", "k")
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def path_of(options: argparse.Namespace, facts: dict[str, str], ending: str) -> Path:
    folder = folder_of(facts) if options.save == Path() else options.save
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{options.what}-{options.dtype}.{ending}"


def save(options: argparse.Namespace, facts: dict[str, str], figures: dict, tables: list[str]) -> None:
    """Where --save says: the figures as JSON, with machine, versions and commit, and the tables as Markdown."""
    if options.save is None:
        return
    everything = {**facts, "dtype": options.dtype, "threads": getattr(options, "threads", None), **figures}
    path_of(options, facts, "json").write_text(json.dumps(everything, indent=1) + "\n")
    path_of(options, facts, "md").write_text("\n".join(tables))
