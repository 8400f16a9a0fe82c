"""The example scripts, each run on small real data."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
SMALL = ["--data", "digits", "--size", "32", "--width-multiplier", "0.25", "--limit", "160", "--lr", "2e-3", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs an example as its own program would; gives what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs without a break."""
    out = tmp_path_factory.mktemp("trained")
    command = [sys.executable, str(EXAMPLES / "train_cifar10.py"), *SMALL, "--out", str(out), "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "epoch 2: loss" in done.stdout and "best test accuracy" in done.stdout
    return out


def test_resumed_is_as_uninterrupted(script, tmp_path):
    script("train_cifar10.py", *SMALL, "--out", tmp_path / "whole", "--epochs", 2)
    script("train_cifar10.py", *SMALL, "--out", tmp_path / "resumed", "--epochs", 1)
    text = script("train_cifar10.py", *SMALL, "--out", tmp_path / "resumed", "--epochs", 2, "--resume")
    assert "resumed after epoch 1 of 2" in text and "epoch 2: loss" in text and "epoch 1: loss" not in text
    whole, resumed = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "whole", tmp_path / "resumed"))
    assert whole["epoch"] == resumed["epoch"] == 1 and whole["accuracy"] == resumed["accuracy"]
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    assert (tmp_path / "resumed" / "best.pt").is_file() and not list(tmp_path.rglob("*.part"))


def test_it_learns(script, tmp_path):
    options = ["--data", "digits", "--size", "32", "--width-multiplier", "0.25", "--lr", "5e-3", "--device", "cpu"]
    text = script("train_cifar10.py", *options, "--epochs", 4, "--out", tmp_path)
    accuracies = [float(line.split("test accuracy ")[1][:6]) for line in text.splitlines() if line.startswith("epoch")]
    assert len(accuracies) == 4 and max(accuracies) > 0.7
    assert torch.load(tmp_path / "best.pt", weights_only=True)["accuracy"] == pytest.approx(max(accuracies), abs=1e-4)


def test_amp_and_compare(script, tmp_path):
    text = script("train_cifar10.py", *SMALL, "--amp", "--epochs", 1, "--out", tmp_path)
    assert "epoch 1: loss" in text
    text = script("train_cifar10.py", *SMALL, "--compare", "--out", tmp_path)
    assert "speed-up" in text and "plain nn" in text


