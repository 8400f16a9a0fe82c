"""The benchmark program and the demo, on small layers and a few rounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import dwconv_ext
from benchmarks import __main__ as program
from benchmarks import calibrate, memory, network, plot, report, suites, sweep
from benchmarks.layers import depthwise_layers, inverted_layers, pointwise_layers, separable_layers
from benchmarks.models import build
from benchmarks.timing import Stopwatch, geometric_mean
from dwconv_ext.models.mobilenet_v2 import InvertedResidual, MobileNetV2
from dwconv_ext.nn.folded_layers import Folded

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("what", "layer", "dtype"),
    [
        ("depthwise", "7x7_c1024", "float32"),
        ("depthwise", "7x7_c1024", "bfloat16"),
        ("transposed", "14x14_c128_4x4", "float32"),
        ("separable", "block13", "bfloat16"),
        ("pointwise", "shufflenet_v2_x1_0_7x7_232_232", "bfloat16"),
        ("inverted", "inverted15_7x7", "float32"),
        ("training", "block13", "float32"),
        ("training", "inverted15_7x7", "bfloat16"),
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
    both = ["forward", "backward"]
    passes = {"depthwise": both, "transposed": both, "training": ["step"]}.get(what, ["forward"])
    assert {r["pass"] for r in data["results"]} == set(passes)
    for result in data["results"]:
        assert {*suites.OURS, suites.BASELINE, suites.BASELINE_CHANNELS_LAST} <= set(result["seconds"])
        wide = f"{suites.BASELINE}{suites.FLOAT32}"
        assert (wide in result["seconds"]) == (what not in ("depthwise", "transposed", "training") and dtype != "float32")
        assert (suites.PRODUCT in result["seconds"]) == (what == "pointwise")
        assert ({*suites.TWO_OPS} <= set(result["seconds"])) == (what == "inverted")
        assert all(t > 0 for t in result["seconds"].values()) and result["roofline_seconds"] > 0
    assert data["threads"] == 2 and torch.__version__ in data["torch"] and data["commit"]
    table = files["md"].read_text()
    assert table.count("| geometric mean |") == len(passes)
    assert ("sgemm %" in table, "own two ops" in table) == (what == "pointwise", what == "inverted")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    roofline = files["png"].with_stem(f"{what}-{dtype}-roofline")
    assert roofline.read_bytes().startswith(b"\x89PNG")


def test_with_the_tuner(capsys, threads):
    threads(torch.get_num_threads())
    command = ["depthwise", "--layers", "7x7_c1024", "--batch", "1", "--rounds", "1", "--no-compile", "--no-runtimes", "--tuned"]
    before = dwconv_ext._C.timed_runs()
    assert program.main(command) == 0 and dwconv_ext._C.timed_runs() > before
    assert ", tuned: forward" in capsys.readouterr().out and dwconv_ext._C.benchmark_choices() == []


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


def test_costs_of_activations(tmp_path, capsys, threads):
    threads(torch.get_num_threads())
    assert program.main(["activations", "--rounds", "1", "--threads", "1", "--save", str(tmp_path)]) == 0
    assert "gelu_tanh" in capsys.readouterr().out
    seconds = json.loads((tmp_path / "activations-float32.json").read_text())["seconds"]
    assert {"silu", "torch silu", "identity"} <= seconds.keys() and all(t > 0 for t in seconds.values())


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
    assert changes == {"itself", "H-1", "H+1", "C+1", "C+8", "C-8", "at 320"}  # 7x7 at 192 is H-1
    assert len(points) == 2 * 7 + 4 * 2 * 13
    assert all(p["ns"] > 0 and p["megabytes"] > 0 and (p["ratio"] == 1) >= (p["change"] == "itself") for p in points)
    assert files[1].read_text().count("### sweep") == 3


def test_a_sweep_names_the_worst_neighbour():
    ratios = {"itself": 1, "H-1": 1.25, "H+1": 1.3, "C+1": 0.5}
    points = [sweep.Point("pointwise", "layer", "NCHW", change, 1, ratio, 1) for change, ratio in ratios.items()]
    assert sweep.summary(points)[1] == [["pointwise", "2 of 3", "1.30", "layer NCHW H+1"]]


def test_a_sweep_has_layers_of_every_kind():
    layers = sweep.listed()
    assert Counter(layer.kind for layer in layers) == {"depthwise": 11, "separable": 9, "pointwise": 11, "inverted": 12}
    changed = sweep.neighbours(layers[-1])
    assert changed["at 320"].size == (10, 10) and changed["C-8"].flops < changed["itself"].flops


@pytest.mark.parametrize("what", ["depthwise", "separable", "pointwise", "inverted"])
def test_a_wrong_result_is_not_timed(what, monkeypatch, capsys):
    owners = {"depthwise": (suites, "depthwise_conv2d"), "inverted": (suites.Steps, "forward")}
    owner, name = owners.get(what, (Folded, "__call__"))
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: right(*args) * 1.001)
    assert program.main([what, "--layers", "7x7", "--batch", "1", "--rounds", "1", "--no-compile", "--no-runtimes"]) == 1
    assert "wrong result" in capsys.readouterr().err


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
    lists = [depthwise_layers(), separable_layers(), pointwise_layers(), inverted_layers()]
    assert [*map(len, lists)] == [11, 18, 172, 34]
    names = [layer.name for layers in lists for layer in layers]
    assert len(set(names)) == len(names)
    first = separable_layers()[1]
    assert (first.out_size, first.padding) == ((56, 56), (1, 1))
    assert first.flops == 2 * 56 * 56 * 64 * (9 + 128)
    assert first.elements == 64 * 112 * 112 + 128 * 56 * 56 + 64 * (9 + 128)


def test_inverted_layers_are_the_networks():
    found, model = [], MobileNetV2().eval()
    for block in model.modules():
        if isinstance(block, InvertedResidual):
            block.register_forward_hook(lambda block, inputs, output: found.append((*inputs[0].shape[1:], *output.shape[1:])))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    layers = inverted_layers((1,))
    assert [(x.channels, *x.size, x.out_channels, *x.out_size) for x in layers] == found
    assert [layer.expand for layer in layers] == [1] + [6] * 16


ACTIVATIONS = {"hardtanh_": "relu6", "relu_": "relu", "silu_": "silu", "hardswish_": "hardswish", "gelu": "gelu"}


@pytest.mark.parametrize("name", network.NETWORKS)
def test_pointwise_layers_are_the_networks(name):
    for package in ("torchvision", "timm"):
        pytest.importorskip(package)
    aten, found = torch.ops.aten, set()
    exported = torch.export.export(build(network.known(name)).eval(), (torch.randn(1, 3, 224, 224),))
    for node in exported.graph.nodes:
        linear = node.target is aten.linear.default
        if not linear and node.target is not aten.conv2d.default:
            continue
        (_, *x), (_, *y) = (n.meta["val"].shape for n in (node.args[0], node))
        o, c, *kernel = node.args[1].meta["val"].shape
        if kernel not in ([], [1, 1]) or len(x) != 3 or (not linear and (c != x[0] or x[1:] == [1, 1])):
            continue  # other filters, classifiers, depthwise convolutions, squeeze-and-excitation
        size = x[:2] if linear else x[1:]
        assert size == (y[:2] if linear else y[1:])  # stride 1
        after = node
        while after is node or after.target is aten.batch_norm.default:
            after, *more = after.users
            if more:
                break
        activation = "identity" if more else ACTIVATIONS.get(getattr(after.target, "__name__", "").split(".")[0], "identity")
        found.add((c, o, *size, activation))
    named = [layer for layer in pointwise_layers((1,)) if name in re.split(r"_\d+x", layer.name)[0].split("+")]
    assert {(x.channels, x.out_channels, *x.size, x.activation) for x in named} == found and len(named) == len(found)


def test_a_picture_of_a_hundred_layers_is_of_their_networks():
    panels = {"forward": {"ours": [2.0, 8.0, 3.0]}}
    names, means = plot._by_network(["one+two_7x7_8_8", "one_7x7_8_16", "three_7x7_8_8"], panels)
    assert names == ["one", "two", "three"]
    assert means["forward"]["ours"] == pytest.approx([4, 2, 3])


def test_pictures_have_a_panel_for_each_batch():
    seconds = dict.fromkeys((*suites.OURS, suites.BASELINE, suites.PRODUCT), 1.0)
    results = [{"layer": layer._asdict(), "pass": "forward", "seconds": seconds} for layer in inverted_layers()[:18]]
    names, panels = plot._layers(results)
    assert len(names) == 17 and list(panels) == ["forward, batch 1", "forward, batch 8"]
    assert panels["forward, batch 1"] == dict.fromkeys(suites.OURS, [1.0] * 17)
    assert len([r for r in panels["forward, batch 8"][suites.OURS[0]] if r == 1]) == 1  # the others are n/a


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


# ---- calibrate -----------------------------------------------------------------------------------------------------------


def saved_suite(ours, theirs, *, layer=None, arch="90", title="depthwise"):
    """A suite's figures of one layer's forward pass in channels_last; in NCHW nothing is lost. Microseconds."""
    layer = {"name": "a", "batch": 128, "channels": 64, "out_channels": 64, "size": [56, 28], "kernel": [3, 3], "stride": 1} | (
        layer or {}
    )
    seconds = {f"{who} {layout}": 1e-6 for who in ("dwconv_ext", "nn.Conv2d") for layout in suites.LAYOUTS}
    seconds |= {"dwconv_ext channels_last": ours * 1e-6, "nn.Conv2d channels_last": theirs * 1e-6}
    facts = {"device": "A GPU", "CUDA devices": f"A GPU (sm_{arch})", "torch": "2.12.0, Python 3.12", "commit": "abc"}
    return {**facts, "dtype": "float16", "suite": title, "results": [{"layer": layer, "pass": "forward", "seconds": seconds}]}


@pytest.mark.parametrize(
    ("ours", "theirs", "lost"), [(100, 90, True), (100, 94.9, True), (100, 96, False), (10, 6, False), (10, 4.9, True)]
)
def test_a_lost_layer_is_clearly_slower(ours, theirs, lost):
    assert len(calibrate.ranges(calibrate.figures(saved_suite(ours, theirs)))) == lost


def test_ranges_reach_half_way_and_hold_no_layer_that_won():
    lost = calibrate.figures(saved_suite(100, 50))
    (found,) = calibrate.ranges(lost)
    assert found.near() == [(91, 181), (46, 90), (46, 90), (40, 79), (20, 39)]
    assert found._replace(sizes=(1, 2, 3, 7, 10)).near() == [(1, 1), (2, 2), (3, 4), (5, 9), (8, 14)]
    near, far = ({"channels": c, "out_channels": c} for c in (90, 91))
    assert calibrate.ranges(lost + calibrate.figures(saved_suite(50, 100, layer=near))) == []
    for other in ({"layer": far}, {"layer": {"stride": 2}}, {"arch": "80"}, {"title": "separable"}):
        assert calibrate.ranges(lost + calibrate.figures(saved_suite(50, 100, **other))) == [found]


def test_the_table_is_the_saved_figures(tmp_path):
    """csrc/cuda/plan/faster_in_torch.inc, made anew; other architectures keep what they have."""
    figures = ROOT / "benchmarks/results/nvidia-h200/gpu-check.json"
    table = tmp_path / "table.inc"
    assert program.main(["calibrate", "--from", str(figures), "--to", str(table)]) == 0
    assert table.read_text() == calibrate.TABLE.read_text()
    other = tmp_path / "depthwise-float16.json"
    other.write_text(json.dumps(saved_suite(100, 50, arch="80")))
    assert program.main(["calibrate", "--from", str(other), "--to", str(table)]) == 0
    head, source, row, *rest = table.read_text().splitlines()
    assert [head, *rest] == calibrate.TABLE.read_text().splitlines() and source == "// sm_80: A GPU, torch 2.12.0, commit abc"
    assert row.startswith("{80, Op::kDepthwise, Pass::kForward, DType::kFloat16, Layout::kNHWC, 3, 3, 1, {91, 181}, {46, 90}")
    assert row.endswith("100.0, 50.0},  // a")


def test_measuring_runs_our_own_kernels(monkeypatch):
    """Every suite, with faked times and no GPU."""
    forced, ran = [], []

    class Half:
        force_source = staticmethod(forced.append)

    def run(options, dtype, progress):
        ran.append((options.what, dtype, options.batch))
        assert forced == ["ours"] and options.device == "cuda"
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{options.what}-{options.dtype}.json").write_text(json.dumps(saved_suite(100, 50)))
        return 0

    monkeypatch.setattr(calibrate.layer_suites, "run", run)
    measured = calibrate.measure(5, list, Half)
    assert forced == ["ours", "heuristics"] and len(set(ran)) == len(measured) == 2 * 3 * 2
    assert {suite["suite"] for suite in measured} == {"depthwise", "separable"}


def test_calibrate_without_a_gpu_says_so(capsys):
    assert program.main(["calibrate"]) == 2 and "--from JSON" in capsys.readouterr().err
