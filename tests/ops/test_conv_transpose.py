"""depthwise_conv_transpose2d and 1d on the CPU and on CUDA against float64, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from implementations import ONE_SM
from problems import VIEWS
from properties import given, settings, st
from reference import ACTIVATIONS, SLOPE
from tolerance import UNIT
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transposed import CASES, Transposed, check_transposed

import dwconv_ext
from dwconv_ext import depthwise_conv_transpose1d, depthwise_conv_transpose2d

ops = torch.ops.dwconv_ext


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, layout, dtype):
    check_transposed(case, *case.tensors(dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_implementation(layout, kernels):
    for gpu in kernels.gpus(ONE_SM):
        for case in CASES:
            for dtype in (torch.float32, torch.float16) if gpu else DTYPES:
                check_transposed(case, *kernels.on_device(case.tensors(dtype, layout)), peer=False)


BY_KERNEL = [
    Transposed("phases", 2, 20, (5, 17), (4, 4)),
    Transposed("one_by_one", 1, 3, (4, 40), (3, 5), (2, 3)),
    Transposed("stride_1", 2, 9, (16, 30), stride=(1, 1)),
    Transposed("two_filters", 1, 5, (6, 7), multiplier=2),
    Transposed("no_taps", 1, 9, (3, 4), (1, 2), (3, 3), (0, 0), (2, 2)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(activation, layout, kernels):
    """Applied to the sums and the bias, and rounded once."""
    for case in BY_KERNEL:
        for dtype in (torch.float32, torch.bfloat16):
            x, w, b = kernels.on_device(case.tensors(dtype, layout))
            ours = depthwise_conv_transpose2d(x, w, b, *case.conv, activation)
            z = case.torch(x.double(), w.double(), b.double())
            want = ACTIVATIONS[activation](z)
            least = 1e-4 if kernels.device == "cuda" else 1e-5
            limit = (2 * UNIT[dtype] + least) * want.abs() + 2 * least
            if kernels.cuda and activation in ("silu", "gelu", "gelu_tanh"):
                limit += SLOPE[activation] * UNIT[dtype] * z.abs()
            assert ((ours.double() - want).abs() <= limit).all(), case


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_beyond_the_reach_there_is_the_bias_alone(bias, layout, kernels):
    x, w, b = kernels.on_device(Transposed("", 2, 18, (4, 5), (1, 1), (3, 3), (0, 0)).tensors(torch.float32, layout))
    y = depthwise_conv_transpose2d(x, w, b if bias else None, 3, 0, 2, act="relu")
    alone = b.relu() if bias else torch.zeros_like(b)
    for rest in (y[:, :, 10:], y[..., 13:], y[:, :, 1::3]):
        assert torch.equal(rest, alone.reshape(1, -1, 1, 1).expand_as(rest))


@pytest.mark.parametrize("act", ["identity", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_beyond_the_output(layout, bias, act, kernels):
    for size, kernel, stride, padding, more in (
        ((2, 3), (3, 3), (100, 100), (51, 101), (0, 50)),  # no input pixel reaches a row
        ((2, 2), (3, 2), (100, 90), (50, 45), (3, 2)),
        ((1, 4), (3, 3), (2**40, 2), (1, 1), (0, 0)),
    ):
        x, w = torch.randn(2, 5, *size).contiguous(memory_format=LAYOUTS[layout]), torch.randn(5, 1, *kernel)
        x, w, b = kernels.on_device((x, w, torch.randn(5) if bias else None))
        y = depthwise_conv_transpose2d(x, w, b, stride, padding, more, act=act)
        plain = (stride[0] if size[0] > 1 else 1, stride[1])
        want = ACTIVATIONS[act](F.conv_transpose2d(x, w, b, plain, padding, more, 5))
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_same_bits_for_any_number_of_threads(case, layout, threads):
    def run():
        leaves = [t.requires_grad_() for t in case.tensors(torch.float32, layout)]
        y = depthwise_conv_transpose2d(*leaves, *case.conv)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    threads(1)
    one = run()
    for count in (2, 7):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True)), count


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(view, layout):
    base = torch.randn(3, 20, 8, 9).contiguous(memory_format=LAYOUTS[layout])
    ours_x, theirs_x = (base.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    w = torch.randn(VIEWS[view](base).shape[1], 1, 4, 4)
    y = depthwise_conv_transpose2d(VIEWS[view](ours_x), w, None, 2, 1)
    want = F.conv_transpose2d(VIEWS[view](theirs_x), w, None, 2, 1, groups=len(w))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_go_where_torch_sends_them(value, layout, kernels):
    x = torch.randn(2, 20, 6, 7)
    for at in ((0, 0, 0, 0), (1, 3, 4, 4), (0, 19, 5, 6)):
        x[at] = value
    x, w = kernels.on_device((x.contiguous(memory_format=LAYOUTS[layout]), torch.randn(20, 1, 4, 4)))
    ours, theirs = depthwise_conv_transpose2d(x, w, None, 2, 1), F.conv_transpose2d(x.double(), w.double(), None, 2, 1, groups=20)
    torch.testing.assert_close(ours.double(), theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_unbatched_and_strange_weights():
    x, w, b = torch.randn(6, 5, 7), torch.randn(4, 3, 2, 6).permute(3, 2, 1, 0)[:, :2], torch.randn(12)
    torch.testing.assert_close(depthwise_conv_transpose2d(x, w, b, 2), F.conv_transpose2d(x, w, b, 2, groups=6))


# torch's OpInfo samples of conv_transpose1d and 2d, with groups == C: input, filters of a channel, kernel, arguments.
SAMPLES = [
    ((1, 3, 4), 1, (3,), {"stride": (2,), "padding": 2, "output_padding": (1,)}),
    ((2, 2, 4), 2, (4,), {"stride": (3,), "padding": (1,), "output_padding": (2,), "dilation": (4,)}),
    ((1, 1, 4), 1, (4,), {"stride": 2, "padding": 1, "output_padding": 1, "dilation": (2,)}),
    ((1, 1, 4), 2, (3,), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((1, 4, 5), 8, (3,), {}),
    ((1, 3, 4, 4), 1, (3, 3), {"stride": (2, 2), "padding": 2, "output_padding": (1, 1)}),
    ((2, 2, 4, 4), 2, (4, 5), {"stride": (3, 2), "padding": (1, 2), "output_padding": (2, 3), "dilation": (4, 4)}),
    ((1, 1, 4, 5), 1, (4, 3), {"stride": 2, "padding": 1, "output_padding": 1, "dilation": (2, 3)}),
    ((1, 1, 4, 3), 2, (3, 4), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 4, 4, 4), 1, (3, 3), {}),
    ((1, 2, 5, 5), 4, (3, 3), {}),
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shape, multiplier, kernel, how", SAMPLES)
def test_opinfo_samples(shape, multiplier, kernel, how, batched):
    x, channels = torch.randn(shape if batched else shape[1:]), shape[1]
    w, b = torch.randn(channels, multiplier, *kernel), torch.randn(channels * multiplier)
    two = len(kernel) == 2
    ours, theirs = (depthwise_conv_transpose2d, F.conv_transpose2d) if two else (depthwise_conv_transpose1d, F.conv_transpose1d)
    for bias in (b, None):
        torch.testing.assert_close(ours(x, w, bias, **how), theirs(x, w, bias, groups=channels, **how), rtol=1e-4, atol=1e-5)


@st.composite
def random_cases(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, dilation, size = pair(1, 7), pair(1, 4), pair(1, 3), pair(1, 12)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    whole = [(n - 1) * s + d * (k - 1) + 1 + m for n, s, d, k, m in zip(size, stride, dilation, kernel, more, strict=True)]
    padding = tuple(draw(st.integers(0, min(8, (n - 1) // 2))) for n in whole)
    sizes = draw(st.integers(0, 3)), draw(st.integers(1, 36)), size
    return Transposed("", *sizes, kernel, stride, padding, more, dilation, draw(st.sampled_from([1, 1, 1, 2])))


@given(random_cases(), st.sampled_from(DTYPES), st.sampled_from(list(LAYOUTS)), st.integers(0, 2**31))
@settings(max_examples=60)
def test_random_problems(case, dtype, layout, seed):
    check_transposed(case, *case.tensors(dtype, layout, seed), peer=False)


# ---- derivatives, and what else torch asks of an op -----------------------------------------------------------------------


def small(multiplier=1, layout="nchw"):
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    w, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, multiplier, 3, 2), (2 * multiplier,)))
    return x, w, b


CONVOLUTIONS = {"stride2": (2, 1, (1, 0), 1), "dilated": (1, (2, 0), 1, 2), "more_than_stride": ((2, 1), 0, (2, 1), (3, 2))}


@pytest.mark.parametrize(
    "name, multiplier, layout", [*((name, 1, "nchw") for name in CONVOLUTIONS), ("stride2", 2, "channels_last")]
)
def test_gradcheck(name, multiplier, layout):
    args = small(multiplier, layout)

    def layer(*t):
        return depthwise_conv_transpose2d(*t, *CONVOLUTIONS[name])

    assert gradcheck(layer, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, args, check_fwd_over_rev=True)


class Ran(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", ["x", "w", "b"])
def test_only_the_gradients_asked_for(kept):
    named = {name: t.detach().requires_grad_(name == kept) for name, t in zip("xwb", small(), strict=True)}
    y = depthwise_conv_transpose2d(*named.values(), 2)
    want = torch.autograd.grad(F.conv_transpose2d(*named.values(), 2, groups=2).sum(), named[kept])[0]
    with Ran() as ran:
        torch.testing.assert_close(torch.autograd.grad(y, named[kept], torch.ones_like(y))[0], want)
    ours = {"x": ["dwconv_ext.depthwise_conv2d.default"], "w": ["dwconv_ext.depthwise_conv2d_backward.default"], "b": []}
    assert [name for name in ran.names if name.startswith("dwconv_ext")] == ours[kept]


def test_an_activation_is_differentiated_as_torchs():
    for activation, function in ACTIVATIONS.items():
        results = []
        for layer in (
            lambda *t, act=activation: depthwise_conv_transpose2d(*t, 2, 1, 1, 1, act),
            lambda *t, f=function: f(F.conv_transpose2d(*t, 2, 1, 1, 2, 1)),
        ):
            torch.manual_seed(0)
            leaves = small()
            y = layer(*leaves)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            results.append([y, *first, *torch.autograd.grad(first[1].sum(), leaves[0])])
            x, w, b = (t.detach() for t in leaves)
            results[-1].append(torch.func.jvp(lambda x, f=layer, w=w, b=b: f(x, w, b), (x,), (x,))[1])
            results[-1].append(torch.func.jvp(lambda b, f=layer, w=w, x=x: f(x, w, b), (b,), (b,))[1])
        torch.testing.assert_close(*results)


def test_vmap_of_inputs_and_of_weights():
    x, w, b = (t.detach() for t in small(2))

    def pair(*t, dims):
        ours = torch.func.vmap(lambda *t: depthwise_conv_transpose2d(*t, 2, 1), dims)(*t)
        theirs = torch.func.vmap(lambda *t: F.conv_transpose2d(*t, 2, 1, groups=2), dims)(*t)
        torch.testing.assert_close(ours, theirs)

    pair(x[:, None], w, b, dims=(0, None, None))
    pair(x, torch.stack([w, 2 * w]), torch.stack([b, -b]), dims=(None, 0, 0))
    pair(torch.stack([x, -x], 1), torch.stack([w, 2 * w], 2), b, dims=(1, 2, None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", [(), ("silu",)])
def test_opcheck(layout, more):
    x, w, b = (t.detach().float().requires_grad_() for t in small(layout=layout))
    torch.library.opcheck(ops.depthwise_conv_transpose2d.default, (x, w, b, (2, 1), (1, 0), (1, 0), (1, 1), *more))


def test_autocast_does_what_it_does_for_conv_transpose2d():
    x, w, b = (t.detach().float().requires_grad_() for t in small())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = depthwise_conv_transpose2d(x, w, b, 2), F.conv_transpose2d(x, w, b, 2, groups=2)
        assert depthwise_conv_transpose2d(x.double(), w.double(), b.double()).dtype == torch.float64
    assert ours.dtype == theirs.dtype == torch.bfloat16
    for a, c in zip(*(torch.autograd.grad(y.float().sum(), (x, w, b)) for y in (ours, theirs)), strict=True):
        assert a.dtype == c.dtype == torch.float32
        torch.testing.assert_close(a, c, rtol=0.02, atol=0.2)


@pytest.mark.xdist_group("inductor")
def test_compiled_with_dynamic_shapes(fresh_dynamo):
    layer = torch.compile(
        lambda *t: depthwise_conv_transpose2d(*t, 2, 1, 1).relu(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in ((3, 4), (5, 7)):
        _, w, b = small()
        x = torch.randn(2, 2, *size, dtype=torch.float64)
        want = depthwise_conv_transpose2d(x, w, b, 2, 1, 1).relu()
        got = layer(x, w, b)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), w), torch.autograd.grad(want.sum(), w))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_those_of_torchs(layout):
    from torch.utils.flop_counter import FlopCounterMode

    x, w, _ = Transposed("", 2, 6, (5, 7)).tensors(torch.float32, layout)
    counts = []
    for layer in (depthwise_conv_transpose2d, lambda *t: F.conv_transpose2d(*t, groups=6)):
        with FlopCounterMode(display=False) as counter:
            layer(x, w, None, 2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_torchs_own_where_it_was_faster():
    x, w, b = Transposed("", 2, 6, (5, 7)).tensors(torch.float32, "channels_last")
    half = dwconv_ext._C
    try:
        half.fake_times([("torch", 0.1), ("nothing", 1.0)])
        half.set_benchmark(True)
        y = depthwise_conv_transpose2d(x, w, b, 2, 1, 1, 1, "relu")
        assert [c["way"] for c in half.benchmark_choices()] == ["torch"]
    finally:
        half.set_benchmark(False)
        half.fake_times()
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, b, 2, 1, 1, 6).relu(), rtol=1e-5, atol=1e-5)


# ---- one dimension --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("how", [(2, 1), (1, 0), (3, 2, 1), (1, 1, 2, 3), ((2,), [1], (1,), 1)], ids=str)
def test_one_dimension(how, channels_last):
    x, w, b = torch.randn(2, 12, 30), torch.randn(12, 1, 4), torch.randn(12)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [[t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)] for _ in range(2)]
    ours = depthwise_conv_transpose1d(*leaves[0], *how)
    plain = [*how, *(0, 0, 1)[len(how) - 1 :]]
    theirs = F.conv_transpose1d(*leaves[1], *plain[:3], 12, plain[3])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.stride(1 if channels_last else 2) == 1
    along = torch.randn_like(theirs)
    grads = [torch.autograd.grad(y, leaf, along) for y, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(depthwise_conv_transpose1d(x[0], w, b, *how), theirs[0].detach(), rtol=1e-5, atol=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------------

X, W, B = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
BAD = {
    "input_list": (TypeError, r"input must be a Tensor", lambda f: f([1.0], W)),
    "bias_number": (TypeError, r"bias must be a Tensor", lambda f: f(X, W, 1.0)),
    "stride_text": (TypeError, r"stride must be an int or a pair of ints, but got 'two'", lambda f: f(X, W, B, "two")),
    "padding_same": (TypeError, r"padding must be an int or a pair of ints, but got 'same'", lambda f: f(X, W, B, 1, "same")),
    "three": (TypeError, r"output_padding must be an int or a pair", lambda f: f(X, W, B, 1, 0, (0, 0, 0))),
    "dilation_float": (TypeError, r"dilation must be an int or a pair", lambda f: f(X, W, B, 1, 0, 0, 1.5)),
    "act": (RuntimeError, r"act must be one of identity, relu.*but got 'tanh'", lambda f: f(X, W, B, act="tanh")),
    "slope": (TypeError, r"slope must be a number", lambda f: f(X, W, B, slope="steep")),
    "rank": (RuntimeError, r"input must be 3-dimensional \(C, H, W\) or 4-dim", lambda f: f(X[0, 0], W)),
    "weight_rank": (RuntimeError, r"weight must be 4-dimensional \(C, multiplier, kH, kW\)", lambda f: f(X, W[0])),
    "channels": (RuntimeError, r"with C = 4, input's channels, but got \[3, 1, 3, 3\]", lambda f: f(X, W[:3])),
    "dtype": (
        RuntimeError,
        r"weight's dtype and the others' should be the same, but got torch.float64",
        lambda f: f(X, W.double()),
    ),
    "integers": (RuntimeError, r"input must be float32, float64, bfloat16 or float16", lambda f: f(X.int(), W.int())),
    "bias_size": (RuntimeError, r"bias must be 1-dimensional with 4 elements", lambda f: f(X, W, B[:3])),
    "empty": (RuntimeError, r"input must have a non-empty height and width", lambda f: f(X[:, :, :0], W)),
    "stride_zero": (RuntimeError, r"stride should be greater than zero, but got \(0, 0\)", lambda f: f(X, W, B, 0)),
    "padding_negative": (RuntimeError, r"padding must be non-negative", lambda f: f(X, W, B, 1, -1)),
    "output_padding": (
        RuntimeError,
        r"output_padding must be smaller than either stride or dilation along width, but got output_padding 2, stride 2 and dil",
        lambda f: f(X, W, B, 2, 0, (0, 2)),
    ),
    "too_small": (
        RuntimeError,
        r"the output is too small: .* must be positive along height, but is -1",
        lambda f: f(X, W, B, 1, 4),
    ),
    "too_large": (RuntimeError, r"too large to allocate", lambda f: f(X, W, B, 2**60)),
    "64_bits": (ValueError, r"stride must fit 64 bits", lambda f: f(X, W, B, 2**70)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match="depthwise_conv_transpose2d: .*" + message):
        call(depthwise_conv_transpose2d)


def test_bad_input_in_one_dimension():
    x, w = torch.randn(1, 4, 9), torch.randn(4, 1, 3)
    for error, message, call in (
        (RuntimeError, r"input must be 2-dimensional \(C, L\) or 3-dimensional", lambda f: f(x[None], w)),
        (RuntimeError, r"weight must be 3-dimensional \(C, multiplier, K\)", lambda f: f(x, w[0])),
        (TypeError, r"stride must be an int or a 1-tuple, but got \(1, 1\)", lambda f: f(x, w, None, (1, 1))),
        (TypeError, r"dilation must be an int or a 1-tuple", lambda f: f(x, w, None, 1, 0, 0, "one")),
        (RuntimeError, r"input must be float32, .* but got torch.int64", lambda f: f(x.long(), w)),
        (RuntimeError, r"weight's dtype and the others' should be the same", lambda f: f(x, w.double())),
        (RuntimeError, r"input must have at least one channel and a non-empty length", lambda f: f(x[..., :0], w)),
        (RuntimeError, r"weight must have shape \(C, multiplier, K\) with C = 4, .* but got \[3, 1, 3\]", lambda f: f(x, w[:3])),
        (RuntimeError, r"bias must be 1-dimensional with 4 elements", lambda f: f(x, w, torch.randn(3))),
        (RuntimeError, r"stride should be greater than zero, but got 0", lambda f: f(x, w, None, 0)),
        (RuntimeError, r"padding must be non-negative, but got -1", lambda f: f(x, w, None, 1, -1)),
        (
            RuntimeError,
            r"output_padding must be smaller than either stride or dilation, .* 2, stride 2",
            lambda f: f(x, w, None, 2, 0, 2),
        ),
        (RuntimeError, r"the output is too small: .* must be positive, but is -1", lambda f: f(x, w, None, 1, 6)),
        (RuntimeError, r"unknown|act must be one of", lambda f: f(x, w, act="tanh")),
    ):
        with pytest.raises(error, match="depthwise_conv_transpose1d: " + message):
            call(depthwise_conv_transpose1d)
