"""The CUDA kernels one by one, their threads' order and their accesses, on the emulator (tools/cuda_emulator).

What the ops compute is tested in tests/ops, for the CPU and CUDA alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import cuda_emulator as emulator
import pytest
import torch
from cases import LAYOUTS, Case
from implementations import CUDA, EMULATOR, TURING, Implementation, running
from inverted import check_cuda as check_inverted
from inverted import operands as inverted_operands
from problems import operands
from reference import (
    check_batch_norm,
    check_depthwise,
    check_depthwise_norm,
    check_depthwise_norm_forward,
    check_pooled,
    check_separable,
)
from rows import check_nan_at_an_edge, forced_case
from tolerance import UNIT

import dwconv_ext

if emulator.cuda_headers() is None:
    pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch", allow_module_level=True)

E = emulator.load()
TABLE = E.kernel_table()


@pytest.fixture
def emulated():
    with running(EMULATOR):
        yield E


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
def test_what_32_bits_do_not_hold(kernels):
    device = kernels.device
    x, w = torch.ones(1, 2, 8, 8, device=device), torch.ones(2, 1, 3, 3, device=device)
    with pytest.raises(RuntimeError, match=r"must be below 2\^31 on CUDA: stride is \(1, 1\), padding \(0, 1073741824\)"):
        dwconv_ext.depthwise_conv2d(x, w, padding=(0, 2**30))
    with pytest.raises(RuntimeError, match="expected padding to be at most"):
        dwconv_ext.depthwise_conv2d(x, w, padding=2**62)
    with pytest.raises(RuntimeError, match=r"the output's shape .* is too large to allocate: padding is"):
        dwconv_ext.depthwise_conv2d(x, w, padding=2**40)


# ---- every kernel --------------------------------------------------------------------------------------------------------


def label(row):
    name = f"{row['name']}-{row['pass']}-{row['dtype']}-{row['layout']}-f{row['filter']}-s{row['stride']}"
    return f"{name}-{row['aligned']}" if row["aligned"] else name


def test_the_table_names_each_kernel_once():
    assert len({label(row) for row in TABLE}) == len(TABLE)
    if dwconv_ext._C_cuda is not None:
        assert dwconv_ext._C_cuda.kernel_table() == TABLE


def check_step(dtype):
    """More channels than a block's threads; gives the output and the next state."""
    x, state, w = (t.to(dtype) for t in (torch.randn(3, 90), torch.randn(3, 90, 6), torch.randn(90, 1, 4)))
    joined = torch.cat((state, x[:, :, None]), 2)
    want = torch.nn.functional.conv1d(joined.double(), w.double(), None, 1, 0, 2, groups=90)[:, :, 0].relu()
    y = dwconv_ext.depthwise_conv1d_step(x, state, w, None, "relu", 2)
    torch.testing.assert_close(y.double(), want, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype] + 1e-6)
    assert torch.equal(state, joined[:, :, 1:])
    return y, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_do_not_depend_on_the_order_of_threads(dtype, emulated):
    results = []
    for order in ORDERS:
        emulated.set_order(order)
        torch.manual_seed(0)
        results.append(check_step(dtype))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("index", range(len(TABLE)), ids=lambda i: label(TABLE[i]))
