"""Training that is killed again and again, during a checkpoint's writing too, ends in the weights of training left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = ["--data", "digits", "--size", "32", "--width-multiplier", "0.25", "--limit", "480", "--lr", "2e-3", "--device", "cpu"]
EPOCHS, KILLS = 12, 20


def command(out: Path) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "examples" / "train_cifar10.py"),
        *SMALL,
        "--epochs",
        str(EPOCHS),
        "--out",
        str(out),
        "--resume",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_twenty_times(tmp_path):
    begin = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), env=ENVIRONMENT, check=True, capture_output=True)
    seconds = time.monotonic() - begin

    # Every other time while a checkpoint is being written, which begins with a file beside it.
    choose, killed, out = random.Random(0), {"at random": 0, "while writing": 0}, tmp_path / "killed"
    while sum(killed.values()) < KILLS:
        kind = "while writing" if sum(killed.values()) % 2 else "at random"
        end = time.monotonic() + choose.uniform(0, seconds)
        running = subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        to_come, writing = choose.randrange(1, 5), False
        while running.poll() is None:
            was, writing = writing, any(out.glob("*.part"))
            to_come -= writing and not was
            if time.monotonic() > end if kind == "at random" else to_come == 0:
                break
            time.sleep(0.0002)
        if running.poll() is not None:  # it was done first: the run begins again
            assert running.returncode == 0, running.stderr.read()
            for file in out.iterdir():
                file.unlink()
            continue
        running.send_signal(signal.SIGKILL)
        running.communicate()
        killed[kind] += 1
    done = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "best.pt"):
        whole, resumed = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "whole", out))
        assert {key: whole[key] for key in ("epoch", "best", "accuracy")} == {
            key: resumed[key] for key in ("epoch", "best", "accuracy")
        }
        for key, value in whole["model"].items():
            assert torch.equal(value, resumed["model"][key]), (name, key)
        for number, moments in whole["optimiser"]["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, resumed["optimiser"]["state"][number][key]), (name, number, key)
    print(f"killed {killed}: the weights, the moments and the best checkpoint are those of the run left alone")
