"""pointwise_conv2d, with packed weights, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from implementations import AMPERE, CUDA, ONE_SM, TURING, Implementation
from properties import given, st
from reference import ACTIVATIONS, SLOPE
from tolerance import UNIT, assert_close

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
SHAPES = {  # batch, input channels, output channels, height, width
    "one": (1, 1, 1, 1, 1),
    "few": (2, 7, 5, 5, 3),
    "vectors_plus_1": (1, 33, 17, 7, 8),
    "panels_minus_1": (3, 64, 127, 14, 14),
    "register_tile_plus_1": (1, 24, 40, 3, 5),
    "two_blocks_of_depth": (1, 300, 36, 9, 7),
    "rows_in_one_cache_set": (1, 1024, 33, 6, 5),
    "many_pixels": (2, 16, 48, 61, 53),
    "columns": (3, 8, 20, 30, 1),
    "columns_of_one_channel": (3, 1, 1, 16, 1),
    "row": (1, 1280, 100, 1, 1),
}
WIDE = {"wide": (1, 5, 9, 2, 5000)}  # wider than a tile
CPU = Implementation("cpu")
pytestmark = pytest.mark.isa


def packed(c, o, dtype, bias=True, on=CPU):
    """CUDA's kernels multiply weights of the input's dtype: they are given such."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, b = torch.randn(o, c, 1, 1, dtype=wide) / c**0.5, torch.randn(o, dtype=wide) if bias else None
    weight, b = on.on_device([weight.to(dtype).to(wide) if on.cuda else weight, b])
    return weight, b, ops.pointwise_conv2d_pack(weight, b, _C.selected_isa(), str(dtype).removeprefix("torch."))


