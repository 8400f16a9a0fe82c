"""inverted_residual, with packed weights: the two ops that it stands for, and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from properties import given, st

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
SHAPES = {  # batch, input channels, hidden channels, output channels, height, width, filter, stride
    "mobilenet_first": (2, 16, 96, 24, 56, 56, 3, 2),
    "mobilenet_second": (1, 24, 144, 24, 56, 57, 3, 1),
    "five": (1, 8, 40, 12, 33, 30, 5, 2),
    "seven_by_one_row": (1, 3, 33, 7, 1, 40, 7, 1),
    "narrow": (3, 20, 70, 40, 50, 2, 3, 1),
    "one_pixel": (1, 5, 7, 3, 1, 1, 3, 1),
    "two_blocks_of_depth": (1, 300, 64, 36, 9, 7, 3, 1),
    "pixels_in_one_cache_set": (1, 16, 1024, 16, 6, 9, 3, 2),
    "small_images": (5, 12, 50, 20, 4, 5, 3, 1),
}
ACTIVATIONS = {"relu6": F.relu6, "silu": F.silu, "identity": lambda x: x}
pytestmark = pytest.mark.isa


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def operands(shape, dtype, layout, act="relu6", added=False):
    n, c, hidden, o, h, w, k, s = shape
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weights = [torch.randn(hidden, c, 1, 1) / c**0.5, torch.randn(hidden), torch.randn(hidden, 1, k, k) / k, torch.randn(hidden)]
    weights = [t.to(wide) for t in (*weights, torch.randn(o, hidden, 1, 1) / hidden**0.5, torch.randn(o))]
    isa, number = _C.selected_isa(), _C.activations[act]
    expand = ops.pointwise_conv2d_pack(*weights[:2], isa, name_of(dtype))
    packed = ops.separable_conv2d_pack(*weights[2:], isa, name_of(dtype))
    block = [o, k, k, s, s, k // 2, k // 2, 1, 1, number, 0]
    out_h, out_w = ((side + 2 * (k // 2) - k) // s + 1 for side in (h, w))
    residual = torch.randn(n, o, out_h, out_w).to(dtype).contiguous(memory_format=layout) if added else None
    return (x, expand, hidden, number, 0.0, packed, block, [0.0, 0.0], residual), weights


def two_ops(x, expand, hidden, number, slope, packed, block, slopes, residual):
    return ops.separable_conv2d_packed(ops.pointwise_conv2d(x, expand, hidden, 1, number, slope), packed, block, slopes, residual)


def reference(arguments, weights, act):
    x, block, residual = arguments[0], arguments[6], arguments[8]
    f = ACTIVATIONS[act]
    ew, eb, dw, db, pw, pb = (t.double() for t in weights)
    middle = f(F.conv2d(f(F.conv2d(x.double(), ew, eb)), dw, db, block[3], block[5], 1, len(dw)))
    y = F.conv2d(middle, pw, pb)
    return y if residual is None else y + residual.double()


@pytest.fixture(autouse=True)
def unforced():
    yield
    _C.force_row("")


def force_one_kernel(layout):
    """Where it can be, and not only where it pays."""
    _C.force_row("separable_forward_nhwc" if layout == torch.channels_last else "separable_forward_nchw_transposed")


def multiplies_bfloat16():
    return any(text in plan(dtype="bfloat16")["reason"] for text in ("bfloat16 pairs", "AMX tiles"))


def check(shape, dtype, layout, act="relu6", added=False):
    arguments, weights = operands(shape, dtype, layout, act, added)
    force_one_kernel(layout)
    got, two, want = ops.inverted_residual(*arguments), two_ops(*arguments), reference(arguments, weights, act)
    if dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and multiplies_bfloat16()):
        assert torch.equal(got, two)
    error, theirs = ((y.double() - want).abs() for y in (got, two))
    # Elsewhere the expanded image is not rounded to 16 bits in between.
    limit = 2 * theirs.max() + 4 * torch.finfo(dtype).eps * want.abs().max()
    assert got.dtype == dtype and got.stride() == two.stride() and error.max() <= limit, (error.max(), limit)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_implementation(shape, layout, isa):
    for dtype in DTYPES:
        check(SHAPES[shape], dtype, LAYOUTS[layout])
    check(SHAPES[shape], torch.float32, LAYOUTS[layout], "silu", added=True)


@given(st.data())
def test_random(data):
    channels, side = st.integers(1, 40), st.integers(1, 40)
    n, k, s = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2, 3, 5))), data.draw(st.integers(1, 3))
    shape = (n, *(data.draw(channels) for _ in range(3)), data.draw(side), data.draw(side), k, s)
    layout, dtype = (data.draw(st.sampled_from(list(values))) for values in (LAYOUTS.values(), DTYPES))
    check(shape, dtype, layout, added=data.draw(st.booleans()))


def plan(**changes):
    given = {"dtype": "float32", "layout": "channels_last", "batch": 8, "channels": 16, "in_size": (112, 112), "kernel": (3, 3)}
    given |= {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "out_channels": 24, "multiplier": 6}
    return _C.plan("inverted_residual", "forward", **(given | changes))


def test_what_is_one_kernel():
    fused = plan()
    assert "expanded in scratch" in fused["reason"] and fused["scratch_bytes"] <= 0.9 * _C.cache_bytes()[1]
    assert fused["bytes"] == 4 * (8 * 112**2 * (16 + 24) + 96 * (16 + 24))
    assert fused["flops"] == 2 * 8 * 112**2 * 96 * (16 + 9 + 24)
    assert plan(batch=1, in_size=(14, 14)) is None  # the caches hold the expanded image
    assert plan(kernel=(3, 3), in_size=(112, 20000)) is None  # not a row of it fits L2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout):
    arguments, _ = operands(SHAPES["five"], torch.float32, LAYOUTS[layout])
    x = arguments[0]
    force_one_kernel(LAYOUTS[layout])
    whole = torch.full((3, 12, 35, 34), float("nan")).contiguous(memory_format=LAYOUTS[layout])
    view = whole[1:2, 2:10, 1:34, 3:33]
    view.copy_(x)
    assert torch.equal(ops.inverted_residual(view, *arguments[1:]), ops.inverted_residual(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout, threads):
    arguments, _ = operands((3, 16, 96, 24, 57, 60, 3, 2), torch.float32, LAYOUTS[layout])
    force_one_kernel(LAYOUTS[layout])
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(ops.inverted_residual(*arguments))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_kernel_that_has_no_expansion_is_not_forced():
    arguments, _ = operands(SHAPES["five"], torch.float32, torch.contiguous_format)
    want = ops.inverted_residual(*arguments)
    _C.force_row("separable_forward_nchw_direct")
    torch.testing.assert_close(ops.inverted_residual(*arguments), want)


def test_opcheck():
    arguments, _ = operands(SHAPES["small_images"], torch.float32, torch.channels_last, added=True)
    torch.library.opcheck(ops.inverted_residual.default, arguments)


def test_no_images():
    arguments, _ = operands(SHAPES["small_images"], torch.float32, torch.channels_last)
    assert ops.inverted_residual(arguments[0][:0], *arguments[1:]).shape == (0, 20, 4, 5)
