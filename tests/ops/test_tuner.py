"""dwconv_ext.benchmark: with faked times each way is chosen and right, choices are remembered, and their file survives."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, Case
from implementations import EMULATOR, running
from problems import operands
from reference import ACTIVATIONS, Convolution, check_depthwise, check_separable, conv_and_grads
from tuned import CASE, Tuned, step, stop

import dwconv_ext

ops = torch.ops.dwconv_ext
TORCH_CASES = [
    CASE,
    Case("", 1, 12, (9, 8), (5, 3), (2, 1), (1, 0), (1, 2)),
    Case("", 2, 8, (7, 7), multiplier=3),
    Case("", 3, 1, (6, 1), multiplier=2),  # strides of dimensions with one element
    Case("", 1, 8, (1, 1), (1, 1)),
]


@pytest.fixture
def emulated():
    with running(EMULATOR) as implementation:
        yield Tuned(implementation.emulator, True)
        stop(implementation.emulator)


# ---- choosing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_way_runs_and_is_right_when_it_is_the_fastest(layout, tuned):
    passes = ("forward", "backward_input", "backward_weight")
    tuned.start()
    step(layout=layout)
    ways = {pass_: tuned.ways(f" {pass_} ") for pass_ in passes}
    for pass_ in passes:
        assert tuned.choice(f" {pass_} ")["way"] == ways[pass_][0], "of equals the plan's own"
        assert ways[pass_][-1] == "torch" and len(set(ways[pass_])) == len(ways[pass_])
    assert all(len(ways[pass_]) > 2 for pass_ in (passes if tuned.emulated else ("forward",)))
    for rank in range(max(map(len, ways.values()))):
        fastest = {pass_: names[min(rank, len(names) - 1)] for pass_, names in ways.items()}
        tuned.start(*((name, 1e-6) for name in fastest.values()))
        x, w, b = CASE.tensors(torch.float32, layout)
        check_depthwise(x, w, b, CASE.conv)
        with tuned.times(False):
            check_depthwise(x, w, b, CASE.conv)
        for pass_ in passes:
            chosen = tuned.choice(f" {pass_} ")
            # The names of one pass may be another's: a mirrored gradient runs forward kernels.
            assert chosen["way"] in fastest.values() and f"1.0 us {chosen['way']}" in chosen["times"]


def test_ties_go_to_the_plans_own_and_less_wins(tuned):
    for seconds, first in ((0.975, True), (0.96, False)):
        tuned.start(("torch", seconds))
        step()
        assert (tuned.choice(" forward ")["way"] != "torch") == first


def test_off_again_is_the_heuristics_again(tuned):
    want = step()
    tuned.start(("torch", 1e-6))
    with tuned.times(True):
        step()
    stop(tuned.half)
    with tuned.times(False):
        got = step()
    assert tuned.half.benchmark_choices() == []
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_forced_rows_are_not_tuned():
    for half, force, end in ((dwconv_ext._C, ("depthwise_forward_nchw_rows", 0, 0), ("",)), (None, (0,), (-1,))):
        with running(EMULATOR if half is None else dwconv_ext._C.selected_isa()) as implementation:
            tuned = Tuned(half or implementation.emulator, half is None)
            tuned.half.force_row(*force)
            try:
                tuned.start(("torch", 1e-6))
                with tuned.times(False):
                    step()
            finally:
                tuned.half.force_row(*end)
                stop(tuned.half)


def test_modules_inference_and_compiled_graphs_go_the_same_way(tuned):
    conv = dwconv_ext.DepthwiseConv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 16, 9, 10)
    tuned.start(("torch", 1e-6))
    with torch.inference_mode():
        y = conv(x)
    assert torch.equal(y, F.conv2d(x, conv.weight, conv.bias, padding=1, groups=16))
    with tuned.times(False):
        assert torch.equal(conv(x), y)
        assert torch.equal(torch.compile(conv, backend="aot_eager", fullgraph=True)(x), y)


def test_two_threads_that_meet_a_problem_at_once_time_it_once(tuned):
    tuned.start()
    before, want, wrong = tuned.half.timed_runs(), step(dtype=torch.float64), []
    once = tuned.half.timed_runs() - before
    tuned.start()
    before, together = tuned.half.timed_runs(), threading.Barrier(2)

    def work() -> None:
        together.wait()
        got = step(dtype=torch.float64)
        wrong.extend(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.allclose(a, b))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and 0 < tuned.half.timed_runs() - before <= once


def test_an_op_called_from_torchs_convolution_does_not_go_back(tuned):
    """Somebody may have put this package under torch's own convolution."""
    depth = []

    def convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups):
        depth.append(1)
        assert len(depth) < 50
        return ops.depthwise_conv2d(x, w, b, stride, padding, dilation)

    x, w, b = CASE.tensors(torch.float32, "nchw")
    want = F.conv2d(x, w, b, padding=1, groups=16)
    library = torch.library.Library("aten", "IMPL")
    tuned.start(("torch", 1e-6))
    try:
        library.impl("convolution", convolution, "CPU")
        y = ops.depthwise_conv2d(x, w, b, (1, 1), (1, 1), (1, 1))
    finally:
        library._destroy()
    assert depth and tuned.choice(" forward ")["way"] == "torch"
    torch.testing.assert_close(y, want)


