"""``make check-wheel``: installs a wheel into fresh environments, one a torch, and runs it there, away from the repository."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import torch
from torch import nn
import dwconv_ext

kind = "CPU-only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
print(f"torch {torch.__version__}, {kind}; CUDA half: {dwconv_ext.cuda_status}")
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 15, 17, device=device, requires_grad=True)
    ours = dwconv_ext.DepthwiseConv2d(24, 24, 3, padding=1, device=device)
    theirs = nn.Conv2d(24, 24, 3, padding=1, groups=24, device=device)
    theirs.load_state_dict(ours.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for conv in (ours, theirs):
            y = conv(x.contiguous(memory_format=layout))
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, conv.weight, conv.bias))])
        for mine, torchs in zip(*results, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-3)
    block = dwconv_ext.FusedDSConv(24, 48).to(device)
    block(x).sum().backward()
    plain = dwconv_ext.unfuse(block.eval())
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x), rtol=1e-2, atol=1e-2)
    print(f"{device}: forward, backward and the block equal torch's")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--torch",
        nargs="+",
        metavar="REQUIREMENT",
        default=["torch==2.10.*", "torch"],
        help="what pip is asked for, one environment each (default: the oldest torch that will do, and the newest)",
    )
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"there is no wheel {options.wheel}: make wheel makes one")
    wheel = options.wheel.resolve()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for requirement in options.torch:
        print(f"-- {requirement}", flush=True)
        with tempfile.TemporaryDirectory(prefix="dwconv_ext_wheel_") as folder:
            python = str(Path(folder, "bin", "python"))
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            for command in (
                [sys.executable, "-m", "venv", folder],
                [*install, requirement, "numpy"],
                [*install, "--no-index", str(wheel)],  # all that it requires is there
                [python, "-m", "dwconv_ext"],
                [python, "-c", CHECK],
            ):
                if subprocess.run(command, cwd=folder, env=environment).returncode != 0:
                    sys.exit(f"check_wheel: {wheel.name} under {requirement}: this failed: {' '.join(command[:6])}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, runs under {', '.join(options.torch)}")


if __name__ == "__main__":
    main()
