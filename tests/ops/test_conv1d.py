"""depthwise_conv1d: numerics, streams, derivatives and errors; depthwise_conv1d_step."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from implementations import EMULATOR, running
from reference import ACTIVATIONS, SLOPE
from tolerance import UNIT, assert_close
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dwconv_ext import depthwise_conv1d, depthwise_conv1d_step, plan
from dwconv_ext._extension import _C

LAYOUTS = ("contiguous", "channels_last")
CASES = {  # batch, channels, length; multiplier, taps; stride, padding, dilation
    "mamba": ((2, 40, 33), (1, 4), (1, 3, 1)),
    "conformer": ((1, 17, 50), (1, 31), (1, 15, 1)),
    "strided": ((2, 16, 61), (1, 15), (2, 7, 1)),
    "dilated": ((1, 20, 40), (1, 3), (1, 8, 8)),
    "dilated_strided": ((1, 9, 47), (1, 5), (3, 2, 2)),
    "multiplier": ((2, 6, 30), (3, 5), (1, 2, 1)),
    "one_sample": ((2, 18, 1), (1, 3), (1, 1, 1)),
    "filter_longer_than_input": ((1, 16, 5), (1, 9), (1, 6, 1)),
    "same_even": ((2, 16, 21), (1, 4), (1, "same", 1)),
    "two_ends": ((2, 8, 21), (1, 4), (2, (5, 1), 1)),
    "one_channel": ((2, 1, 300), (1, 8), (1, 0, 1)),
    "one_tap": ((2, 33, 19), (1, 1), (2, 0, 1)),
    "empty_batch": ((0, 4, 9), (1, 3), (1, 1, 1)),
    "long_filter": ((1, 2, 150), (1, 65), (1, 32, 1)),
    # Cut into segments in channels_last, and with a stride in both layouts (csrc/cpu/plan/long_row.h).
    "long": ((1, 24, 3001), (1, 4), (1, 3, 1)),
    "long_strided": ((2, 17, 2999), (1, 15), (2, 7, 1)),
    "long_dilated": ((1, 40, 2500), (1, 5), (1, 90, 45)),
    "long_without_padding": ((1, 16, 2100), (1, 3), (1, 0, 1)),
    "long_multiplier": ((1, 8, 3100), (2, 3), (2, 40, 1)),
    "far_padding": ((1, 16, 1200), (1, 2), (1, 700, 600)),
    "whole_segments": ((2, 3, 2048), (1, 1), (2, 0, 1)),
    "outputs_behind_the_row": ((1, 3, 4096), (1, 3), (8, 15, 1)),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous() if layout == "contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)


def operands(case: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous", bias: bool = True) -> tuple:
    shape, (multiplier, taps), conv = CASES[case]
    x = laid_out(torch.randn(shape).to(dtype), layout)
    w = torch.randn(shape[1] * multiplier, 1, taps).to(dtype)
    return x, w, torch.randn(len(w)).to(dtype) if bias else None, conv


def reference(x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding, dilation: int) -> Tensor:
    if isinstance(padding, tuple):
        x, padding = F.pad(x, padding), 0
    return F.conv1d(x, w, b, stride, padding, dilation, x.shape[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, dtype, layout):
    x, w, b, conv = operands(case, dtype, layout)
    given = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    y = depthwise_conv1d(*given, *conv)
    grad = laid_out(torch.randn(y.shape).to(dtype), layout)
    y.backward(grad)

    def run(tensors, grad):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        y = reference(*tensors, *conv)
        y.backward(grad)
        return [y.detach(), *(t.grad for t in tensors)]

    wide = [t.double() for t in (x, w, b)]
    exact, scale = run(wide, grad.double()), run([t.abs() for t in wide], grad.double().abs())
    taps, samples = w.shape[2], y.shape[0] * y.shape[2]
    terms = (taps, taps * len(w) // max(x.shape[1], 1), samples, samples)
    slow = taps > 32 and dtype is torch.float16  # torch takes minutes
    theirs = [None] * 4 if slow else run((x, w, b), grad)
    ours = [y.detach(), *(t.grad for t in given)]
    for name, got, want, s, n, their in zip("yxwb", ours, exact, scale, terms, theirs, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert_close(got, want, s, n, name=name, peer=their)
    if layout == "channels_last" and y.numel() > 0 and min(x.shape[1:]) > 1 and y.shape[2] > 1:
        assert y.stride(1) == 1 and given[0].grad.stride(1) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, layout):
    for dtype in DTYPES:
        x, w, b, conv = operands("mamba", dtype, layout)
        want = ACTIVATIONS[act](reference(x.double(), w.double(), b.double(), *conv))
        close = SLOPE.get(act, 1.0) * (2 * UNIT[dtype] + 1e-5)
        torch.testing.assert_close(depthwise_conv1d(x, w, b, *conv, act).double(), want, rtol=close, atol=2 * close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", ["mamba", "conformer", "strided", "dilated", "same_even", "two_ends", "multiplier", "long_strided"]
)
def test_every_implementation(case, layout, kernels):
    x, w, b, conv = operands(case, layout=layout)
    results = []
    for tensors, call in (((x, w, b), depthwise_conv1d), ((x.double(), w.double(), b.double()), reference)):
        given = [t.to(kernels.device).requires_grad_() for t in tensors]
        y = call(*given, *conv)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in given)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act", ["identity", "silu"])
def test_causal_is_a_pad_on_the_left(act):
    for layout, stride, dilation in itertools.product(LAYOUTS, (1, 2), (1, 3)):
        x, w, b, _ = operands("mamba", layout=layout)
        want = ACTIVATIONS[act](F.conv1d(F.pad(x, (3 * dilation, 0)), w, b, stride, 0, dilation, 40))
        for padding in (0, (0,), "valid"):
            y = depthwise_conv1d(x, w, b, stride, padding, dilation, act, causal=True)
            torch.testing.assert_close(y, want)
        torch.testing.assert_close(depthwise_conv1d(x[0], w, b, stride, 0, dilation, act, causal=True), want[0])


def test_a_long_row_is_work_for_several_threads():
    """One signal, whose channels lie side by side: as an image of one row it would be one tile."""
    conv = torch.nn.Conv1d(64, 64, 4, padding=3, groups=64)
    last = laid_out(torch.empty(1, 64, 4000, device="meta"), "channels_last")
    for found in plan(conv, last, threads=2):
        assert found.tiles > 1 and found.workers == 2, found


# The whole is long enough for kernels that short pieces are not given.
STREAMS = {  # batch, channels, length, taps, dilation
    "mamba": (1, 65, 200, 4, 1),
    "conformer": (2, 16, 150, 31, 1),
    "dilated": (1, 17, 120, 3, 9),
    "two_taps": (3, 33, 90, 2, 1),
    "few_channels": (1, 2, 700, 16, 1),
    "square_7": (1, 24, 100, 7, 1),
    "segments": (1, 24, 2200, 4, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_has_the_bits_of_the_whole(stream, dtype, layout, threads):
    n, c, length, taps, dilation = STREAMS[stream]
    x, w, b = laid_out(torch.randn(n, c, length).to(dtype), layout), torch.randn(c, 1, taps).to(dtype), torch.randn(c).to(dtype)
    zeros = torch.zeros(n, c, (taps - 1) * dilation, dtype=dtype)
    for isa, count in ((None, 2), *((isa, 1) for isa in _C.supported_isas())):
        before = _C.selected_isa()
        threads(count)
        try:
            _C.select_isa(isa or before)
            whole = depthwise_conv1d(x, w, b, 1, 0, dilation, "silu", causal=True)
            for cuts in ([1], [length - 1], [3, 4, 5, 21], [length // 2], [16, 32, 64], list(range(1, 20))):
                state, pieces = zeros, []
                for begin, end in itertools.pairwise([0, *cuts, length]):
                    y, state = depthwise_conv1d(x[..., begin:end], w, b, 1, 0, dilation, "silu", state=state)
                    pieces.append(y)
                assert torch.equal(torch.cat(pieces, 2), whole), (isa, cuts)
                assert torch.equal(state, F.pad(x, (zeros.shape[2], 0))[..., length:])
        finally:
            _C.select_isa(before)


def test_states():
    x, w, b, _ = operands("mamba")
    state = torch.randn(2, 40, 3)
    y, after = depthwise_conv1d(x, w, b, state=state)
    torch.testing.assert_close(y, F.conv1d(torch.cat((state, x), 2), w, b, groups=40))
    assert torch.equal(after, x[..., -3:]) and after.data_ptr() != x.data_ptr() and after.is_contiguous()
    one, after_one = depthwise_conv1d(x[0], w, b, state=state[0])
    assert torch.equal(one, y[0]) and torch.equal(after_one, after[0])
    _, short = depthwise_conv1d(x[..., :1], w, b, state=state)  # shorter than the state
    assert torch.equal(short, torch.cat((state[..., 1:], x[..., :1]), 2))
    _, none = depthwise_conv1d(x, w[..., :1], b, state=state[..., :0])
    assert none.shape == (2, 40, 0)
    strided, after = depthwise_conv1d(x[..., :10], w, b, 2, state=state)
    rest, _ = depthwise_conv1d(x[..., 10:], w, b, 2, state=after)
    torch.testing.assert_close(torch.cat((strided, rest), 2), F.conv1d(torch.cat((state, x), 2), w, b, 2, groups=40))


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_of_every_operand(given):
    x, w, b, state = torch.randn(2, 6, 9), torch.randn(6, 1, 4), torch.randn(6), torch.randn(2, 6, 3)
    ours = [t.clone().requires_grad_(wanted) for t, wanted in zip((x, w, b, state), given, strict=True)]
    theirs = [t.clone().requires_grad_(wanted) for t, wanted in zip((x, w, b, state), given, strict=True)]
    y, after = depthwise_conv1d(*ours[:3], act="silu", state=ours[3])
    joined = torch.cat((theirs[3], theirs[0]), 2)
    want, want_after = F.silu(F.conv1d(joined, *theirs[1:3], groups=6)), joined[..., 9:]
    torch.testing.assert_close(y, want)
    assert y.requires_grad == any(given) and after.requires_grad == (given[0] or given[3])
    if any(given):
        (y.square().sum() + after.sum()).backward()
        (want.square().sum() + want_after.sum()).backward()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, their.grad)


@pytest.mark.parametrize("how", [{"padding": (2, 1), "stride": 2}, {"causal": True, "dilation": 2}], ids=str)
def test_higher_derivatives(how):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 9), (6, 1, 3)))
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        return depthwise_conv1d(*tensors, act="silu", **how)

    torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)
    last = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.autograd.gradcheck(call, (last, w, b), fast_mode=True)


def test_transforms():
    x, w, b = torch.randn(5, 2, 4, 9), torch.randn(5, 4, 1, 3), torch.randn(5, 4)

    def call(x, w, b):
        return depthwise_conv1d(x, w, b, causal=True)

    want = torch.stack([call(*one) for one in zip(x, w, b, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(x, w, b), want)
    torch.testing.assert_close(torch.vmap(call, (0, None, None))(x, w[0], b[0]), torch.stack([call(t, w[0], b[0]) for t in x]))
    per_sample = torch.vmap(torch.func.grad(lambda x, w: call(x, w, None).square().sum(), 1), (0, None))(x, w[0])
    for one, got in zip(x, per_sample, strict=True):
        weight = w[0].clone().requires_grad_()
        call(one, weight, None).square().sum().backward()
        torch.testing.assert_close(got, weight.grad)


def test_autocast():
    x, w, b, _ = operands("mamba")
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv1d(x, w.bfloat16(), b, causal=True)
        z, state = depthwise_conv1d(x, w, b, state=torch.zeros(2, 40, 3))
    assert y.dtype == z.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, z) and torch.equal(y, depthwise_conv1d(*(t.bfloat16() for t in (x, w, b)), causal=True))


def test_views():
    whole, w = torch.randn(4, 12, 40), torch.randn(6, 1, 5)
    for x in (whole[:, ::2], whole[:, 3:9, 5:31], whole[:, :6, ::3], whole.transpose(0, 1)[:, :4][:6].transpose(0, 1),
              whole[:1, :6].expand(3, -1, -1), whole[:, :1].expand(-1, 6, -1), whole[:, :6, :1].expand(-1, -1, 9)):  # fmt: skip
        x = x[:, :6]
        torch.testing.assert_close(depthwise_conv1d(x, w, padding=2), F.conv1d(x, w, padding=2, groups=6))


def test_compiled_and_without_data():
    x, w, b, _ = operands("mamba")

    def call(x, state):
        return depthwise_conv1d(x, w, b, act="silu", state=state)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (33, 20):
        for got, want in zip(compiled(x[..., :length], x[..., :3]), call(x[..., :length], x[..., :3]), strict=True):
            torch.testing.assert_close(got, want)
    with FakeTensorMode():
        y = depthwise_conv1d(torch.empty(2, 8, 30), torch.empty(16, 1, 5), None, 2, (1, 3))
        assert y.shape == (2, 16, 15)
        state = torch.empty(2, 8, 4)
        assert depthwise_conv1d_step(torch.empty(2, 8), state, torch.empty(8, 1, 5)).shape == (2, 8)


def test_torchs_own_samples():
    """conv1d's OpInfo samples with groups == C."""
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    count = 0
    for sample in invocations.sample_inputs_conv1d(None, "cpu", torch.float32, False):
        x, (weight, bias), how = sample.input, sample.args, sample.kwargs
        if how.get("groups", 1) == x.shape[-2] and weight.shape[1] == 1:
            how = {name: value for name, value in how.items() if name != "groups"}
            torch.testing.assert_close(depthwise_conv1d(x, weight, bias, **how), F.conv1d(x, weight, bias, **sample.kwargs))
            count += 1
    assert count > 0