def check(shape, dtype, layout, *, stride=1, act="identity", gated=False, added=False, bias=True, on=CPU, tf32=False):
    n, c, o, h, w = shape
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weight, b, bytes = packed(c, o, dtype, bias, on)
    gate = torch.rand(n, c, 1, 1).to(dtype) if gated else None
    size = [-(-side // stride) for side in (h, w)]
    residual = torch.randn(n, o, *size).to(dtype).contiguous(memory_format=layout) if added else None
    x, gate, residual = on.on_device([x, gate, residual])
    got = ops.pointwise_conv2d(x, bytes, o, stride, _C.activations[act], 0.01, residual, gate, tf32)
    x64, b64 = x.double() * (1 if gate is None else gate.double()), None if b is None else b.double()
    sums = F.conv2d(x64, weight.double(), b64, stride)
    absolute = F.conv2d(x64.abs(), weight.double().abs(), None if b is None else b64.abs(), stride)
    # bfloat16 may be multiplied as such, weights and gated pixels rounded; CUDA rounds gated pixels, and both operands for tf32.
    unit = 2 * 2.0**-11 if tf32 else UNIT[dtype] if on.cuda else UNIT[dtype] if dtype == torch.bfloat16 else 0
    narrow = (3 if dtype == torch.bfloat16 else gated or tf32) * unit * absolute
    want = ACTIVATIONS[act](sums)
    if added:
        want, absolute = want + residual.double(), absolute + residual.double().abs()
    assert got.dtype == dtype and (1 in shape or 1 in size or got.is_contiguous(memory_format=layout))
    stretch = SLOPE.get(act, 1.0)
    assert_close(got, want, stretch * absolute, c + 8, middle=stretch * narrow)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES | WIDE)
def test_every_implementation(shape, layout, kernels):
    for _ in kernels.gpus(ONE_SM, TURING):
        for dtype in DTYPES:
            sizes, format = (SHAPES | WIDE)[shape], LAYOUTS[layout]
            check(sizes, dtype, format, on=kernels)
            check(sizes, dtype, format, gated=True, added=True, act="relu", bias=False, on=kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", (2, 3, 100))
def test_strides(stride, layout, kernels):
    for dtype in DTYPES:
        check((2, 20, 35, 9, 12), dtype, LAYOUTS[layout], stride=stride, added=True, gated=stride == 3, on=kernels)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, kernels):
    for layout in LAYOUTS.values():
        check((1, 12, 40, 5, 6), torch.float32, layout, act=act, on=kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernels", CUDA, indirect=True)
def test_tensor_cores(layout, kernels):
    for _ in kernels.gpus(AMPERE):
        for shape in ((2, 72, 136, 9, 14), (1, 31, 200, 7, 7)):
            for gated in (False, True):
                check(shape, torch.float32, LAYOUTS[layout], gated=gated, added=True, on=kernels, tf32=True)
                check(shape, torch.bfloat16, LAYOUTS[layout], gated=gated, act="silu", on=kernels)


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
def test_a_bias_that_does_not_fit_float16(kernels):
    """As a channel's that is always zero may be when it is folded."""
    x, weight, bias = torch.full((1, 8, 3, 3), 2.0), torch.full((16, 8, 1, 1), 6000.0), torch.full((16,), -96001.0)
    x, weight, bias = kernels.on_device([x.half(), weight, bias])
    bytes = ops.pointwise_conv2d_pack(weight, bias, _C.selected_isa(), "float16")
    assert ops.pointwise_conv2d(x, bytes, 16, 1, 0).unique().tolist() == [-1.0]


@given(st.data())
def test_random(data):
    sides = st.integers(1, 20)
    shape = tuple(data.draw(s) for s in (st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), sides, sides))
    flags = {name: data.draw(st.booleans()) for name in ("gated", "added", "bias")}
    layout, dtype = (data.draw(st.sampled_from(list(values))) for values in (LAYOUTS.values(), DTYPES))
    check(shape, dtype, layout, stride=data.draw(st.integers(1, 3)), **flags)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout, kernels):
    """Nothing beside a view is read into the result, nor beyond the end of memory."""
    _, _, bytes = packed(20, 24, torch.float32, on=kernels)
    whole = torch.full((2, 30, 9, 11), float("nan"), device=kernels.device).contiguous(memory_format=LAYOUTS[layout])
    view = whole[:, 3:23, 1:8, 2:9]
    view.copy_(torch.randn(2, 20, 7, 7))
    dense = view.contiguous(memory_format=LAYOUTS[layout])
    for stride in (1, 2):
        want = ops.pointwise_conv2d(dense, bytes, 24, stride, 1)
        assert torch.equal(ops.pointwise_conv2d(view, bytes, 24, stride, 1), want)
        for batch in ("expanded", "sliced"):
            x = dense[:1].expand(3, -1, -1, -1) if batch == "expanded" else torch.cat((dense, dense))[::2]
            each = [ops.pointwise_conv2d(image[None].clone(), bytes, 24, stride, 1) for image in x]
            torch.testing.assert_close(ops.pointwise_conv2d(x, bytes, 24, stride, 1), torch.cat(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_pixel(layout, kernels):
    """Also where channels are multiplied two at a time, and their number is odd."""
    for dtype, channels in itertools.product(DTYPES, (1, 7, 8, 33)):
        x = torch.randn(2, channels, 5, 6).to(dtype).contiguous(memory_format=LAYOUTS[layout]).to(kernels.device)
        x[0, -1, 1, 5], x[1, 0, 2, 0] = float("nan"), float("inf")
        got = ops.pointwise_conv2d(x, packed(channels, 24, dtype, on=kernels)[2], 24, 1, 0)
        assert torch.equal(got.isfinite(), x.isfinite().all(1, keepdim=True).expand_as(got))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, layout, threads):
    for n, c, o, h, w in ((2, 40, 72, 30, 31), (1, 600, 300, 3, 4)):
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        gate, (_, _, bytes) = torch.rand(n, c, 1, 1).to(dtype), packed(c, o, dtype)
        for given_gate in (None, gate):
            results = []
            for count in (1, 2, 7):
                threads(count)
                results.append(ops.pointwise_conv2d(x, bytes, o, 1, 3, 0.0, None, given_gate))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


X, (WEIGHT, BIAS, PACKED) = torch.randn(2, 8, 4, 4), packed(8, 6, torch.float32)
CUT = PACKED[:-1]
MADE = "packed must be what pointwise_conv2d_pack made on this device of weights for {} channels of input"
BLOCK = ops.separable_conv2d_pack(torch.ones(8, 1, 1, 1), None, torch.randn(6, 8, 1, 1), None, _C.selected_isa())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"input": X[0]}, r"input must be 4-dimensional \(N, C, H, W\), but got shape \[8, 4, 4\]"),
    ({"input": X.int()}, "input must be float32, float64, bfloat16 or float16, but got torch.int32"),
    ({"input": X.half()}, MADE.format(8)),
    ({"input": X[:, 1:]}, MADE.format(7)),
    ({"input": X[:, :, :0]}, "input must have a non-empty height and width"),
    ({"packed": CUT}, MADE.format(8)),
    ({"packed": BLOCK}, MADE.format(8)),
    ({"out_channels": 7}, MADE.format(8)),
    ({"out_channels": -6}, MADE.format(8)),
    ({"stride": 0}, "stride should be greater than zero"),
    ({"act": 8}, "act must be an activation's number, but got 8"),
    ({"residual": X}, r"residual must have the output's shape \[2, 6, 4, 4\]"),
    ({"gate": torch.ones(2, 8)}, r"gate must have shape \[2, 8, 1, 1\], but got \[2, 8\]"),
    ({"gate": torch.ones(1, 8, 1, 1)}, r"gate must have shape \[2, 8, 1, 1\]"),
    ({"gate": torch.ones(2, 8, 1, 1).double()}, "gate's dtype and the others' should be the same"),
])  # fmt: skip
def test_errors(wrong, message, kernels):
    """The packed bytes that are not wrong are those of the implementation."""
    packed = ops.pointwise_conv2d_pack(*kernels.on_device([WEIGHT, BIAS]), _C.selected_isa())
    wrong = {"packed": packed[:-1]} if wrong.get("packed") is CUT else wrong
    right = {"input": X, "packed": packed, "out_channels": 6, "stride": 1, "act": 0}
    right, wrong = (
        {name: value.to(kernels.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        for given in (right, wrong)
    )
    assert ops.pointwise_conv2d(**right).shape == (2, 6, 4, 4)
    with pytest.raises(RuntimeError, match=f"pointwise_conv2d: {message}"):
        ops.pointwise_conv2d(**(right | wrong))


def test_a_pointwise_convolutions_weights_are_no_blocks():
    with pytest.raises(RuntimeError, match="packed must be what separable_conv2d_pack made"):
        ops.separable_conv2d_packed(X, PACKED, [6, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0], [0.0, 0.0])


def test_pack_errors():
    weight, isa = torch.randn(6, 8, 1, 1), _C.selected_isa()
    with pytest.raises(RuntimeError, match=r"weight must have shape \(out_channels, C, 1, 1\), but got \[6, 8, 3, 3\]"):
        ops.pointwise_conv2d_pack(torch.randn(6, 8, 3, 3), None, isa)
    with pytest.raises(RuntimeError, match="bias must be 1-dimensional with 6 elements, but got shape"):
        ops.pointwise_conv2d_pack(weight, torch.ones(5), isa)
    with pytest.raises(RuntimeError, match="isa must be the selected instruction set"):
        ops.pointwise_conv2d_pack(weight, None, "sse9")
    with pytest.raises(RuntimeError, match="input_dtype must be the weights'"):
        ops.pointwise_conv2d_pack(weight, None, isa, "float64")


def test_opcheck():
    residual, gate = torch.randn(2, 6, 4, 4), torch.rand(2, 8, 1, 1)
    torch.library.opcheck(ops.pointwise_conv2d.default, (X, PACKED, 6, 1, 1, 0.0, residual, gate))
    torch.library.opcheck(ops.pointwise_conv2d_pack.default, (torch.randn(6, 8, 1, 1), None, _C.selected_isa()))


def test_no_images():
    assert ops.pointwise_conv2d(X[:0], PACKED, 6, 2, 0).shape == (0, 6, 2, 2)