def test_a_way_that_raises_is_not_chosen(tuned):
    def convolution(*args):
        raise RuntimeError("not today")

    library = torch.library.Library("aten", "IMPL")
    tuned.start(("torch", 1e-6))
    try:
        library.impl("convolution", convolution, "CPU")
        y = ops.depthwise_conv2d(*CASE.tensors(torch.float32, "nchw"), *CASE.conv.args())
    finally:
        library._destroy()
    assert "torch" not in tuned.ways(" forward ") and not y.isnan().any()


# ---- torch's convolution in our place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_convolution_gives_what_the_op_promises(dtype, layout, tuned):
    for case in TORCH_CASES:
        x, w, b = case.tensors(dtype, layout)

        def both(bias, grad=None, x=x, w=w, conv=case.conv):
            y = ops.depthwise_conv2d(x, w, bias, *conv.args())
            grad = torch.randn_like(y) if grad is None else grad
            return grad, [y, *ops.depthwise_conv2d_backward(grad, x, w, *conv.args(), [True, True, bias is not None])]

        for bias in (b, None):
            stop(tuned.half)
            grad, ours = both(bias)
            tuned.start(("torch", 1e-6))
            _, theirs = both(bias, grad)
            assert {c["way"] for c in tuned.half.benchmark_choices()} == {"torch"}
            for got, usual, want in zip(theirs, ours, conv_and_grads(x, w, bias, case.conv, grad), strict=True):
                assert (got.dtype, got.shape, got.stride()) == (dtype, usual.shape, usual.stride())
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=0, atol=0, check_stride=False)
    for one in range(3):
        mask = [i == one for i in range(3)]
        x, w, _ = CASE.tensors(dtype, layout)
        some = ops.depthwise_conv2d_backward(torch.ones_like(x), x, w, *CASE.conv.args(), mask)
        assert [t.numel() > 0 for t in some] == mask


def test_activations_and_views_in_torchs_place(tuned):
    tuned.start(("torch", 1e-6))
    x, w, b = CASE.tensors(torch.float32, "nchw")
    for act, function in ACTIVATIONS.items():
        y = ops.depthwise_conv2d(x, w, b, (1, 1), (1, 1), (1, 1), act)
        torch.testing.assert_close(y, function(F.conv2d(x, w, b, padding=1, groups=16)), rtol=1e-5, atol=1e-6)
    without = [c["problem"] for c in tuned.half.benchmark_choices() if c["way"] != "torch"]
    assert len(without) == 1 and without[0].endswith("leaky_relu")  # whose slope does not pass torch's stable ABI
    rows = torch.randn(2, 16, 18, 10)[:, :, ::2]
    y = ops.depthwise_conv2d(rows, w, None, (1, 1), (1, 1), (1, 1))
    assert torch.equal(y, F.conv2d(rows, w, padding=1, groups=16)) and y.is_contiguous()
    assert tuned.choice(" view")["way"] == "torch"


