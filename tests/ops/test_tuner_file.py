"""dwconv_ext.benchmark's file, its switch and its environment; and what a forked process finds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tuned import step

import dwconv_ext

# ---- the file ------------------------------------------------------------------------------------------------------------


def test_the_file_is_read_and_added_to(tmp_path, tuned):
    file = tmp_path / "choices.txt"
    tuned.start(("torch", 1e-6), file=str(file))
    step()
    lines = file.read_text().splitlines()
    assert len(lines) == 3 and all(line.split("\t")[0] == "now" and line.split("\t")[3] == "torch" for line in lines)
    tuned.start(file=str(file))  # torch would not be the fastest any more
    with tuned.times(False):
        step()
    assert tuned.choice(" forward ")["way"] == "torch"
    with tuned.times(True):
        step(dtype=torch.float64)
    assert len(file.read_text().splitlines()) == 6
    tuned.start(file=str(file), versions="later")
    with tuned.times(True):
        step()
    assert file.read_text().splitlines()[:3] == lines and len(file.read_text().splitlines()) == 9


def test_the_file_survives_garbage_and_a_way_that_is_gone(tmp_path, tuned):
    file = tmp_path / "choices.txt"
    tuned.start(("torch", 1e-6), file=str(file))
    step()
    lines = file.read_text().splitlines()
    forward = next(line for line in lines if " forward " in line).split("\t")
    gone = "\t".join([*forward[:3], "a kernel of old", forward[4]])
    file.write_bytes(b"\0\xff\t\t\t\t\t\n\n" + gone.encode() + b"\n" + "\t".join(forward[:3]).encode()[:-5])  # cut off
    tuned.start(file=str(file))
    with tuned.times(True):
        step()
    written = file.read_bytes().split(b"\n")
    assert gone.encode() in written and tuned.choice(" forward ")["way"] not in ("torch", "a kernel of old")
    tuned.start(("torch", 1e-6), file=str(file))
    with tuned.times(False):
        step()
    assert tuned.choice(" forward ")["way"] != "torch", "the last line counts"


@pytest.mark.parametrize("name", ["missing/choices.txt", "."])
def test_a_file_that_cannot_be_written_is_a_warning(name, tmp_path, tuned, capfd):
    tuned.start(("torch", 1e-6), file=str(tmp_path / name))
    step()
    with tuned.times(False):
        step()
    assert capfd.readouterr().err.count("cannot be written") == 1 and len(tuned.half.benchmark_choices()) == 3


CODE = """
import os, sys, torch, dwconv_ext
conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
for size in range(4, 24):
    with torch.no_grad():
        dwconv_ext.depthwise_conv2d(torch.randn(1, 8, size, 5), conv.weight, conv.bias, padding=1)