# --- one step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_have_the_bits_of_the_whole(dtype, isa, threads):
    before = _C.selected_isa()
    try:
        _C.select_isa(isa)
        for (n, c, taps, dilation, act), layout, count in itertools.product(
            ((2, 5, 4, 1, "silu"), (1, 300, 4, 1, "identity"), (2, 130, 2, 1, "gelu"), (1, 64, 3, 1, "relu"),
             (1, 20, 3, 2, "silu"), (2, 40, 9, 1, "identity"), (3, 33, 1, 1, "gelu_tanh"), (0, 4, 4, 1, "silu")),
            LAYOUTS, (1, 2),
        ):  # fmt: skip
            threads(count)
            x, w = torch.randn(n, c, 8).to(dtype), torch.randn(c, 1, taps).to(dtype)
            b = torch.randn(c).to(dtype) if count == 1 else None
            whole = depthwise_conv1d(x, w, b, 1, 0, dilation, act, causal=True)
            state = laid_out(torch.zeros(n, c, (taps - 1) * dilation, dtype=dtype), layout)
            samples = [sample.contiguous() if at % 2 else sample for at, sample in enumerate(x.unbind(2))]
            steps = [depthwise_conv1d_step(sample, state, w, b, act, dilation) for sample in samples]
            assert torch.equal(torch.stack(steps, 2), whole)
            assert torch.equal(state, F.pad(x, (state.shape[2], 0))[..., 8:])
    finally:
        _C.select_isa(before)


