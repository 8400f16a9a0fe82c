"""squeeze_excitation against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerance import UNIT, accumulation_unit

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "leaky_relu": lambda x: F.leaky_relu(x, 0.2)}
SHAPES = {  # batch, channels, squeezed, height, width
    "one": (1, 1, 1, 1, 1),
    "part_of_a_vector": (2, 7, 3, 5, 3),
    "vectors_plus_1": (2, 65, 17, 4, 5),
    "block_minus_1": (1, 127, 8, 9, 7),
    "efficientnet": (1, 96, 4, 56, 56),
    "many_pixels": (1, 3, 2, 131, 113),
}
pytestmark = pytest.mark.isa


def arguments(shape, dtype, layout, bias=True):
    torch.manual_seed(0)
    n, c, s, h, w = shape
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    reduce, expand = torch.randn(s, c) / c**0.5, torch.randn(s, c)
    first, second = (torch.randn(s), torch.randn(c)) if bias else (None, None)
    return x, *(None if t is None else t.to(dtype) for t in (reduce, first, expand, second))


def reference(x, reduce, first, expand, second, act, gate):
    """The gate, and how far each stage's rounding may carry: sums of |terms| through layers whose slopes are at most 1.1."""
    x, reduce, first, expand, second = (None if t is None else t.double() for t in (x, reduce, first, expand, second))
    mean, size = x.mean((2, 3)), x.abs().mean((2, 3))
    hidden, scale = F.linear(mean, reduce, first), F.linear(size, reduce.abs(), None if first is None else first.abs())
    z, spread = F.linear(ACTIVATIONS[act](hidden), expand.t(), second), F.linear(scale, expand.abs().t())
    spread = spread if second is None else spread + second.abs()
    return GATES[gate](z)[:, :, None, None], spread[:, :, None, None]


def check(args, act="silu", gate="sigmoid"):
    x, reduce = args[:2]
    got = ops.squeeze_excitation(*args, act, gate, 0.2)
    want, spread = reference(*args, act, gate)
    assert got.shape == want.shape and got.dtype == x.dtype
    rows = sum(x.shape[2:]) + 8  # terms of the longest chain of additions: a row, then the rows
    terms = rows + reduce.shape[0] + reduce.shape[1]
    limit = 1.2 * terms * accumulation_unit(x.dtype) * spread + 8 * accumulation_unit(x.dtype) + UNIT[x.dtype] * want.abs()
    error = (got.double() - want).abs()
    assert (error <= limit).all(), (error / limit).max()
    return got


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "channels_last"))
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape, layout, isa):
    for dtype, gate in itertools.product(DTYPES, GATES):
        check(arguments(SHAPES[shape], dtype, layout), gate=gate)
    check(arguments(SHAPES[shape], torch.float32, layout, bias=False), "relu", "hardsigmoid")
    check(arguments(SHAPES[shape], torch.float32, layout), "leaky_relu")


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "channels_last"))
def test_views(layout, isa):
    args = arguments(SHAPES["vectors_plus_1"], torch.float32, layout)
    whole = torch.full((2, 80, 7, 9), float("nan")).contiguous(memory_format=layout)
    view = whole[:, 3:68, 1:5, 2:7]
    view.copy_(args[0])
    got = ops.squeeze_excitation(view, *args[1:], "silu", "sigmoid")
    torch.testing.assert_close(got, check(args), rtol=1e-6, atol=1e-6)
    transposed = args[1].t().contiguous().t()
    assert torch.equal(ops.squeeze_excitation(args[0], transposed, *args[2:], "silu", "sigmoid"), check(args))


def test_the_same_bits_for_any_number_of_threads(threads):
    for dtype, layout in itertools.product(DTYPES, (torch.contiguous_format, torch.channels_last)):
        args = arguments((3, 200, 12, 40, 40), dtype, layout)
        results = []
        for count in (1, 2, 7):
            threads(count)
            results.append(ops.squeeze_excitation(*args, "relu", "sigmoid"))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_reaches_every_gate_of_its_image():
    args = list(arguments((2, 9, 3, 4, 4), torch.float32, torch.contiguous_format))
    args[0][1, 4, 2, 2] = float("nan")
    for gate in GATES:
        got = ops.squeeze_excitation(*args, "relu", gate)
        assert got[0].isfinite().all() and got[1].isnan().all()


X, REDUCE, FIRST, EXPAND, SECOND = arguments((2, 6, 3, 4, 4), torch.float32, torch.contiguous_format)


@pytest.mark.parametrize(("wrong", "message"), [
    ({0: X[0]}, r"input must be 4-dimensional \(N, C, H, W\), but got shape \[6, 4, 4\]"),
    ({0: X.int()}, "input must be float32, float64, bfloat16 or float16"),
    ({0: X[:0]}, r"input must not be empty, but got shape \[0, 6, 4, 4\]"),
    ({1: REDUCE[:, :5]}, r"reduce_weight must have shape \[3, 6\]"),
    ({1: REDUCE.double()}, "reduce_weight's dtype and the others' should be the same, but got torch.float64 and torch.float32"),
    ({1: REDUCE[:, :, None, None]}, r"reduce_weight must have shape \(S, 6\), but got \[3, 6, 1, 1\]"),
    ({2: FIRST[:2]}, r"reduce_bias must have shape \[3\], but got \[2\]"),
    ({3: EXPAND.t()}, r"expand_weight must have shape \[3, 6\]"),
    ({4: SECOND[:2]}, r"expand_bias must have shape \[6\], but got \[2\]"),
    ({5: "tanh"}, "act must be one of identity, relu"),
    ({6: "relu"}, "gate must be sigmoid or hardsigmoid, but got 'relu'"),
])  # fmt: skip
def test_errors(wrong, message):
    args = [X, REDUCE, FIRST, EXPAND, SECOND, "relu", "sigmoid"]
    for place, value in wrong.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=f"squeeze_excitation: {message}"):
        ops.squeeze_excitation(*args)


def test_opcheck():
    torch.library.opcheck(ops.squeeze_excitation.default, (X, REDUCE, FIRST, EXPAND, SECOND, "relu", "sigmoid"))