def picture_folder(root):
    """Two classes in pictures of two sizes and formats: dark ones and bright ones."""
    for part, count in (("train", 24), ("test", 8)):
        for name, shade in (("bright", 200), ("dark", 30)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size, ending = ((40, 36), "png") if i % 2 else ((32, 48), "jpg")
                Image.new("RGB", size, (shade + 2 * i, shade, shade - i)).save(root / part / name / f"{i}.{ending}")
    return root


def test_pictures_of_a_folder(script, tmp_path):
    root = picture_folder(tmp_path / "pictures")
    options = ["--data", "folder", "--root", root, *SMALL[2:6], "--lr", 5e-3, "--batch-size", 8, "--workers", 1]
    text = script("train_cifar10.py", *options, "--epochs", 4, "--out", tmp_path)
    assert min(float(line.split("loss ")[1][:6]) for line in text.splitlines() if line.startswith("epoch")) < 0.4
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert state["config"]["classes"] == ["bright", "dark"]
    text = script(
        "predict.py", "--checkpoint", tmp_path / "best.pt", "--root", root, "--count", 9, "--output", tmp_path / "grid.png"
    )
    assert "of 9 right" in text
    script("train_cifar10.py", *options, "--epochs", 1, "--limit", 16, "--out", tmp_path / "few")
    corrupt = root / "train" / "dark" / "3.png"
    corrupt.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        script("train_cifar10.py", *options[:-2], "--epochs", 1, "--out", tmp_path)
    assert f"{corrupt} is no picture" in str(stopped.value.code)


def test_several_processes(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(EXAMPLES / "train_cifar10.py"), *SMALL, "--epochs", "1", "--sync-bn", "--out", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 1: loss") == 1 and (tmp_path / "best.pt").is_file()


@pytest.mark.xdist_group("trained")
def test_predict_and_show_weights(trained, script, tmp_path):
    text = script(
        "predict.py", "--checkpoint", trained / "best.pt", "--count", 7, "--output", tmp_path / "grid.png", "--device", "cpu"
    )
    assert "of 7 right" in text
    script("show_weights.py", "--checkpoint", trained / "best.pt", "--filters", 6, "--output", tmp_path / "weights.png")
    for name in ("grid.png", "weights.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100 and len(picture.convert("L").getcolors()) > 20


def test_summary(script):
    assert "4,231,976" in script("summary.py")
    assert "3,504,872" in script("summary.py", "--model", "mobilenet_v2", "--resolution", 64, "--batch", 2)
    text = script("summary.py", "--model", "mnasnet0_5", "--resolution", 64)
    assert "depthwise_forward" in text


def test_filter_bank(script, tmp_path):
    """Of its own sound, and of a WAV: in one channel, cut into blocks that are no divisors."""
    text = script("filter_bank.py", "--output", tmp_path / "own", "--bands", 6, "--band", 2)
    assert "2 channels, 48000 samples, 6 bands" in text and "the same bits as the whole" in text
    with wave.open(str(tmp_path / "one.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(range(256)) * 40)
    text = script("filter_bank.py", "--sound", tmp_path / "one.wav", "--output", tmp_path / "one", "--block", 77)
    assert "1 channels, 5120 samples, 16 bands" in text and "blocks of 77: the same bits" in text
    for name in ("own", "one"):
        with Image.open(tmp_path / name / "spectrograms.png") as picture:
            assert min(picture.size) > 400 and len(picture.convert("L").getcolors()) > 50
        with wave.open(str(tmp_path / name / "band.wav")) as file:
            assert file.getnframes() == (48000 if name == "own" else 5120)


EXAMPLE_NAMES = ["demo.py", "train_cifar10.py", "predict.py", "show_weights.py", "summary.py", "filter_bank.py"]


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_help(name, script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name, "--help")
    assert stopped.value.code == 0 and "--help" in capsys.readouterr().out


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("train_cifar10.py", ["--epochs", "0"], None),
        ("train_cifar10.py", ["--size", "50", *SMALL[:2]], "--size must be a multiple of 32, but got 50"),
        ("predict.py", ["--checkpoint", "{tmp}/none.pt"], "there is no checkpoint"),
        ("predict.py", ["--checkpoint", "{tmp}/corrupt.pt"], "is corrupt"),
        ("show_weights.py", ["--checkpoint", "{tmp}/short.pt"], "is corrupt"),
        ("show_weights.py", ["--checkpoint", "{tmp}/other.pt"], "it has no config, model"),
        ("summary.py", ["--model", "nonesuch"], "Unknown model nonesuch"),
        ("filter_bank.py", ["--sound", "{tmp}/corrupt.pt"], "is no WAV file that can be read"),
        ("filter_bank.py", ["--band", "16"], "--band must be one of 0 to 15, but got 16"),
        ("summary.py", ["--width-multiplier", "-1"], "width_multiplier must be a positive number"),
        ("train_cifar10.py", ["--root", "{tmp}", "--device", "cpu"], "is missing or corrupt"),
        ("train_cifar10.py", ["--data", "folder", "--root", "{tmp}", "--device", "cpu"], "wants pictures in {tmp}/train/CLASS/"),
    ],
)
def test_errors(name, arguments, message, script, tmp_path, trained, capsys):
    (tmp_path / "corrupt.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "short.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"corrupt")
    with pytest.raises(SystemExit) as stopped:
        script(name, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    if message is None:
        assert stopped.value.code == 2
    else:
        assert message.replace("{tmp}", str(tmp_path)) in str(stopped.value.code) and "Traceback" not in str(stopped.value.code)
