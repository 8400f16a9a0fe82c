"""``make gpu-check``: build, tests, compute-sanitizer and benchmarks on a GPU, in one command, offline, in under nine minutes.

Builds for this GPU in place (an editable install), runs the CUDA tests on it, compute-sanitizer's memcheck and racecheck over a
selection, and the benchmarks; writes benchmarks/results/<device>/gpu-check.json and .md. Needs python3 with torch >= 2.10,
ninja, pybind11, pytest and numpy; fetches nothing. A step that fails does not stop those after it; the exit status says whether
all passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
OPS = (
    "depthwise", "separable", "pointwise", "inverted_residual", "batch_norm", "depthwise_norm", "pooled", "extreme_numbers",
    "tuner",
)  # fmt: skip
SUITES = ["tests/cuda/test_cuda.py", *(f"tests/ops/test_{name}.py" for name in OPS)]
SELECTION = """
import torch, dwconv_ext
for layout in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float16, torch.float32):
        for kernel, stride, multiplier in ((3, 1, 1), (5, 2, 1), (7, 1, 1), (9, 1, 1), (3, 1, 2)):
            x = torch.randn(2, 24, 15, 17, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            w = torch.randn(24 * multiplier, 1, kernel, kernel, device="cuda", dtype=dtype, requires_grad=True)
            dwconv_ext.depthwise_conv2d(x, w, None, stride, kernel // 2).sum().backward()
        for fusion in ("always", "never"):
            dwconv_ext._C_cuda.force_fusion(fusion)
            block = dwconv_ext.FusedDSConv(24, 72).to("cuda", dtype).eval()
            with torch.no_grad():
                block(x.detach())
        block = dwconv_ext.FusedDSConv(24, 32).to("cuda").train()
        dwconv_ext.nn.batch_norm_act.LEAST_CUDA = dwconv_ext.ops.batch_norm.LEAST_CUDA = 0
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            block(x.detach().float()).float().sum().backward()
torch.cuda.synchronize()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--built", action="store_true", help="use what has been built in place")
    parser.add_argument("--seconds", type=float, default=520, help="for all steps together (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    device = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    results = ROOT / "benchmarks/results" / name
    results.mkdir(parents=True, exist_ok=True)
    saved: dict[str, tuple[Path, str]] = {}
    environment = {
        **os.environ,
        "DWCONV_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 2),
        "PYTHONPATH": str(ROOT),
    }
    python = sys.executable
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # The tests import the emulator, which is built meanwhile.
    emulator = subprocess.Popen([python, "tools/cuda_emulator/__init__.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    steps: dict[str, list[str]] = {
        "build": [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--editable", "."],
        "tests": [python, "-m", "pytest", "-q", *SUITES, "-m", "gpu", "-p", "no:cacheprovider", *parallel],
    }
    if options.built:
        del steps["build"]
    for what, dtype, batch, *tuned in (
        *(("separable", "float16", 128), ("depthwise", "float16", 128), ("depthwise", "float32", 128)),
        *(("separable", "float32", 128), ("separable", "float16", 1), ("depthwise", "float16", 1), ("training", "float16", 128)),
        *((what, "float16", batch, "--tuned") for what, batch in (("depthwise", 1), ("separable", 1), ("depthwise", 128))),
    ):
        step = f"{what}_{dtype}_b{batch}" + ("_tuned" if tuned else "")
        saved[step] = (results / "parts" / step, f"{what}-{dtype}")
        steps[step] = [
            *(python, "-m", "benchmarks", what, "--device", "cuda", "--dtype", dtype, "--batch", str(batch), "--no-runtimes"),
            *("--no-compile", "--rounds", "5", "--save", str(saved[step][0]), *tuned),
            # At batch 128 the float64 reference of 31 x 31 takes longer than all the rest.
            *(["--without", "31x31"] if batch > 1 else []),
        ]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        steps[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "1", python, "-c", SELECTION]
    begin, outcome = time.monotonic(), {}
    for step, command in steps.items():
        if step == "tests":
            emulator.wait()
        left = options.seconds - (time.monotonic() - begin)
        started = time.monotonic()
        if left < 10:
            outcome[step] = {"status": "no time left", "seconds": 0.0, "output": ""}
            continue
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
            status, output = "passed" if done.returncode == 0 else f"failed ({done.returncode})", done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, output = "timed out", str(error.stdout or "")
        outcome[step] = {"status": status, "seconds": round(time.monotonic() - started, 1), "output": output[-6000:]}
        print(f"{step}: {status}, {outcome[step]['seconds']} s", flush=True)
        if status != "passed":
            print(output[-6000:], flush=True)
        if step == "build" and status != "passed":
            break
    tables = {}
    text = [f"# {device}", "", f"torch {torch.__version__}, CUDA {torch.version.cuda}. Written by `make gpu-check`.", ""]
    text += ["| step | outcome | seconds |", "| --- | --- | ---: |"]
    text += [f"| {step} | {o['status']} | {o['seconds']} |" for step, o in outcome.items()]
    for step, (folder, file) in saved.items():
        if (folder / f"{file}.json").exists():
            tables[step] = json.loads((folder / f"{file}.json").read_text())
            text += ["", (folder / f"{file}.md").read_text()]
    shutil.rmtree(results / "parts", ignore_errors=True)
    everything = {"device": device, "steps": outcome, "benchmarks": tables}
    (results / "gpu-check.json").write_text(json.dumps(everything, indent=1) + "\n")
    (results / "gpu-check.md").write_text("\n".join(text) + "\n")
    print(f"wrote {results.relative_to(ROOT)}/gpu-check.json and .md")
    return 0 if all(o["status"] == "passed" for o in outcome.values()) and len(outcome) == len(steps) else 1


if __name__ == "__main__":
    sys.exit(main())