def test_every_kernel_runs(index, emulated):
    row = TABLE[index]
    case, dtype, layout = forced_case(row, channels=40, width=48 if row["aligned"] else 37)
    emulated.force_row(index)
    emulated.set_gpu(TURING if row["arch"][1] < 80 else {"sm_count": 4})
    if row["pass"] == "sum_parts":
        case = Case("several_parts", 2, 40, (60, 64), (3, 3))
        emulated.set_gpu({})
    emulated.launches()
    if row["op"] == "inverted_residual":
        emulated.force_fusion("always")
        kernel, stride = row["filter"] or 5, row["stride"] or 2
        tf32 = bool(row["tensor"]) and dtype == torch.float32
        shape = (2, 23, 72, 72, 19, 21, kernel, stride)
        check_inverted(
            shape, dtype, LAYOUTS[layout], Implementation(EMULATOR, cuda=True, emulator=emulated), added=True, tf32=tf32
        )
    elif row["op"] == "separable_conv2d":
        apart = row["pass"] != "forward"
        emulated.force_fusion("never" if apart else "always")
        case = replace(case, kernel=(2, 11), stride=(2, 1)) if apart else case
        layout = "channels_last" if row["pass"] == "activate" else layout  # in NCHW "transpose" activates
        x, dw, db = case.tensors(dtype, layout)
        pw = (torch.randn(72, 40, 1, 1) / 6).to(dtype)
        tf32 = row["tensor"] and dtype == torch.float32
        act = "silu" if row["pass"] == "activate" else "relu"
        check_separable(x, dw, db, pw, None, case.conv, act, "relu", peer=False, narrow=True, tf32=tf32)
    elif row["op"] == "depthwise_norm_act":
        emulated.force_fusion("always")
        checked = check_depthwise_norm if row["pass"] == "backward" else check_depthwise_norm_forward
        checked(*case.tensors(dtype, layout)[:2], case.conv, "relu")
    elif row["pass"] == "join_means":
        pooled = Case("", 2, 40, (12, 16))
        check_pooled(pooled.tensors(dtype, layout), pooled.conv, "silu")
    elif row["op"] == "depthwise_conv1d_step":
        check_step(dtype)
    elif row["op"] == "batch_norm_act":
        for width in (16, 37):
            x = replace(case, size=(19, width)).tensors(dtype, layout)[0]
            check_batch_norm(x, *torch.randn(2, 40, dtype=torch.promote_types(dtype, torch.float32)), "relu", peer=False)
    else:
        check_depthwise(*case.tensors(dtype, layout), case.conv, peer=False)
    ran = [label(launched) for launched in emulated.launches()]
    assert label(row) in ran, ran


WEIGHT_ROWS = [i for i, row in enumerate(TABLE) if row["pass"] == "backward_weight"]


@pytest.mark.parametrize("index", WEIGHT_ROWS, ids=lambda i: label(TABLE[i]))
def test_nan_at_an_edge_reaches_only_the_taps_that_meet_it(index, emulated):
    emulated.force_row(index)
    emulated.launches()
    check_nan_at_an_edge(TABLE[index], channels=16, width=48 if TABLE[index]["aligned"] else 9)
    assert label(TABLE[index]) in map(label, emulated.launches())


# ---- races, barriers, stray accesses ---------------------------------------------------------------------------------------


