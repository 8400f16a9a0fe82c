"""inverted_residual, with packed weights: the two ops that it stands for, and float64."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS
from implementations import AMPERE, CUDA, EMULATOR, ONE_SM, TURING
from inverted import check_cuda, operands, reference, two_ops
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
pytestmark = pytest.mark.isa


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernels", CUDA, indirect=True)
def test_every_cuda_implementation(shape, layout, kernels):
    for _ in kernels.fusions():
        for dtype in DTYPES:
            check_cuda(SHAPES[shape], dtype, LAYOUTS[layout], kernels)
        check_cuda(SHAPES[shape], torch.float16, LAYOUTS[layout], kernels, "silu", added=True)
        check_cuda(SHAPES[shape], torch.float32, LAYOUTS[layout], kernels, added=True, tf32=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernels", [EMULATOR], indirect=True)
def test_other_gpus(layout, kernels):
    kernels.emulator.force_fusion("always")
    for _ in kernels.gpus(ONE_SM, AMPERE, TURING):
        for shape in ((1, 24, 80, 24, 9, 13, 3, 1), (2, 7, 33, 70, 8, 11, 3, 2), (1, 8, 20, 12, 10, 9, 5, 2)):
            kernels.emulator.launches()
            for dtype in (torch.float16, torch.float32):
                check_cuda(shape, dtype, LAYOUTS[layout], kernels, added=True)
            names = [launched["name"] for launched in kernels.emulator.launches()]
            assert sum(name.startswith("inverted") for name in names) == 2


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
def test_the_border_is_of_zeros_and_not_of_activated_biases(kernels):
    x, one = torch.zeros(1, 8, 4, 4, device=kernels.device), torch.ones(8, device=kernels.device)
    expand = ops.pointwise_conv2d_pack(torch.zeros_like(one).expand(8, 8)[..., None, None], one, _C.selected_isa())
    filters, last = one.expand(9, 8).t().reshape(8, 1, 3, 3), torch.eye(8, device=kernels.device)[..., None, None]
    packed = ops.separable_conv2d_pack(filters, None, last, None, _C.selected_isa())
    for _ in kernels.fusions():
        y = ops.inverted_residual(x, expand, 8, 0, 0.0, packed, [8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0.0, 0.0])
        assert y[0, 0].tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]


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
def test_views(layout, kernels):
    if kernels.cuda:
        (kernels.emulator or dwconv_ext._C_cuda).force_fusion("always")
    arguments, _ = operands(SHAPES["five"], torch.float32, LAYOUTS[layout], on=kernels)
    x = arguments[0]
    force_one_kernel(LAYOUTS[layout])
    whole = torch.full((3, 12, 35, 34), float("nan"), device=kernels.device).contiguous(memory_format=LAYOUTS[layout])
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


def test_no_images(kernels):
    arguments, _ = operands(SHAPES["small_images"], torch.float32, torch.channels_last, on=kernels)
    assert ops.inverted_residual(arguments[0][:0], *arguments[1:]).shape == (0, 20, 4, 5)
