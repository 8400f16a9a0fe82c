"""Strides, paddings and dilations far beyond their tensors: the right answer at the size's cost, or an error before any work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from extreme import AXES, PLAIN, Axis, check
from properties import given, st
from torch import nn

import dwconv_ext
from dwconv_ext import DepthwiseConv2d, FusedDSConv, depthwise_conv2d, separable_conv2d

META = torch.device("meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", AXES)
def test_axes(axis, layout, dtype):
    check(AXES[axis], PLAIN, dtype, layout)
    check(PLAIN, AXES[axis], dtype, layout, channels=3, multiplier=2)
    check(AXES[axis], AXES[axis], dtype, layout, channels=5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", AXES)
def test_every_implementation(axis, layout, kernels):
    axis = AXES[axis]
    channels = 16 if kernels.cuda else 17  # CUDA's kernels for whole vectors; a vector and a tail
    for dtype in DTYPES:
        check(axis, PLAIN, dtype, layout, channels, device=kernels.device)
        check(axis, axis, dtype, layout, channels=5, device=kernels.device)
    check(PLAIN, axis, torch.float32, layout, channels=3, multiplier=2, device=kernels.device)


@st.composite
def axes(draw):
    """Any sizes and strides, with paddings and dilations of which the output stays small."""
    size, kernel, gap = draw(st.integers(1, 12)), draw(st.integers(1, 4)), st.integers(-3, 3)
    any_size = st.integers(0, 61).flatmap(lambda bits: st.integers(1, 2**bits))
    dilation = draw(st.integers(1, 3) | any_size)
    ratio = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)]))
    stride = draw(st.integers(1, 100) | any_size | gap.map(lambda g: max(dilation * ratio[0] // ratio[1] + g, 1)))
    steps = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    padding = draw(st.integers(0, 5) | any_size | gap.map(lambda g: steps[0] * stride + steps[1] * dilation + g))
    padding = min(max(padding, 0, -(-(dilation * (kernel - 1) + 1 - size) // 2)), (2**63 - 1 - size) // 2)
    axis = Axis(size, kernel, stride, padding, dilation)
    if axis.outputs > 12:
        axis = replace(axis, stride=(size + 2 * padding - dilation * (kernel - 1) - 1) // 6)
    return axis


@given(axes(), axes(), st.sampled_from(list(LAYOUTS)), st.sampled_from([1, 3, 16, 17]), st.sampled_from([1, 1, 2]))
def test_random_axes(h, w, layout, channels, multiplier):
    check(h, w, torch.float32, layout, channels, multiplier)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pixel_of_a_stride_near_2_to_the_31(layout):
    x = torch.ones(1, 16, 8, 8).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = torch.ones(16, 1, 3, 3, requires_grad=True)
    y = depthwise_conv2d(x, weight, stride=2**31 - 1)
    y.sum().backward()
    assert [t.sum().item() for t in (y, x.grad, weight.grad)] == [144.0] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_block(layout):
    for stride, padding, dilation in ((2**62, 1, 1), (2**40, 2**40, 1), (1, 2**61, 2**61)):
        block = FusedDSConv(16, 8, 3, stride, padding, dilation, activation="identity").eval()
        x = torch.randn(1, 16, 8, 8).contiguous(memory_format=LAYOUTS[layout])
        with torch.no_grad():
            ours = block(x)
            parts = nn.Sequential(block.depthwise, block.bn1, block.pointwise, block.bn2)(x)
        torch.testing.assert_close(ours, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_shapes_without_data(axis):
    a = AXES[axis]
    x, weight = torch.empty(2, 4, a.size, 7, device=META), torch.empty(4, 1, a.kernel, 3, device=META)
    y = depthwise_conv2d(x, weight, None, (a.stride, 1), (a.padding, 1), (a.dilation, 1))
    assert y.shape == (2, 4, a.outputs, 7)


GIVEN = "Given padding={} at dimension {}, expected padding to be at most 4611686018427387899"
WRONG = {
    "padding": ({"padding": 2**62}, GIVEN.format(2**62, 0)),
    "padding_w": ({"padding": (0, 2**62 - 1)}, GIVEN.format(2**62 - 1, 1)),
    "dilation": ({"dilation": 2**62}, "filter is larger than the padded input along height"),
    "dilation_w": ({"dilation": (1, 2**62), "padding": (0, 2**61)}, "filter is larger than the padded input along width"),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_64_bits_do_not_hold(wrong, device):
    kwargs, message = WRONG[wrong]
    x, w, pw = (torch.ones(s, device=device) for s in ((1, 4, 8, 8), (4, 1, 3, 3), (6, 4, 1, 1)))
    with pytest.raises(RuntimeError, match=f"depthwise_conv2d: .*{message}"):
        depthwise_conv2d(x, w, **kwargs)
    with pytest.raises(RuntimeError, match=f"separable_conv2d: .*{message}"):
        separable_conv2d(x, w, None, pw, None, **kwargs)


def test_outputs_that_no_memory_holds():
    x, w, pw = torch.ones(1, 4, 8, 8), torch.ones(4, 1, 3, 3), torch.ones(6, 4, 1, 1)
    for device in ("cpu", META):
        too_large = r"depthwise_conv2d: the output's shape \[1, 4, .*too large to allocate: padding is"
        with pytest.raises(RuntimeError, match=too_large):
            depthwise_conv2d(x.to(device), w.to(device), padding=2**40)
    with pytest.raises(RuntimeError, match=r"separable_conv2d: the output's shape \[1, 6, .*too large to allocate: padding is"):
        separable_conv2d(x, w, None, pw, None, padding=2**61)
    with pytest.raises(RuntimeError, match="separable_conv2d_packed: the output's shape"), torch.no_grad():
        FusedDSConv(4, 6, padding=2**40).eval()(x)
    with pytest.raises(RuntimeError, match="allocate"):  # by the allocator
        depthwise_conv2d(x, w, padding=(0, 2**41))


INT = np.int64
INTEGERS = [INT(2), np.int32(2), np.uint8(2), (INT(2), 2), [2, INT(2)], (INT(2),), np.array(2)]


@pytest.mark.parametrize("integer", INTEGERS, ids=repr)
def test_numpy_integers(integer):
    x, w = torch.randn(2, 4, 17, 18), torch.randn(4, 1, 3, 3)
    want = F.conv2d(x, w, None, 2, 2, 2, 4)
    torch.testing.assert_close(depthwise_conv2d(x, w, None, integer, integer, integer), want)
    layer = DepthwiseConv2d(4, 4, integer, integer, integer, integer)
    assert {type(v) for v in (*layer.kernel_size, *layer.stride, *layer.padding, *layer.dilation)} == {int}
    assert layer(x).shape == F.conv2d(x, layer.weight, None, 2, 2, 2, 4).shape


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float64(2), (INT(1), True), (INT(1),) * 3, np.array([2, 2])], ids=repr)
def test_what_of_numpy_is_no_integer(wrong):
    with pytest.raises(TypeError, match="stride must be an int or a pair of ints, but got"):
        depthwise_conv2d(torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3), stride=wrong)
    with pytest.raises(TypeError, match="dilation must be an int or a pair of ints, but got"):
        DepthwiseConv2d(4, 4, 3, dilation=wrong)


def test_layers_made_of_numpy_integers():
    """nn.Conv2d keeps them as they are; a conversion changes its class alone."""
    layer = nn.Conv2d(16, 16, INT(3), stride=INT(2), padding=INT(1), groups=16)
    x = torch.randn(1, 16, 9, 9, requires_grad=True)
    want = layer(x)
    wanted = torch.autograd.grad(want.sum(), (x, layer.weight))
    layer.__class__ = DepthwiseConv2d
    got = layer(x)
    torch.testing.assert_close([got, *torch.autograd.grad(got.sum(), (x, layer.weight))], [want, *wanted])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), want)

    model = nn.Sequential(
        nn.Conv2d(8, 8, INT(3), INT(2), INT(1), groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, INT(1)),
        nn.BatchNorm2d(6),
    ).eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(dwconv_ext.convert(model)(x), want, rtol=1e-4, atol=1e-5)


def test_blocks_made_of_numpy_integers():
    block = FusedDSConv(8, 6, INT(3), INT(2), dilation=INT(1)).eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert block(x).shape == (1, 6, 5, 5)
        torch.testing.assert_close(torch.compile(block, backend="aot_eager")(x), block(x))
