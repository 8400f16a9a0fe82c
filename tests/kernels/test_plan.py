"""The plans: pure functions, checked without running anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dwconv_ext

_C = dwconv_ext._C
pytestmark = pytest.mark.isa


DEFAULTS = {
    "op": "depthwise_conv2d",
    "pass_": "forward",
    "dtype": "float32",
    "layout": "NCHW",
    "batch": 8,
    "channels": 64,
    "in_size": (56, 56),
    "kernel": (3, 3),
    "stride": (1, 1),
    "dilation": (1, 1),
    "out_channels": 64,
    "threads": 2,
}


def plan(**changes):
    """The plan of an ordinary problem with some changes; "same" padding, as far as stride 1 goes."""
    given = {**DEFAULTS, **changes}
    given["in_size"] = given.pop("size", given["in_size"])
    padding = tuple(d * (k - 1) // 2 for k, d in zip(given["kernel"], given["dilation"], strict=True))
    return _C.plan(**{"padding": padding, **given})


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("pass_", ["forward", "backward_weight"])
def test_square_filters_have_kernels_of_their_own(size, stride, layout, pass_):
    p = plan(pass_=pass_, layout=layout, size=(9, 9), kernel=(size, size), stride=(stride, stride))
    same = [row for row in _C.kernel_table() if all(row[key] == p[key] for key in ("isa", "name", "dtype"))]
    own = any((row["filter"], row["stride"]) == (size, stride) for row in same)
    assert own or p["isa"] == "baseline"  # which has to be right, not fast
    assert (p["filter"], p["stride"]) == ((size, stride) if own else (0, 0))


@pytest.mark.parametrize(
    "odd",
    [{"kernel": (3, 5)}, {"kernel": (31, 31)}, {"stride": (1, 2)}, {"stride": (3, 3)}, {"dilation": (2, 2)}, {"kernel": (1, 1)}],
    ids=str,
)
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_everything_else_has_the_general_kernel(odd, layout):
    assert plan(layout=layout, **odd)["filter"] == 0


@pytest.fixture
def isa(request):
    if request.param not in _C.supported_isas():
        pytest.skip(f"no {request.param} here")
    before = _C.selected_isa()
    _C.select_isa(request.param)
    yield
    _C.select_isa(before)


@pytest.mark.parametrize(
    "isa, changes, flat",
    [
        ("avx512", {"channels": 33, "size": (112, 112)}, True),  # a third of the lanes would be idle
        ("avx512", {"channels": 64, "size": (56, 56)}, True),  # in order, and without a choice of columns
        ("avx512", {"channels": 512, "size": (14, 14)}, False),  # rows end too often
        ("avx512", {"channels": 20, "size": (14, 14)}, True),
        ("avx512_bf16", {"channels": 64, "size": (56, 56), "dtype": "bfloat16"}, False),
        ("avx512_bf16", {"channels": 33, "size": (56, 56), "dtype": "bfloat16"}, True),
        ("avx512", {"channels": 33, "size": (112, 112), "stride": (2, 2)}, False),
        ("avx512", {"channels": 33, "size": (112, 112), "kernel": (5, 5)}, False),
        ("avx512", {"channels": 33, "size": (112, 112), "dilation": (2, 2)}, False),
        ("avx2", {"channels": 128, "size": (28, 28)}, False),
        ("avx2", {"channels": 36, "size": (28, 28), "dtype": "bfloat16"}, True),
        ("avx2", {"channels": 32, "size": (28, 28), "dtype": "bfloat16"}, False),
    ],
    indirect=["isa"],
)
def test_which_channels_last_layers_have_rows_of_pixels_as_lanes(isa, changes, flat):
    p = plan(layout="channels_last", **{"batch": 1, **changes})
    assert p["name"] == "depthwise_forward_nhwc" + "_flat" * flat
    assert ("elements of a row" in p["reason"]) == flat


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_a_blocks_scratch_is_not_written_by_rows_of_pixels(layout):
    """Its pixels lie apart, even where such a kernel is forced."""
    _C.force_row("depthwise_forward_nhwc_flat", 3, 1)
    try:
        p = plan(op="separable_conv2d", layout=layout, channels=33, size=(13, 13))
    finally:
        _C.force_row("")
    assert "elements of a row" not in p["reason"]


@pytest.mark.parametrize(
    "isa, changes, family",
    [
        ("avx2", {"size": (7, 7), "channels": 1024}, "transposed"),  # rows narrower than a vector
        ("avx2", {"size": (9, 9)}, "transposed"),  # or than two
        ("avx2", {"size": (56, 56)}, "rows"),
        ("avx2", {"size": (112, 112), "kernel": (5, 5)}, "rows"),
        ("avx2", {"size": (56, 56), "kernel": (1, 11)}, "rows"),
        ("avx2", {"size": (56, 56), "dilation": (2, 2)}, "rows"),
        ("avx2", {"size": (56, 56), "stride": (2, 2)}, "transposed"),
        ("avx2", {"size": (56, 56), "kernel": (31, 31)}, "transposed"),
        ("avx2", {"size": (9, 224), "batch": 1, "channels": 3, "stride": (2, 2)}, "rows"),  # too few planes to fill a vector
        ("avx512", {"size": (7, 7), "channels": 1024}, "transposed"),  # half a vector
        ("avx512", {"size": (14, 14), "channels": 512}, "direct"),
        ("avx512", {"size": (9, 9), "kernel": (7, 7)}, "transposed"),  # the idle lanes of many taps
        ("avx512", {"size": (9, 9)}, "direct"),
        ("avx512", {"size": (56, 56)}, "direct"),
        ("avx512_bf16", {"size": (112, 112), "dtype": "bfloat16"}, "direct"),
        ("avx512", {"size": (14, 14), "stride": (2, 2)}, "transposed"),
        ("avx512", {"size": (56, 56), "kernel": (5, 5), "stride": (2, 2)}, "direct"),
        ("avx512", {"size": (56, 56), "stride": (3, 3)}, "transposed"),
        ("avx512", {"size": (56, 56), "channels": 96, "kernel": (11, 1)}, "direct"),
        ("avx512", {"size": (14, 14), "kernel": (9, 9)}, "transposed"),
        ("avx512", {"size": (56, 56), "channels": 4, "batch": 1, "dilation": (2, 2)}, "rows"),
        ("avx512", {"size": (56, 56), "kernel": (31, 31)}, "transposed"),
        ("avx512", {"size": (9, 224), "batch": 1, "channels": 3, "stride": (2, 1)}, "rows"),
    ],
    indirect=["isa"],
)
def test_columns_are_lanes_where_rows_are_wide(isa, changes, family):
    assert plan(**changes)["name"] == f"depthwise_forward_nchw_{family}"


@pytest.mark.parametrize(
    "isa, changes, family",
    [
        ("avx2", {"size": (9, 9)}, "transposed"),
        ("avx2", {"size": (112, 112)}, "rows"),
        ("avx2", {"size": (112, 112), "stride": (2, 2)}, "transposed"),
        ("avx2", {"batch": 64, "channels": 1}, "rows"),
        ("avx512", {"size": (14, 14)}, "transposed"),
        ("avx512", {"size": (28, 28)}, "direct"),
        ("avx512", {"size": (112, 112), "stride": (2, 2)}, "transposed"),
        ("avx512", {"batch": 64, "channels": 1, "stride": (2, 2)}, "rows"),
    ],
    indirect=["isa"],
)
def test_columns_are_lanes_of_a_weight_gradient_where_rows_are_wide(isa, changes, family):
    assert plan(pass_="backward_weight", **changes)["name"] == f"depthwise_backward_weight_nchw_{family}"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("size", [(14, 14), (56, 56), (112, 112)])
def test_strided_input_gradients_of_many_planes_are_transposed(isa, size):
    p = plan(pass_="backward_input", size=size, stride=(2, 2))
    assert p["name"] == "depthwise_backward_input_nchw_transposed"


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 32, 112, 112), (1, 1024, 7, 7), (3, 17, 5, 900), (64, 3, 9, 9)])
def test_partial_sums_do_not_depend_on_the_threads(shape, layout):
    batch, channels, *size = shape
    plans = [
        plan(pass_="backward_weight", layout=layout, batch=batch, channels=channels, size=tuple(size), threads=threads)
        for threads in (1, 2, 7, 64)
    ]
    parts = {(p["parts"], p["rows_per_tile"]) for p in plans}
    assert len(parts) == 1


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("op", ["depthwise_conv2d", "separable_conv2d"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (8, 32, 112, 112), (1, 1024, 7, 7), (2, 512, 14, 14), (1, 16, 1, 3000)])
def test_tiles_cover_the_output_and_workers_have_some(shape, layout, op, threads):
    batch, channels, *size = shape
    p = plan(op=op, layout=layout, batch=batch, channels=channels, size=tuple(size), threads=threads, out_channels=channels)
    rows = batch * size[0] if op == "separable_conv2d" else size[0]
    assert p["rows_per_tile"] >= 1 and p["tiles"] >= -(-rows // p["rows_per_tile"])
    assert 1 <= p["workers"] <= min(threads, p["tiles"])
    assert 0 <= p["scratch_bytes"] < 64 << 20


def test_small_batches_with_large_weights_split_the_output_channels():
    one = plan(op="separable_conv2d", layout="channels_last", batch=1, channels=1024, size=(7, 7), out_channels=1024)
    many = plan(op="separable_conv2d", layout="channels_last", batch=64, channels=1024, size=(7, 7), out_channels=1024)
    assert "1/8 of the output channels" in one["reason"] and one["workers"] == 2  # four tiles a worker
    assert "1/1 of the output channels" in many["reason"] and many["workers"] == 2


@pytest.mark.parametrize("isa", ["avx512"], indirect=True)
@pytest.mark.parametrize(
    "changes, kernel",
    [
        ({"size": (56, 56), "channels": 128}, "direct"),
        ({"size": (112, 112), "channels": 64, "stride": (2, 2), "batch": 8}, "direct"),
        ({"size": (14, 14), "channels": 512}, "transposed"),  # its rows leave lanes idle
        ({"size": (7, 7), "channels": 1024}, "transposed"),
        ({"size": (56, 56), "channels": 128, "dtype": "float16"}, "transposed"),
        ({"size": (56, 56), "channels": 128, "dilation": (2, 2)}, "transposed"),
    ],
)
def test_nchw_blocks_have_pixels_as_lanes_where_these_are_used(isa, changes, kernel):
    own = ("avx512", "depthwise_forward_nchw_direct", 3, changes.get("stride", (1, 1))[0])
    if kernel == "direct" and own not in {(r["isa"], r["name"], r["filter"], r["stride"]) for r in _C.kernel_table()}:
        pytest.skip("a build with few kernels")
    p = plan(op="separable_conv2d", out_channels=128, **changes)
    assert p["name"] == f"separable_forward_nchw_{kernel}" and ("pixels are lanes" in p["reason"]) == (kernel == "direct")


@pytest.fixture
def small_l2():
    _C.set_prefetch_threshold(8 << 20)
    yield
    _C.set_prefetch_threshold(-1)


@pytest.mark.parametrize(
    "changes, beyond",
    [
        ({"batch": 8, "channels": 128, "kernel": (5, 5)}, True),  # 12.8 MB
        ({"batch": 2, "channels": 128, "kernel": (5, 5)}, False),  # 3.2 MB
        ({"batch": 32, "channels": 32, "kernel": (5, 5)}, False),  # pixels of 128 bytes
        ({"batch": 8, "channels": 128, "layout": "NCHW"}, False),
        ({"batch": 2, "channels": 128, "pass_": "backward_weight"}, True),
        ({"batch": 8, "channels": 128, "pass_": "backward_input", "stride": (2, 2)}, True),  # 3.2 MB of grad_output
        ({"batch": 1, "channels": 64, "pass_": "backward_weight"}, False),
    ],
)
def test_inputs_beyond_the_caches_are_read_in_order_first(changes, beyond, small_l2):
    # Forward 5x5, since 3x3 has a kernel that reads in order anyhow.
    assert ("read in order first" in plan(**{"layout": "channels_last", **changes})["reason"]) == beyond


@pytest.mark.parametrize("batch, beyond", [(1, False), (8, True)])
def test_nchw_rows_are_prefetched_where_the_input_is_large(batch, beyond, small_l2):
    rows = plan(batch=batch, channels=128, kernel=(11, 1), dilation=(2, 1))["reason"]
    assert ("next rows are prefetched" in rows) == beyond


@pytest.mark.parametrize("batch, beyond", [(1, False), (8, True)])
def test_a_block_prefetches_the_next_tile_where_the_input_is_large(batch, beyond, small_l2):
    p = plan(op="separable_conv2d", layout="channels_last", batch=batch, channels=128)
    assert ("input is prefetched" in p["reason"]) == beyond


def test_a_large_l2_is_left_to_the_processors_prefetchers_until_memory_is_read():
    _, l2, l3 = _C.cache_bytes()
    image = 2 * 112 * 56 * 56 * 4  # input and output
    for pass_ in ("forward", "backward_weight"):
        kernel = (5, 5) if pass_ == "forward" else (3, 3)  # 3x3 forward has a kernel that reads in order anyhow
        for batch, in_memory in ((8, 8 * image >= l3 // 2), (l3 // image, True)):
            reason = plan(layout="channels_last", channels=112, batch=batch, pass_=pass_, kernel=kernel)["reason"]
            assert ("read in order first" in reason) == (in_memory or l2 < 1 << 20)
            long_pixels = plan(layout="channels_last", channels=128, batch=batch, pass_=pass_, kernel=kernel)["reason"]
            if pass_ == "forward" and l2 >= 1 << 20:
                assert "read in order first" not in long_pixels


def test_tiny_problems_stay_on_one_thread():
    assert plan(batch=1, channels=16, size=(7, 7), threads=8)["workers"] == 1


def test_bytes_and_flops():
    p = plan(batch=2, channels=32, size=(10, 12), kernel=(3, 3), dtype="bfloat16")
    outputs = 2 * 32 * 10 * 12
    assert p["flops"] == 2 * 9 * outputs
    assert p["bytes"] == 2 * (2 * outputs + 32 * 9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected"),
        ({"layout": "NDHWC"}, "layout: expected"),
        ({"op": "conv3d"}, "op: expected"),
        ({"pass_": "sideways"}, "pass: expected"),
        ({"stride": (0, 1)}, "stride: must be positive"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(**wrong)


def test_report_names_versions_and_kernels():
    from dwconv_ext.__main__ import report

    facts = report()
    assert torch.__version__ in facts["torch"] and facts["threads"] == str(torch.get_num_threads())
    assert _C.selected_isa() in facts["kernel sets"] and "depthwise_forward_nhwc" in facts["kernels"]
    assert facts["CUDA"]


# --- dwconv_ext.plan ---------------------------------------------------------------------------------------------------


def test_plan_of_a_layer():
    conv = torch.nn.Conv2d(32, 32, 3, 2, 1, groups=32)
    plans = dwconv_ext.plan(conv, (8, 32, 112, 112))
    assert [p.pass_ for p in plans] == ["forward", "backward_input", "backward_weight"]
    forward = plans[0]
    assert forward.bytes == 4 * (8 * 32 * (112**2 + 56**2) + 32 * 9) and forward.flops == 2 * 8 * 32 * 56**2 * 9
    text = str(plans)
    assert forward.kernel in text and forward.reason in text and "FLOP/byte" in text
    assert len(dwconv_ext.plan(torch.nn.Conv2d(32, 32, 3, padding="same", groups=32), (8, 32, 9, 9))) == 2
    even = dwconv_ext.plan(torch.nn.Conv2d(32, 32, 4, padding="same", groups=32), (8, 32, 9, 9))[0]
    assert even.flops == 2 * 8 * 32 * 9 * 9 * 16  # the output is as large as the input


def test_plan_in_one_dimension():
    conv = dwconv_ext.DepthwiseConv1d(64, 64, 4, causal=True)
    forward, backward = dwconv_ext.plan(conv, (2, 64, 1000))
    assert forward.flops == 2 * 2 * 64 * 1000 * 4 and backward.pass_ == "backward_weight"
    last = torch.empty(2, 1000, 64).transpose(1, 2)
    assert dwconv_ext.plan(torch.nn.Conv1d(64, 64, 15, 2, 7, groups=64), last)[0].layout == "channels_last"
    with pytest.raises(ValueError, match=r"plan: input must have shape \(N, 64, L\), but got \[2, 64, 1, 9\]"):
        dwconv_ext.plan(conv, (2, 64, 1, 9))


def test_plan_of_a_multiplier_counts_all_filters():
    forward = dwconv_ext.plan(torch.nn.Conv2d(32, 96, 3, padding=1, groups=32), (8, 32, 28, 28))[0]
    assert forward.flops == 2 * 8 * 96 * 28**2 * 9
    assert forward.bytes == 4 * (8 * (32 + 96) * 28**2 + 96 * 9) and "3 times" in forward.reason


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("multiplier, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_the_plan_is_what_runs(layout, multiplier, stride):
    code = (
        "import torch, dwconv_ext, sys; torch.set_num_threads(1)\n"
        f"conv = torch.nn.Conv2d(16, {16 * multiplier}, 3, {stride}, 1, groups=16)\n"
        f"x = torch.randn(2, 16, 30, 28).contiguous(memory_format=torch.{layout}).requires_grad_()\n"
        "for p in dwconv_ext.plan(conv, x): print(f'{p.pass_} {p.kernel} {p.tiles} tiles of {p.rows_per_tile} rows')\n"
        f"dwconv_ext.depthwise_conv2d(x, conv.weight, None, {stride}, 1).sum().backward()\n"
    )
    environment = {**os.environ, "DWCONV_EXT_LOG_PLAN": "1", "PYTHONPATH": str(Path(dwconv_ext.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"(forward|backward_\w+) .*-> (\w+) .*?(\d+ tiles of \d+ rows)", done.stderr)
    for line in done.stdout.splitlines():
        pass_, kernel, tiles = line.split(" ", 2)
        assert (pass_, kernel, tiles) in ran, (line, done.stderr)


def test_plan_of_a_block_and_a_tensor():
    x = torch.empty(2, 16, 9, 9, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    (plan,) = dwconv_ext.plan(dwconv_ext.FusedDSConv(16, 32), x, threads=1)
    assert (plan.kernel, plan.dtype, plan.layout, plan.workers) == ("separable_forward_nhwc", "bfloat16", "channels_last", 1)


@pytest.mark.parametrize(
    "layer, given, error, message",
    [
        (torch.nn.Conv2d(4, 4, 3, groups=4), None, TypeError, "plan: input must be a Tensor or a shape, but got None"),
        (torch.nn.Conv2d(4, 4, 3, groups=4), 8, TypeError, "plan: input must be a Tensor or a shape, but got 8"),
        (torch.nn.Conv2d(4, 4, 3, groups=4), (1, 4, -8, 8), ValueError, "plan: input must be a Tensor or a shape, but got"),
        (torch.nn.Linear(3, 3), (1, 3, 4, 4), TypeError, "layer must be a depthwise nn.Conv2d, nn.Conv1d or nn.ConvTranspose2d"),
        (torch.nn.Conv2d(4, 4, 3), (1, 4, 4, 4), TypeError, "layer must be"),
        (torch.nn.Conv2d(4, 4, 3, groups=4), (1, 5, 4, 4), ValueError, "input must have shape"),
        (torch.nn.Conv2d(4, 4, 3, groups=4), (1, 4, 2, 2), ValueError, "larger than the padded input"),
        (torch.nn.Conv2d(4, 4, 3, groups=4), torch.empty(1, 4, 4, 4, dtype=torch.int32), ValueError, "input must be float32"),
    ],
)
def test_plan_errors(layer, given, error, message):
    with pytest.raises(error, match=message):
        dwconv_ext.plan(layer, given)


@pytest.mark.parametrize("threads", ["a", 1.5, 0, 2**70])
def test_threads_are_a_positive_int(threads):
    with pytest.raises(ValueError, match=f"plan: threads must .*, but got {threads!r}"):
        dwconv_ext.plan(torch.nn.Conv2d(4, 4, 3, groups=4), (1, 4, 8, 8), threads=threads)


def test_a_forced_row_is_not_another_rows_remembered_plan():
    """Two rows of one filter and stride, forced one after the other on the same problem; the shorter name second."""
    code = (
        "import torch, dwconv_ext; x, w = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 4, 4)\n"
        "for name in ('depthwise_forward_nchw_transposed', 'depthwise_forward_nchw_rows'):\n"
        "    dwconv_ext._C.force_row(name, 0, 0); dwconv_ext.depthwise_conv2d(x, w)\n"
    )
    environment = {**os.environ, "DWCONV_EXT_LOG_PLAN": "1", "PYTHONPATH": str(Path(dwconv_ext.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [f"-> depthwise_forward_nchw_{name}" in done.stderr for name in ("transposed", "rows")] == [True, True], done.stderr


def test_plans_are_remembered_by_every_field():
    """Keys and what they hold are compared by the compiler's own operator==, which leaves no field out."""
    root = Path(__file__).parents[2] / "csrc"
    if not root.exists():
        pytest.skip("an installed package without its sources")
    sources = {path: path.read_text() for path in root.rglob("*.h")}
    structs = {
        (path.parent.parent.name, name): body
        for path, text in sources.items()
        for name, body in re.findall(r"^struct (\w+)[^;{]* \{\n(.*?)^\};", text, re.M | re.S)
    }
    compared, waiting = set(), [key for key in structs if key[1] == "PlanKey"]
    assert len(waiting) == 2, "the CPU's and CUDA's"
    while waiting:
        key = waiting.pop()
        if key in compared:
            continue
        compared.add(key)
        body, name = structs[key], key[1]
        assert f"bool operator==(const {name}&) const = default;" in body, name
        bases = re.findall(rf"^struct {name} : (\w+)", "\n".join(sources.values()), re.M)
        for field in [*bases, *re.findall(r"^  (\w+) \w+(?: = [^;]*)?;", body, re.M)]:
            waiting += [k for k in structs if k[1] == field and k[0] in (key[0], "csrc")]
    assert {name for _, name in compared} >= {"PlanKey", "CpuProblem", "DepthwiseProblem", "Activation", "Machine", "ForcedRow"}