def test_batches_of_nothing(tuned):
    tuned.start(("torch", 1e-6))
    x, w = torch.zeros(0, 4, 5, 5), torch.ones(4, 1, 3, 3)
    assert ops.depthwise_conv2d(x, w, None, (1, 1), (1, 1), (1, 1)).shape == (0, 4, 5, 5)
    grads = ops.depthwise_conv2d_backward(x, x, w, (1, 1), (1, 1), (1, 1), [True] * 3)
    assert [g.abs().sum().item() for g in grads] == [0, 0, 0] and tuned.half.benchmark_choices() == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_of_a_block(dtype, layout, emulated):
    tensors, conv = operands((1, 24, 40, (7, 8), (3, 3), Convolution((1, 1), (1, 1))), dtype, layout)
    tf32 = dtype == torch.float32
    emulated.start()
    check_separable(*tensors, conv, "relu", "silu", peer=False, narrow=True, tf32=tf32)
    ways = emulated.ways("separable_conv2d")
    assert ways[-1] == "torch" and any(w.startswith("fused") for w in ways) and any(", then " in w for w in ways)
    for way in ways:
        emulated.start((way, 1e-6))
        check_separable(*tensors, conv, "relu", "silu", peer=False, narrow=True, tf32=tf32)
        assert emulated.choice("separable_conv2d")["way"] == way
    y = ops.separable_conv2d(*tensors, *conv.args(), "relu", "silu", None, allow_tf32=tf32)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


def test_what_torch_would_round_or_add_is_not_torchs(emulated):
    emulated.start(("torch", 1e-6))
    tensors, conv = operands((1, 8, 8, (5, 5), (3, 3), Convolution((1, 1), (1, 1))), torch.float32, "nchw")
    y = ops.separable_conv2d(*tensors, *conv.args(), "relu", "relu")  # not by tf32
    ops.separable_conv2d(*tensors, *conv.args(), "relu", "relu", torch.ones_like(y), allow_tf32=True)
    assert all("torch" not in c["times"] for c in emulated.half.benchmark_choices())


# ---- without the tuner, on a measured GPU --------------------------------------------------------------------------------

RANGE = ("depthwise_conv2d", "forward", "float16", "channels_last", 128, 128, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1))


def test_measured_ranges_name_torch(emulated):
    plan = emulated.half.plan
    assert plan(*RANGE)["name"] == "torch" and "sm_90 when measured" in plan(*RANGE)["reason"]
    ours = [
        plan(*RANGE, gpu={"arch": 80}), plan(*RANGE, gpu={"arch": 100}), plan(*RANGE, bias=True), plan(*RANGE, act="relu"),
        plan(*RANGE[:2], "bfloat16", *RANGE[3:]), plan(*RANGE[:3], "NCHW", *RANGE[4:]), plan(*RANGE[:4], 8, *RANGE[5:]),
        plan(*RANGE[:9], (0, 0), *RANGE[10:]), plan(*RANGE, multiplier=2), plan(*RANGE[:6], (14, 14), *RANGE[7:]),
    ]  # fmt: skip
    assert all(p["name"].startswith("depthwise_") for p in ours)
    both = plan(RANGE[0], "backward_input", *RANGE[2:])
    assert both["name"] == "torch" and "both gradients" in both["reason"]
    emulated.half.force_source("ours")
    assert plan(*RANGE)["name"] == "depthwise_forward_rows_nhwc"
    emulated.half.force_source("heuristics")


def test_measured_ranges_run_torch(emulated):
    """A layer of the H200's table that torch's backward pass computes faster: where both gradients are wanted."""
    x = torch.randn(1, 512, 14, 14).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(512, 1, 3, 3).half()
    conv = ((1, 1), (1, 1), (1, 1))
    emulated.half.launches()
    grads = ops.depthwise_conv2d_backward(torch.ones_like(x), x, w, *conv, [True, True, False])
    assert emulated.half.launches() == []
    want = conv_and_grads(x, w, None, Convolution(padding=(1, 1)), torch.ones_like(x))
    assert torch.equal(grads[0], want[1]) and torch.equal(grads[1], want[2])
    for mask in ([True, False, False], [False, True, False], [True, True, True]):
        ops.depthwise_conv2d_backward(torch.ones_like(x), x, w, *conv, mask)
        assert emulated.half.launches() != []
    emulated.half.force_source("ours")
    ops.depthwise_conv2d_backward(torch.ones_like(x), x, w, *conv, [True, True, False])
    assert emulated.half.launches() != []
    emulated.half.force_source("heuristics")


# ---- plan ----------------------------------------------------------------------------------------------------------------