def by_definition(x, state, w, b, act, dilation):
    """The output and the next state."""
    joined = torch.cat((state, x[:, :, None]), 2)
    y = F.conv1d(joined.double(), w.double(), None if b is None else b.double(), 1, 0, dilation, groups=w.shape[0])
    return ACTIVATIONS[act](y[:, :, 0]), joined[:, :, 1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_by_definition(layout, dtype, kernels):
    for n, c, taps, dilation, act, bias in (
        (2, 5, 4, 1, "silu", True), (1, 300, 4, 1, "identity", False), (3, 130, 2, 1, "gelu", True), (1, 64, 3, 2, "relu", True),
        (2, 40, 9, 1, "hardswish", False), (3, 33, 1, 1, "leaky_relu", True), (2, 129, 64, 3, "identity", True),
    ):  # fmt: skip
        tensors = (
            torch.randn(n, c),
            laid_out(torch.randn(n, c, (taps - 1) * dilation), layout),
            torch.randn(c, 1, taps),
            torch.randn(c),
        )
        x, state, w, b = kernels.on_device([t.to(dtype) for t in tensors])
        want, after = by_definition(x, state, w, b if bias else None, act, dilation)
        y = depthwise_conv1d_step(x, state, w, b if bias else None, act, dilation)
        torch.testing.assert_close(
            y.double(), want, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype] * taps**0.5 + 1e-5 * (dtype != torch.float64)
        )
        assert torch.equal(state, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_have_the_bits_of_the_whole_on_a_gpu(dtype, kernels):
    for c, taps, dilation, act in ((5, 4, 1, "silu"), (70, 4, 1, "identity"), (33, 3, 2, "gelu"), (20, 9, 1, "relu")):
        x, w, b = kernels.on_device([t.to(dtype) for t in (torch.randn(2, c, 6), torch.randn(c, 1, taps), torch.randn(c))])
        whole = depthwise_conv1d(x, w, b, 1, 0, dilation, act, causal=True)
        state = x.new_zeros(2, c, (taps - 1) * dilation)
        steps = [depthwise_conv1d_step(sample, state, w, b, act, dilation) for sample in x.unbind(2)]
        assert torch.equal(torch.stack(steps, 2), whole)


def test_steps_of_views(kernels):
    w, b = kernels.on_device([torch.randn(24, 1, 4), torch.randn(24)])
    ring, x = kernels.on_device([torch.randn(2, 48, 9), torch.randn(2, 24, 3)])
    x, state = x[..., 1], ring[:, ::2, 2:5]
    others = ring.clone()
    want, after = by_definition(x, state, w, b, "silu", 1)
    torch.testing.assert_close(depthwise_conv1d_step(x, state, w, b, "silu").double(), want, rtol=1e-5, atol=1e-5)
    others[:, ::2, 2:5] = after
    assert torch.equal(ring, others)  # nothing else is written
    if not kernels.cuda:
        torch.library.opcheck(torch.ops.dwconv_ext.depthwise_conv1d_step.default, (x, state, w, b, 1, "silu"))


# --- bad input -----------------------------------------------------------------------------------------------------------

X, W, B = torch.randn(2, 4, 9), torch.randn(4, 1, 3), torch.randn(4)
STATE = torch.zeros(2, 4, 2)
WRONG = {
    "input_rank": ((X[None], W), {}, r"input must be 2-dimensional \(C, L\) or 3-dimensional \(N, C, L\), but got shape"),
    "input_dtype": ((X.int(), W.int()), {}, "input must be float32, float64, bfloat16 or float16, but got torch.int32"),
    "input_kind": ((X.tolist(), W), {}, "input must be a Tensor, but got list"),
    "channels": ((X[:, :3], W), {}, "input must have the 4 channels of weight, or a divisor of them, but got shape"),
    "no_channels": ((X[:, :0], W), {}, "input must have at least one channel"),
    "empty": ((X[..., :0], W), {"padding": 2}, "input must have a non-empty length"),
    "weight_rank": ((X, W[:, 0]), {}, r"weight must be 3-dimensional \(C \* multiplier, 1, k\), but got shape \[4, 3\]"),
    "weight_dense": ((X, W.expand(-1, 2, -1)), {}, r"weight must have shape \(C \* multiplier, 1, k\), but got \[4, 2, 3\]"),
    "weight_empty": ((X, W[..., :0]), {}, "weight must have a non-empty filter"),
    "weight_dtype": ((X, W.double()), {}, "weight's dtype .* should be the same, but got torch.float64 and torch.float32"),
    "weight_device": ((X, W.to("meta")), {}, "weight must be on the others' device, cpu, but got meta"),
    "bias_shape": ((X, W, B[:3]), {}, r"bias must be 1-dimensional with 4 elements, but got shape \[3\]"),
    "bias_dtype": ((X, W, B.half()), {}, "bias's dtype and the others' should be the same"),
    "stride": ((X, W), {"stride": 0}, "stride should be greater than zero, but got 0"),
    "stride_pair": ((X, W), {"stride": (1, 1)}, r"stride must be an int or a 1-tuple, but got \(1, 1\)"),
    "dilation": ((X, W), {"dilation": (-1,)}, "dilation should be greater than zero, but got -1"),
    "padding": ((X, W), {"padding": -1}, "padding must be non-negative, but got -1"),
    "padding_three": ((X, W), {"padding": (1, 1, 1)}, "padding must be 'same', 'valid', an int, a 1-tuple or two ints, but got"),
    "padding_word": ((X, W), {"padding": "full"}, "padding must be 'same', 'valid', .* but got 'full'"),
    "padding_huge": ((X, W), {"padding": 2**70}, "padding must fit 64 bits"),
    "padding_overflows": ((X, W), {"padding": 2**62}, f"Given padding={2**62}, expected padding to be at most"),
    "same_strided": ((X, W), {"padding": "same", "stride": 2}, r"padding='same' is not supported for strided .* stride \(2,\)"),
    "filter": ((X[..., :2], W), {}, r"weight's filter is larger than the padded input: dilation \* \(k - 1\) \+ 1 = 3, but"),
    "dilated_filter": ((X, W), {"dilation": 2**62}, "weight's filter is larger than the padded input"),
    "act": ((X, W), {"act": "swish"}, "act must be one of .* but got 'swish'"),
    "slope": ((X, W), {"slope": "1"}, "slope must be a number, but got '1'"),
    "causal": ((X, W), {"causal": 1}, "causal must be a bool, but got 1"),
    "causal_padding": ((X, W), {"causal": True, "padding": 2}, r"padding must be 0 where causal, .* but got 2"),
    "causal_same": ((X, W), {"causal": True, "padding": "same"}, r"padding must be 0 where causal, .* but got 'same'"),
    "state_padding": ((X, W), {"state": STATE, "padding": 1}, "padding must be 0 where causal"),
    "state_shape": ((X, W), {"state": STATE[..., :1]}, r"state must have shape \[2, 4, 2\], but got \[2, 4, 1\]"),
    "state_unbatched": ((X[0], W), {"state": STATE}, r"state must have shape \[4, 2\], but got \[2, 4, 2\]"),
    "state_dtype": ((X, W), {"state": STATE.double()}, "state's dtype and the others' should be the same"),
    "state_kind": ((X, W), {"state": 0}, "state must be a Tensor, but got int"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong):
    arguments, how, message = WRONG[wrong]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"depthwise_conv1d: {message}"):
        depthwise_conv1d(*arguments, **how)


STEP_WRONG = {
    "input_rank": ((X, STATE, W), {}, r"input must be 2-dimensional \(N, C\), but got shape"),
    "input_dtype": ((X[..., 0].int(), STATE, W), {}, "input must be float32, float64, bfloat16 or float16"),
    "no_channels": ((X[:, :0, 0], STATE[:, :0], W[:0]), {}, "input must have at least one channel"),
    "weight": ((X[..., 0], STATE, W[:3]), {}, r"weight must have shape \(4, 1, k\), but got \[3, 1, 3\]"),
    "weight_dtype": ((X[..., 0], STATE, W.half()), {}, "weight's dtype and the others' should be the same"),
    "dilation": ((X[..., 0], STATE, W), {"dilation": 0}, "dilation should be greater than zero, but got 0"),
    "dilation_huge": ((X[..., 0], STATE, W), {"dilation": 2**62}, "dilation must fit 64 bits with the filter"),
    "state": ((X[..., 0], STATE[..., :1], W), {}, r"state must have shape \[2, 4, 2\], but got \[2, 4, 1\]"),
    "state_dtype": ((X[..., 0], STATE.double(), W), {}, "state's dtype and the others' should be the same"),
    "state_expanded": ((X[..., 0], STATE[:1].expand(2, -1, -1), W), {}, "state must not be expanded: it is written"),
    "bias": ((X[..., 0], STATE, W, B[:1]), {}, "bias must be 1-dimensional with 4 elements"),
    "act": ((X[..., 0], STATE, W), {"act": "swish"}, "act must be one of .* but got 'swish'"),
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong, device",
    [
        pair for pair in itertools.product(STEP_WRONG, ("cpu", "meta", EMULATOR)) if pair != ("state_expanded", "meta")
    ],  # no copy is
)
def test_step_errors(wrong, device):
    arguments, how, message = STEP_WRONG[wrong]
    kept, emulated = arguments[1].clone(), device == EMULATOR
    refused = pytest.raises((RuntimeError, TypeError, ValueError), match=f"depthwise_conv1d_step: {message}")
    with running(EMULATOR) if emulated else nullcontext(), refused:
        depthwise_conv1d_step(*(t.to("cpu" if emulated else device) for t in arguments), **how)
    assert torch.equal(arguments[1], kept)


def test_step_has_no_derivative():
    with pytest.raises(RuntimeError, match=r"depthwise_conv1d_step: it has no derivative, .*torch.no_grad"):
        depthwise_conv1d_step(X[..., 0], STATE, W.clone().requires_grad_())
    with pytest.raises(TypeError, match="depthwise_conv1d_step: state must be a Tensor, but got NoneType"):
        depthwise_conv1d_step(X[..., 0], None, W)
