"""patch_conv2d, a dense convolution of few channels with packed weights, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from properties import given, st
from reference import ACTIVATIONS, SLOPE
from tolerance import UNIT, assert_close

import dwconv_ext
from dwconv_ext.ops.arguments import four_paddings

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
SHAPES = {  # batch, input channels, output channels, height, width; kernel, stride, padding, dilation
    "mobilenet": ((1, 3, 32, 33, 30), (3, 3), (2, 2), (1, 1), (1, 1)),
    "resnet": ((2, 3, 64, 20, 23), (7, 7), (2, 2), (3, 3), (1, 1)),
    "convnext": ((1, 3, 40, 16, 24), (4, 4), (4, 4), (0, 0), (1, 1)),
    "one_pixel": ((1, 1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "taps_apart": ((1, 4, 17, 15, 19), (3, 2), (1, 2), (2, 3), (2, 3)),
    "more_padding_than_image": ((2, 2, 5, 2, 3), (2, 3), (1, 1), (6, 9), (1, 1)),
    "steps_over_pixels": ((1, 3, 33, 23, 29), (2, 1), (5, 7), (0, 1), (1, 1)),
    "images_in_one_tile": ((5, 3, 8, 4, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "row": ((3, 3, 20, 1, 50), (1, 5), (1, 1), (0, 2), (1, 1)),
    "column": ((3, 2, 20, 50, 1), (5, 1), (2, 1), (2, 0), (1, 1)),
    "two_blocks_of_depth": ((1, 7, 36, 9, 9), (7, 7), (1, 1), (3, 3), (1, 1)),
}
pytestmark = pytest.mark.isa


def packed(weight, bias, dtype):
    patches = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
    return ops.pointwise_conv2d_pack(patches, bias, _C.selected_isa(), str(dtype).removeprefix("torch."))


def check(case, dtype, layout, *, act="identity", bias=True, channels_last=False):
    (n, c, o, h, w), kernel, stride, padding, dilation = case
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weight, b = torch.randn(o, c, *kernel, dtype=wide), torch.randn(o, dtype=wide) if bias else None
    filter = [o, *kernel, *stride, *four_paddings(padding), *dilation]
    got = ops.patch_conv2d(x, packed(weight, b, dtype), filter, _C.activations[act], 0.01, channels_last)
    b64 = None if b is None else b.double()
    sums = F.conv2d(x.double(), weight.double(), b64, stride, padding, dilation)
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), None if b is None else b64.abs(), stride, padding, dilation)
    narrow = 3 * UNIT[torch.bfloat16] * absolute if dtype == torch.bfloat16 else 0 * absolute
    stretch = SLOPE.get(act, 1.0)
    terms = c * kernel[0] * kernel[1] + 8
    assert_close(got, ACTIVATIONS[act](sums), stretch * absolute, terms, middle=stretch * narrow)
    assert got.dtype == dtype
    if channels_last:
        assert got.is_contiguous(memory_format=torch.channels_last)
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SHAPES)
def test_every_implementation(case, layout, isa):
    for dtype in DTYPES:
        check(SHAPES[case], dtype, LAYOUTS[layout])
        check(SHAPES[case], dtype, LAYOUTS[layout], channels_last=True, act="relu", bias=False)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, isa):
    for layout in LAYOUTS.values():
        check(SHAPES["mobilenet"], torch.float32, layout, act=act)


@given(st.data())
def test_random(data):
    side, small, step = st.integers(1, 40), st.integers(1, 5), st.integers(1, 4)
    n, c, o = (data.draw(st.integers(1, most)) for most in (3, 4, 70))
    kernel, stride, dilation = ((data.draw(kind), data.draw(kind)) for kind in (small, step, st.integers(1, 3)))
    padding = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    h, w = (max(data.draw(side), r - 2 * p) for r, p in zip(reach, padding, strict=True))
    layout, dtype = (data.draw(st.sampled_from(list(values))) for values in (LAYOUTS.values(), DTYPES))
    check(((n, c, o, h, w), kernel, stride, padding, dilation), dtype, layout, channels_last=data.draw(st.booleans()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout, isa):
    """Whatever the input's strides; nothing beside a view is read into the result."""
    weight = torch.randn(24, 3, 3, 3)
    bytes = packed(weight, None, torch.float32)
    whole = torch.full((2, 5, 12, 16), float("nan")).contiguous(memory_format=LAYOUTS[layout])
    views = (whole[:, 1:4, 2:9, 3:13], whole[:, 1:4, ::2, ::3], whole[:, 1:4].transpose(2, 3), whole[:, :5:2], whole[1:, 2:])
    for view in views:
        view.copy_(torch.randn(view.shape))
        for last in (False, True):
            want = ops.patch_conv2d(view.contiguous(), bytes, [24, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1], 1, 0.01, last)
            assert torch.equal(ops.patch_conv2d(view, bytes, [24, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1], 1, 0.01, last), want)
        view.fill_(float("nan"))
    one = torch.randn(1, 3, 1, 1).expand(2, 3, 6, 7)
    want = ops.patch_conv2d(one.contiguous(), bytes, [24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1], 0)
    assert torch.equal(ops.patch_conv2d(one, bytes, [24, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1], 0), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, layout, threads):
    torch.manual_seed(0)
    results = []
    for count in (1, 2, 7):
        threads(count)
        torch.manual_seed(1)
        results.append(check(((2, 3, 40, 61, 50), (3, 3), (2, 2), (1, 1), (1, 1)), dtype, LAYOUTS[layout]))
    assert all(torch.equal(results[0], other) for other in results[1:])
