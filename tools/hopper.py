"""The kernels for Hopper alone: their wgmma is in sm_90a, so that they are compiled apart, beside torch's build of the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "csrc/cuda/kernels/tables/hopper.cu"


class HopperObject:
    """The object file of SOURCE in `folder`; `start` it before the rest is built, and `finish` it before that is linked."""

    def __init__(self, folder: str, compiler: Path, flags: list[str]) -> None:
        self.path = Path(folder, "hopper.o").absolute()
        target = ["-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a"]
        self.command = [str(compiler), *flags, *target, "-c", str(ROOT / SOURCE), "-o", str(self.path)]
        self.running: subprocess.Popen | None = None

    def start(self) -> None:
        """Unless the object is newer than all that it is made from."""
        read = [p for folder in ("csrc/common", "csrc/cuda") for p in (ROOT / folder).rglob("*") if p.is_file()]
        newest = max(path.stat().st_mtime for path in [*read, ROOT / "setup.py", Path(__file__)])
        if self.path.exists() and self.path.stat().st_mtime > newest:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        print(*self.command, flush=True)  # as ninja does, which build_time.py reads
        self.running = subprocess.Popen(self.command)

    def finish(self) -> str:
        if self.running is not None and self.running.wait() != 0:
            self.path.unlink(missing_ok=True)
            raise SystemExit(f"dwconv_ext: {SOURCE} does not compile")
        return str(self.path)