print(dwconv_ext._C.timed_runs())
"""


def start(**environment: str) -> subprocess.Popen:
    root = str(Path(dwconv_ext.__file__).parents[1])
    every = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "DWCONV_EXT_BENCHMARK": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=every)


def test_two_processes_and_the_environment(tmp_path):
    file = tmp_path / "choices.txt"
    timed = 0  # where one is late, the other has chosen for it
    for process in [start(DWCONV_EXT_BENCHMARK_FILE=str(file)) for _ in range(2)]:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        timed += int(output)
    assert timed > 0
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert all(len(line) == 5 and line[0].startswith("dwconv_ext ") and "torch 2." in line[0] for line in lines)
    assert len({line[2] for line in lines}) == 20 <= len(lines) <= 40
    output, errors = start(DWCONV_EXT_BENCHMARK_FILE=str(file), DWCONV_EXT_LOG_PLAN="1").communicate()
    assert output == "0\n" and errors.count("; timed: ") + errors.count("-> torch") == 20, errors


def test_a_bad_environment_is_an_error():
    process = start(DWCONV_EXT_BENCHMARK="yes")
    assert "DWCONV_EXT_BENCHMARK: expected 0 or 1, got 'yes'" in process.communicate()[1] and process.returncode != 0


# ---- the switch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"enabled": 1}, TypeError, "benchmark: enabled must be a bool, but got 1"),
        ({"enabled": True, "file": 3}, TypeError, r"benchmark: file must be a path \(str or os.PathLike\), but got 3"),
        ({"enabled": True, "file": ""}, ValueError, "benchmark: file must be the path of a file, but got ''"),
        ({"enabled": True, "file": "a\0b"}, ValueError, "benchmark: file must be the path of a file, but got"),
        ({"enabled": False, "file": "x"}, ValueError, "benchmark: file must be None where enabled is False, but got 'x'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dwconv_ext.benchmark(**arguments)


def test_the_switch(tmp_path, monkeypatch, on_cpu):
    monkeypatch.chdir(tmp_path)
    dwconv_ext._C.fake_times([("torch", 1e-6)])
    dwconv_ext.benchmark(True, file=Path("here.txt"))
    monkeypatch.chdir(tmp_path.parent)
    with on_cpu.times(True):
        step()
    assert (tmp_path / "here.txt").read_text().startswith(f"dwconv_ext {dwconv_ext.__version__}, torch {torch.__version__}")
    dwconv_ext.benchmark(False)
    with on_cpu.times(False):
        step()


# ---- on a GPU only -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_events_and_graphs_on_a_gpu():
    half = dwconv_ext._C_cuda
    x, w = torch.randn(4, 32, 28, 28, device="cuda"), torch.randn(32, 1, 3, 3, device="cuda")
    dwconv_ext.benchmark(True)
    try:
        before = half.timed_runs()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing may be timed, nor remembered
            captured = dwconv_ext.depthwise_conv2d(x, w, padding=1)
        assert half.timed_runs() == before and half.benchmark_choices() == []
        y = dwconv_ext.depthwise_conv2d(x, w, padding=1)
        assert half.timed_runs() > before
        (choice,) = half.benchmark_choices()
        times = [float(time.split(" us ")[0]) for time in choice["times"].split("; ")]
        assert len(times) > 2 and all(0.5 < t < 1000 for t in times)
        graph.replay()
        for output in (captured, y):
            torch.testing.assert_close(output, F.conv2d(x, w, padding=1, groups=32), rtol=1e-3, atol=1e-2)
    finally:
        dwconv_ext.benchmark(False)


def test_what_was_chosen_before_the_file_was_named_is_written(tmp_path, tuned):
    file = tmp_path / "choices.txt"
    tuned.start(("torch", 1e-6))
    step()
    tuned.half.set_benchmark(True, str(file), "now")
    with tuned.times(False):
        step()
    assert len(file.read_text().splitlines()) == 3


def test_a_file_of_another_kind_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="benchmark: file must be a regular file, but got"):
            dwconv_ext.benchmark(True, file=path)


def test_a_file_without_the_switch_is_a_warning():
    process = start(DWCONV_EXT_BENCHMARK="", DWCONV_EXT_BENCHMARK_FILE="choices.txt")
    output, errors = process.communicate()
    assert output == "0\n" and "DWCONV_EXT_BENCHMARK_FILE does nothing without DWCONV_EXT_BENCHMARK=1" in errors


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forked_while_something_is_timed_times_for_itself():
    timing, end = threading.Event(), threading.Event()

    def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        timing.set()
        end.wait(60)
        return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", convolution, "CPU")
    dwconv_ext.benchmark(True)
    torch.set_num_threads(1)
    try:
        x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3)
        thread = threading.Thread(target=lambda: dwconv_ext.depthwise_conv2d(x, w, padding=1))
        thread.start()
        assert timing.wait(60)
        child = os.fork()
        if child == 0:
            end.set()
            before = dwconv_ext._C.timed_runs()
            dwconv_ext.depthwise_conv2d(x, w[:, :, :1], padding=1)
            os._exit(0 if dwconv_ext._C.timed_runs() > before else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        end.set()
        thread.join()
        dwconv_ext.benchmark(False)
        library._destroy()
