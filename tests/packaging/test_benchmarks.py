"""The benchmark program and the demo, on small layers and a few rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import memory, plot, report, suites, sweep
from benchmarks.layers import depthwise_layers, separable_layers
from benchmarks.timing import Stopwatch, geometric_mean

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("what", "layer", "dtype"),
    [
        ("depthwise", "7x7_c1024", "float32"),
        ("depthwise", "7x7_c1024", "bfloat16"),
        ("separable", "block13", "bfloat16"),
    ],
)
def test_checks_times_and_writes(what, layer, dtype, tmp_path, capsys, threads):
    threads(torch.get_num_threads())
    command = [what, "--layers", layer, "--batch", "1", "--rounds", "1", "--no-compile", "--dtype", dtype, "--threads", "2"]
    command += ["--save", str(tmp_path / "results")]
    files = {ending: tmp_path / "results" / f"{what}-{dtype}.{ending}" for ending in ("json", "md", "png")}
    assert program.main(command) == 0
    printed = capsys.readouterr().out
    assert layer in printed and "geometric mean" in printed
    data = json.loads(files["json"].read_text())
    passes = ["forward", "backward"] if what == "depthwise" else ["forward"]
    assert {r["pass"] for r in data["results"]} == set(passes)
    for result in data["results"]:
        assert {*suites.OURS, suites.BASELINE, suites.BASELINE_CHANNELS_LAST} <= set(result["seconds"])
        wide = f"{suites.BASELINE}{suites.FLOAT32}"
        assert (wide in result["seconds"]) == (what != "depthwise" and dtype != "float32")
        assert all(t > 0 for t in result["seconds"].values()) and result["roofline_seconds"] > 0
    assert data["threads"] == 2 and torch.__version__ in data["torch"] and data["commit"]
    assert files["md"].read_text().count("| geometric mean |") == len(passes)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    roofline = files["png"].with_stem(f"{what}-{dtype}-roofline")
    assert roofline.read_bytes().startswith(b"\x89PNG")


def test_whole_networks(tmp_path, capsys, threads):
    threads(torch.get_num_threads())
    command = ["network", "shufflenet_v2_x0_5", "--batches", "1", "--threads", "2"]
    assert program.main([*command, "--rounds", "1", "--no-compile", "--no-runtimes", "--save", str(tmp_path)]) == 0
    assert "over eager channels_last" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "network-float32.json").read_text())["results"]
    assert (
        set(row["seconds"]) == {"eager", "eager channels_last", "convert", "backend", "backend NCHW", "freeze"}
        and row["flops"] > 5e7
    )
    assert (tmp_path / "network-float32.png").read_bytes().startswith(b"\x89PNG")
    assert program.main([*command, "--profile"]) == 0
    printed = capsys.readouterr().out
    assert "FoldedBlock" in printed and "GFLOP/s" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_networks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "WAYS", ("eager channels_last", "freeze"))  # each is a process
    command = ["memory", "shufflenet_v2_x0_5", "--batches", "1", "--threads", "1", "--no-runtimes", "--save", str(tmp_path)]
    assert program.main(command) == 0
    assert "held, peak" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "memory-float32.json").read_text())["results"]
    assert row["weights"] > 5e6 and set(row["bytes"]) == {"eager channels_last", "freeze"}
    for found in row["bytes"].values():
        assert 0.9 * row["weights"] < found["held"] <= found["peak"] < 40e6
    assert "shufflenet_v2_x0_5" in (tmp_path / "memory-float32.md").read_text()
    assert program.main(["plot", str(tmp_path / "memory-float32.json")]) == 2


def test_memory_is_measured_on_linux(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert program.main(["memory"]) == 2
    assert "Linux" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["intel-xeon-l1-48k-amx/separable-float32", "amd-epyc-l1-32k-avx512-bf16/models-float32", "nvidia-h200/gpu-check"]
)
def test_plots_of_saved_results(name, tmp_path, capsys):
    file = tmp_path / f"{Path(name).name}.json"
    file.write_bytes((report.RESULTS / f"{name}.json").read_bytes())
    assert program.main(["plot", str(file)]) == 0
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in capsys.readouterr().out.splitlines())


def test_plots_say_what_was_not_timed(tmp_path, monkeypatch):
    rows = json.loads((report.RESULTS / "amd-epyc-l1-32k-avx512-bf16/models-float32.json").read_text())["results"]
    shown = []
    monkeypatch.setattr(
        plot, "_finish", lambda figure, *_: shown.extend(t.get_text() for axis in figure.axes for t in axis.texts)
    )
    plot._bars(tmp_path / "plot.png", "", *plot._models(rows), "")
    models, timed = {r["model"] for r in rows}, {(r["model"], r["batch"], r["what"]) for r in rows}
    assert len(timed) < 4 * len(models)  # at batch 1 some have a BatchNorm of one value
    assert shown == ["n/a"] * 2 * (4 * len(models) - len(timed))  # by convert and by the backend


def test_whole_models_are_compared_in_plain_pytorchs_better_layout():
    rows = [
        {"model": "m", "what": "inference", "batch": 1, "layout": n, "seconds": {"plain": t}} for n, t in (("a", 3), ("b", 2))
    ]
    assert plot.row_of_model(rows, "m", "inference", 1)["layout"] == "b"
    assert plot.row_of_model(rows, "m", "inference", 8) is None


def test_a_file_with_nothing_to_plot(capsys):
    assert program.main(["plot", str(report.RESULTS / "amd-epyc-l1-48k-avx512-bf16/sweep-float32.json")]) == 2


def test_sweep_of_neighbours_and_growth(tmp_path, capsys, monkeypatch, threads):
    threads(torch.get_num_threads())
    monkeypatch.setattr(sweep, "GROWN", sweep.GROWN._replace(channels=16, out_channels=16, size=(8, 8)))
    command = ["sweep", "--layers", "7x7_c1024", "--rounds", "1", "--threads", "2", "--save", str(tmp_path)]
    files = [tmp_path / "sweep-float32.json", tmp_path / "sweep-float32.md"]
    assert program.main(command) == 0
    assert "neighbours" in capsys.readouterr().out
    points = json.loads(files[0].read_text())["points"]
    changes = {p["change"] for p in points if p["layer"] == "mobilenet_v1_7x7_c1024"}
    assert changes == {"itself", "H-1", "H+1", "C+1", "C+16", "C-16"}
    assert len(points) == 2 * 6 + 2 * 2 * 13
    assert all(p["ns"] > 0 and p["megabytes"] > 0 and (p["ratio"] == 1) >= (p["change"] == "itself") for p in points)
    assert files[1].read_text().count("### sweep") == 2


@pytest.mark.parametrize("what", ["depthwise", "separable"])
def test_a_wrong_result_is_not_timed(what, monkeypatch, capsys):
    name = "depthwise_conv2d" if what == "depthwise" else "FusedDSConv"
    right = getattr(suites, name)
    if what == "depthwise":
        monkeypatch.setattr(suites, name, lambda *args: right(*args) * 1.001)
    else:
        monkeypatch.setattr(right, "forward", lambda self, x: x.new_ones(1))
    try:
        status = program.main([what, "--layers", "7x7", "--batch", "1", "--rounds", "1", "--no-compile", "--no-runtimes"])
    except RuntimeError:
        status = 1  # a result of the wrong shape
    assert status == 1


@pytest.mark.parametrize("arguments", [["depthwise", "--threads", "0"], ["depthwise", "--dtype", "int8"], [], ["sideways"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        program.main(arguments)
    assert exit.value.code == 2


@pytest.mark.parametrize("suite", ["depthwise", "sweep", "models"])
def test_no_such_layer(suite, capsys):
    assert program.main([suite, "--layers", "nonsense"]) == 2
    assert "name contains 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["network", "memory"])
def test_no_such_network(suite, capsys):
    assert program.main([suite, "nonsense"]) == 2
    assert "neither torchvision nor timm has a model 'nonsense'" in capsys.readouterr().err


def test_a_machines_own_folder():
    facts = {"CPU": "AMD EPYC, L1 32 KiB, L2 1024 KiB, L3 32 MiB", "kernel sets": "avx512_bf16 chosen of baseline, avx2"}
    assert report.folder_of(facts).name == "amd-epyc-l1-32k-avx512-bf16"
    assert report.folder_of({**facts, "device": "NVIDIA H200"}).name == "nvidia-h200"


def test_every_suite_has_help(capsys):
    for suite in program.SUITES:
        with pytest.raises(SystemExit) as exit:
            program.main([suite, "--help"])
        assert exit.value.code == 0 and len(capsys.readouterr().out) > 400


def test_layer_lists():
    assert len(depthwise_layers()) == 11 and len(separable_layers()) == 18
    names = [layer.name for layer in (*depthwise_layers(), *separable_layers())]
    assert len(set(names)) == len(names)
    first = separable_layers()[1]
    assert (first.out_size, first.padding) == ((56, 56), (1, 1))


def test_timing_tells_slow_from_fast():
    def work(n):
        a = torch.ones(n, n)
        return lambda: torch.mm(a, a)

    times = Stopwatch("cpu", 1).interleaved({"small": work(32), "large": work(512)}, rounds=3)
    assert times["large"] > 5 * times["small"]
    assert geometric_mean([2, 8]) == pytest.approx(4)


def test_demo(tmp_path):
    picture = tmp_path / "demo.png"
    command = [sys.executable, "examples/demo.py", "--epochs", "3", "--output", str(picture)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_with_root_on_path())
    assert result.returncode == 0, result.stderr
    accuracy = float(result.stdout.split("; ")[1].split("%")[0])
    assert accuracy > 90 and "equal to nn.Conv2d's result" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def _with_root_on_path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