def test_plan_says_what_was_chosen_and_why(on_cpu):
    conv = torch.nn.Conv2d(16, 16, 3, 2, 1, groups=16)
    x = torch.randn(2, 16, 9, 10, requires_grad=True)
    planned = dwconv_ext.plan(conv, x)
    on_cpu.start(("torch", 1e-6))
    assert str(dwconv_ext.plan(conv, x)) == str(planned), "nothing is timed by asking"
    dwconv_ext.depthwise_conv2d(x, conv.weight, conv.bias, 2, 1).sum().backward()
    plans = dwconv_ext.plan(conv, x)
    assert [p.pass_ for p in plans] == [p.pass_ for p in planned] and {p.kernel for p in plans} == {"torch"}
    assert all(p.reason.startswith("timed: ") and "1.0 us torch" in p.reason for p in plans)
    on_cpu.start(("_transposed", 1e-6), ("phases", 1e-6))
    dwconv_ext.depthwise_conv2d(x, conv.weight, conv.bias, 2, 1).sum().backward()
    forward, *_ = dwconv_ext.plan(conv, x)
    assert forward.kernel == "depthwise_forward_nchw_transposed" and "timed: " in forward.reason


def test_cuda_plan_says_what_was_chosen(emulated):
    emulated.start(("torch", 1e-6))
    step(dtype=torch.float16)
    sizes = ("float16", "channels_last", 2, 16, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1))
    for pass_ in ("forward", "backward_input", "backward_weight"):
        plan = emulated.half.plan("depthwise_conv2d", pass_, *sizes, bias=True)
        assert plan["name"] == "torch" and "1.0 us torch" in plan["reason"]


def test_what_takes_long_without_hope_runs_once(on_cpu):
    runs = []

    def convolution(x, w, b, stride, padding, dilation, *rest):
        runs.append(1)
        return torch.mkldnn_convolution(x, w, b, padding, stride, dilation, rest[-1])

    library = torch.library.Library("aten", "IMPL")
    on_cpu.start(("torch", 5.0))
    try:
        library.impl("convolution", convolution, "CPU")
        x, w, _ = CASE.tensors(torch.float32, "nchw")
        dwconv_ext.depthwise_conv2d(x, w, padding=1)
    finally:
        library._destroy()
    assert len(runs) == 1 and "5000000.0 us torch" in on_cpu.choice(" forward ")["times"]


def test_training_with_batch_norm_has_its_ways(emulated):
    """The convolution with BatchNorm's statistics and its gradients, each against what there is without."""
    x, w, _ = CASE.tensors(torch.float32, "channels_last")
    conv = CASE.conv.args()
    emulated.start()
    y, middle, *statistics = ops.depthwise_norm_act(x, w, None, None, *conv, 1e-5, "relu", 0.0)
    how = (y, middle, x, w, None, None, *statistics, *conv, 1e-5, "relu", 0.0, (True, True))
    want = [y, middle, *statistics, *ops.depthwise_norm_act_backward(*how)]
    ways = {pass_: emulated.ways(f"depthwise_norm_act {pass_} ") for pass_ in ("forward", "backward")}
    assert all("apart" in names and len(names) == 2 for names in ways.values())
    together = {pass_: next(name for name in names if name != "apart") for pass_, names in ways.items()}
    for wanted in (together, dict.fromkeys(ways, "apart")):
        emulated.start(*((name, 1e-6) for name in wanted.values()), ("torch", 1e-6))
        for runs in (True, False):
            with emulated.times(runs):
                got = [
                    *ops.depthwise_norm_act(x, w, None, None, *conv, 1e-5, "relu", 0.0),
                    *ops.depthwise_norm_act_backward(*how),
                ]
        for pass_, name in wanted.items():
            assert emulated.choice(f"depthwise_norm_act {pass_} ")["way"] == name
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    emulated.start(*((name, 1e-6) for name in together.values()))
    for _ in range(2):
        emulated.half.launches()
        ops.depthwise_norm_act(x, w, None, None, *conv, 1e-5, "relu", 0.0)
        ops.depthwise_norm_act_backward(*how)
    launched = [launch["pass"] for launch in emulated.half.launches()]
    assert launched.count("forward") == 2 and launched.count("backward") == 1, "once chosen, nothing else runs"