RACES = {
    "3x3": Case("", 2, 40, (13, 15)),
    "5x5_stride2": Case("", 1, 24, (14, 16), (5, 5), (2, 2)),
    "7x7": Case("", 1, 16, (14, 14), (7, 7)),
    "large": Case("", 1, 12, (17, 18), (9, 13)),
    "any": Case("", 2, 9, (9, 8), multiplier=2),
    "line": Case("", 3, 40, (2, 144), (1, 4), padding=(0, 0, 3, 0)),
    "long_line": Case("", 2, 24, (1, 300), (1, 13)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", RACES)
def test_depthwise_bits_do_not_depend_on_the_order_of_threads(case, layout, emulated):
    emulated.set_gpu({"sm_count": 2})

    def run(order, seed):
        emulated.set_order(order, seed)
        x, w, b = (t.requires_grad_() for t in RACES[case].tensors(torch.float16, layout))
        y = dwconv_ext.depthwise_conv2d(x, w, b, *RACES[case].conv.args())
        return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]

    want = run("forwards", 0)
    for order, seed in (("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        assert all(torch.equal(a, b) for a, b in zip(want, run(order, seed), strict=True)), order


def backward(case, dtype, layout, mask=(True, True, True)):
    """The gradients of a case, of a grad_output that is not the same everywhere."""
    x, w, _ = case.tensors(dtype, layout)
    y = dwconv_ext.depthwise_conv2d(x, w, None, *case.conv.args())
    grad = Case("", *y.shape[:2], tuple(y.shape[2:])).tensors(dtype, layout, seed=1)[0]
    conv = case.conv
    return torch.ops.dwconv_ext.depthwise_conv2d_backward(grad, x, w, conv.stride, conv.padding, conv.dilation, list(mask))


def test_a_small_problem_takes_few_launches(emulated):
    for case, most in (
        (Case("", 1, 512, (14, 14)), 2),
        (Case("", 1, 1024, (7, 7)), 2),
        (Case("", 1, 512, (14, 14), (3, 3), (2, 2)), 3),
    ):
        backward(case, torch.float16, "channels_last")
        launched = emulated.launches()[1:]
        assert len(launched) <= most, [launch["name"] for launch in launched]
        assert all(launch["threads"] % 32 == 0 and launch["blocks"] >= 100 for launch in launched), launched


SMALL = {"one_part": Case("", 1, 512, (7, 7)), "parts": Case("", 1, 64, (28, 28)), "5x5": Case("", 1, 96, (14, 14), (5, 5))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_all_gradients_of_a_small_problem_in_one_launch(case, dtype, emulated):
    """In any order of threads; and what a launch for each gives, as far as sums of other parts do."""
    kernel = SMALL[case].kernel[0]
    facts = {"pass": "backward", "filter": kernel, "dtype": str(dtype).removeprefix("torch.")}
    emulated.force_row(next(i for i, row in enumerate(TABLE) if facts.items() <= row.items()))
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        emulated.launches()
        results.append(backward(SMALL[case], dtype, "channels_last"))
        names = [launched["name"] for launched in emulated.launches()]
        assert names[1:] in (["depthwise_backward_rows_nhwc"], ["depthwise_backward_rows_nhwc", "sum_parts_behind"]), names
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], backward(SMALL[case], dtype, "channels_last", (True, False, False))[0])
    emulated.force_row(-1)
    apart = backward(SMALL[case], dtype, "channels_last", (False, True, True))
    for ours, want in zip(results[0][1:], apart[1:], strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_adds_the_parts_of_weights_and_biases(layout, emulated):
    case = Case("", 4, 16, (40, 40))
    both = backward(case, torch.float32, layout, (False, True, True))
    launched = [launched["pass"] for launched in emulated.launches()]
    assert launched == ["forward", "backward_weight", "sum_parts"]
    for mask, which in (((False, True, False), 1), ((False, False, True), 2)):
        assert torch.equal(backward(case, torch.float32, layout, mask)[which], both[which])
    x, _, _ = case.tensors(torch.float32, layout)
    grad = case.tensors(torch.float32, layout, seed=1)[0]
    torch.testing.assert_close(both[2].double(), grad.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    want = torch.nn.grad.conv2d_weight(x.double(), (16, 1, 3, 3), grad.double(), 1, 1, groups=16)
    torch.testing.assert_close(both[1].double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fusion", ["always", "never"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_separable_bits_do_not_depend_on_the_order_of_threads(layout, dtype, fusion, emulated):
    emulated.set_gpu({"sm_count": 2})
    emulated.force_fusion(fusion)
    tensors, conv = operands((1, 136, 200, (9, 10), (3, 3), Case("", 1, 1, (1, 1)).conv), dtype, layout)
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        results.append(dwconv_ext.separable_conv2d(*tensors, *conv.args()))
    assert not results[0].isnan().any() and all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_bits_do_not_depend_on_the_order_of_threads(layout, channels, emulated):
    emulated.set_gpu({"sm_count": 2})
    ops = torch.ops.dwconv_ext
    x = torch.randn(3, channels, 12, 16).half().contiguous(memory_format=LAYOUTS[layout])
    w, b = torch.randn(2, channels)
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        y, mean, variance = ops.batch_norm_act(x, w, b, 1e-5, "silu")
        results.append((y, mean, variance, *ops.batch_norm_act_backward(y, x, w, b, mean, variance, 1e-5, "silu")))
    assert not any(t.isnan().any() for t in results[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", ["3x3", "5x5_stride2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_norm_bits_do_not_depend_on_the_order_of_threads(layout, case, emulated):
    emulated.set_gpu({"sm_count": 2})
    emulated.force_fusion("always")
    x, w, _ = RACES[case].tensors(torch.float16, layout)
    conv = RACES[case].conv.args()
    middle = dwconv_ext.depthwise_conv2d(x, w, None, *conv)
    statistics = middle.float().mean((0, 2, 3)), middle.float().var((0, 2, 3), correction=0)
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        how = (None, None, *statistics, *conv, 1e-5, "silu", 0.0, (True, True))
        emulated.launches()
        backward = torch.ops.dwconv_ext.depthwise_norm_act_backward(middle, middle, x, w, *how)
        assert any(launch["op"] == "depthwise_norm_act" for launch in emulated.launches())
        forward = torch.ops.dwconv_ext.depthwise_norm_act(x, w, None, None, *conv, 1e-5, "silu", 0.0)
        pooled = torch.ops.dwconv_ext.depthwise_conv2d_pooled(x, w, None, *conv, "silu", 0.0)
        with_statistics = [launch for launch in emulated.launches() if launch["op"] == "depthwise_norm_act"]
        assert len(with_statistics) == 2
        results.append((*backward, *forward, *pooled))
    assert not any(t.isnan().any() for t in results[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fusion", ["always", "never"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverted_bits_do_not_depend_on_the_order_of_threads(layout, dtype, fusion, emulated):
    emulated.set_gpu({"sm_count": 2})
    emulated.force_fusion(fusion)
    on = Implementation(EMULATOR, cuda=True, emulator=emulated)
    arguments, _ = inverted_operands((1, 24, 136, 40, 9, 10, 3, 1), dtype, LAYOUTS[layout], "silu", True, on)
    gate = torch.rand(1, 24, 1, 1).to(dtype)
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        gated = torch.ops.dwconv_ext.pointwise_conv2d(arguments[0], arguments[1], 136, 2, 0, 0.0, None, gate, True)
        results.append((torch.ops.dwconv_ext.inverted_residual(*arguments, True), gated))
    assert not any(t.isnan().any() for t in results[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


ORDERS = ("forwards", "backwards", "shuffled")


def test_the_planted_kernel_is_right_without_a_bug():
    assert E.run_planted("none", "forwards") == E.run_planted("none", "backwards") == E.run_planted("none", "shuffled")


@pytest.mark.parametrize("bug", ["missing_barrier", "missing_barrier_before_reuse", "missing_copy_wait"])
def test_planted_races_change_the_bits(bug):
    want = E.run_planted("none", "forwards")
    assert any(E.run_planted(bug, order) != want for order in ORDERS)


def test_a_planted_product_that_nobody_waits_for_is_missing():
    assert set(E.run_planted("product", "forwards")) == {16.0}
    assert set(E.run_planted("missing_product_wait", "forwards")) == {0.0}
    assert set(E.run_planted("operands_overwritten", "backwards")) != {16.0}


@pytest.mark.parametrize("order", ORDERS)
def test_a_planted_launch_that_does_not_wait_for_the_one_before_is_an_error(order):
    with pytest.raises(RuntimeError, match="reads memory before it has waited for the launch before"):
        E.run_planted("missing_wait_for_previous", order)


@pytest.mark.parametrize("bug", ["divergent_barrier", "divergent_warp"])
@pytest.mark.parametrize("order", ORDERS)
def test_planted_divergence_is_an_error(bug, order):
    with pytest.raises(RuntimeError, match=r"only (64 of the block's 128 threads|16 of its lanes) reach"):
        E.run_planted(bug, order)


def test_an_unwritten_output_stays_poisoned():
    assert sum(value != value for value in E.run_planted("uninitialised", "forwards")) == 1


ASAN = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
import torch
import cuda_emulator as emulator
E = emulator.load(Path({module!r}))
if {bug!r}:
    E.run_planted({bug!r}, "forwards")
else:
    from cases import CASES, LAYOUTS
    from problems import BLOCKS, operands
    ops = torch.ops.dwconv_emulator
    for i, layout in enumerate(LAYOUTS):
        for j, count in enumerate((1, 132)):
            E.set_gpu({{"sm_count": count}})
            for case in CASES[(i + j) % 2 :: 2]:  # each case with large tiles in one layout, with small ones in the other
                if case.kernel[0] * case.kernel[1] > 500 or case.name == "bf16_trap":
                    continue  # takes seconds, and reaches what others reach
                x, w, b = case.tensors(torch.float16, layout)
                y = ops.depthwise_conv2d(x, w, b, *case.conv.args())
                ops.depthwise_conv2d_backward(torch.ones_like(y), x, w, *case.conv.args(), [True] * 3)
            E.force_fusion(("always", "never")[j])
            for block in BLOCKS.values():
                tensors, conv = operands(block, torch.float16, layout)
                ops.separable_conv2d(*tensors, *conv.args(), "relu", "relu")
            for channels in (3, 40):
                for size in ((1, 1), (5, 7), (16, 24)):
                    x = torch.randn(3, channels, *size).half().contiguous(memory_format=LAYOUTS[layout])
                    y, mean, variance = ops.batch_norm_act(x, None, None, 1e-5, "relu")
                    ops.batch_norm_act_backward(y, x, None, None, mean, variance, 1e-5, "relu")
                    for kernel in (3, 5):
                        for stride in (1, 2):
                            w, conv = torch.randn(channels, 1, kernel, kernel).half(), ((stride,) * 2, (kernel // 2,) * 2, (1, 1))
                            y = ops.depthwise_norm_act(x, w, None, None, *conv, 1e-5, "relu", 0.0)[0]
                            ops.depthwise_conv2d_pooled(x, w, None, *conv, "silu", 0.0)
                            how = (None, None, mean, variance, *conv, 1e-5, "relu", 0.0, [True] * 2)
                            ops.depthwise_norm_act_backward(y, y, x, w, *how)
            for c, hidden, o, kernel, stride in ((24, 72, 40, 3, 1), (7, 33, 9, 3, 2), (16, 64, 24, 5, 2)):
                expand = ops.pointwise_conv2d_pack(torch.randn(hidden, c, 1, 1), None, "", "float16")
                block = torch.randn(hidden, 1, kernel, kernel), None, torch.randn(o, hidden, 1, 1), torch.randn(o)
                packed = ops.separable_conv2d_pack(*block, "", "float16")
                x = torch.randn(2, c, 13, 15).half().contiguous(memory_format=LAYOUTS[layout])
                numbers = [o, *[kernel] * 2, *[stride] * 2, *[kernel // 2] * 4, 1, 1, 3, 0]
                ops.inverted_residual(x, expand, hidden, 2, 0.0, packed, numbers, [0.0] * 2)
                ops.pointwise_conv2d(x, expand, hidden, stride, 0, 0.0, None, torch.rand(2, c, 1, 1).half())
print("done")
"""


@pytest.fixture(scope="module")
def sanitized():
    """A build of the emulator with AddressSanitizer, unoptimised: that costs less than the compiler saves."""
    # libstdc++ too: the sanitizer looks for the real __cxa_throw at its start, and Python has none by itself.
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("no AddressSanitizer")
    module = emulator.build(emulator.ROOT / "build/emulator_asan", "-fsanitize=address", "-O0")

    def run(bug):
        options = "detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0"
        code = ASAN.format(
            path=[str(emulator.ROOT / folder) for folder in ("tools", "tests/support")], module=str(module), bug=bug
        )
        environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    return run


@pytest.mark.xdist_group("sanitized")
@pytest.mark.parametrize("bug", ["shared_overrun", "global_overrun"])
def test_planted_stray_accesses_are_found(bug, sanitized):
    result = sanitized(bug)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, result.stderr[-2000:]


@pytest.mark.xdist_group("sanitized")
def test_no_stray_accesses(sanitized):
    result = sanitized("")
    assert result.stdout.strip() == "done", result.stderr[-4000:]


# ---- on a GPU only -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnACard:
    def test_streams_and_graphs(self):
        x, w = torch.randn(4, 32, 28, 28, device="cuda"), torch.randn(32, 1, 3, 3, device="cuda")
        want = dwconv_ext.depthwise_conv2d(x, w, padding=1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours = dwconv_ext.depthwise_conv2d(x, w, padding=1)
        stream.synchronize()
        assert torch.equal(ours, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dwconv_ext.depthwise_conv2d(x, w, padding=1)
        x.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, 2 * want)

    def test_launches_that_begin_early(self):
        """Queued one behind the other, or each alone on the GPU: the same bits."""

        def run(seed, wait):
            x, w, _ = (t.cuda() for t in Case("", 4, 64, (28, 28)).tensors(torch.float16, "channels_last", seed))
            pw = torch.ones(64, 64, 1, 1, device="cuda", dtype=x.dtype)
            conv = ((1, 1), (1, 1), (1, 1))
            gradients = torch.ops.dwconv_ext.depthwise_conv2d_backward(x, x, w, *conv, [False, True, True])
            wait()
            y = torch.ops.dwconv_ext.separable_conv2d(x, w, None, pw, None, *conv, "relu", "relu")
            wait()
            return [*gradients, y]

        dwconv_ext._C_cuda.force_fusion("never")
        try:
            apart = [run(seed, torch.cuda.synchronize) for seed in range(20)]
            for want, got in zip(apart, [run(seed, lambda: None) for seed in range(20)], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        finally:
            dwconv_ext._C_cuda.force_fusion("by_cost")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
    def test_second_device(self):
        x, w = torch.randn(2, 8, 9, 9, device="cuda:1"), torch.randn(8, 1, 3, 3, device="cuda:1")
        torch.testing.assert_close(dwconv_ext.depthwise_conv2d(x, w), torch.nn.functional.conv2d(x, w, groups=8))
