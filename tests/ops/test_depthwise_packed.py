"""depthwise_conv2d_packed: the bits of depthwise_conv2d, of weights that were packed before."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from tolerance import UNIT, accumulation_unit

import dwconv_ext
from dwconv_ext.ops.arguments import four_paddings
from dwconv_ext.ops.functional import name_of

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
CASES = {  # channels, multiplier, filter, stride, padding, dilation, height, width
    "3x3": (40, 1, (3, 3), (1, 1), (1, 1), (1, 1), 14, 15),
    "5x5_strided": (17, 1, (5, 5), (2, 2), (2, 2), (1, 1), 13, 14),
    "7x7": (64, 1, (7, 7), (1, 1), (3, 3), (1, 1), 9, 8),
    "one_row": (20, 1, (1, 11), (1, 1), (0, 5), (1, 1), 6, 33),
    "dilated": (9, 1, (3, 2), (1, 2), (2, 1), (2, 3), 12, 16),
    "multiplier": (6, 3, (3, 3), (1, 2), (1, 0), (1, 1), 10, 11),
    "one_channel": (1, 5, (3, 3), (1, 1), (1, 1), (1, 1), 8, 8),
    "flat": (24, 1, (3, 3), (1, 1), (1, 1), (1, 1), 30, 56),
}
pytestmark = pytest.mark.isa


def tensors(case, dtype, layout):
    torch.manual_seed(0)
    channels, multiplier, kernel, *_, height, width = case
    x = torch.randn(2, channels, height, width).to(dtype).contiguous(memory_format=layout)
    return x, torch.randn(channels * multiplier, 1, *kernel).to(dtype), torch.randn(channels * multiplier).to(dtype)


def run(case, x, weight, bias, act="relu"):
    packed = ops.depthwise_conv2d_pack(weight, bias, _C.selected_isa(), name_of(x.dtype))
    _, _, kernel, stride, padding, dilation, *_ = case
    filter = [len(weight), *kernel, *stride, *four_paddings(padding), *dilation]
    return ops.depthwise_conv2d_packed(x, packed, filter, _C.activations[act], 0.1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_of_the_op_that_packs(case, isa):
    for dtype, layout, act in itertools.product(DTYPES, LAYOUTS.values(), ("identity", "hardswish")):
        x, weight, bias = tensors(case, dtype, layout)
        for b in (bias, None):
            want = ops.depthwise_conv2d(x, weight, b, *case[3:6], act, 0.1)
            got = run(case, x, weight, b, act)
            assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_float32_weights_are_not_rounded(dtype, layout, isa):
    case = CASES["3x3"]
    x, weight, _ = tensors(case, torch.float32, layout)
    x, weight = x.to(dtype), 1 + weight / 2**12  # in the narrow type nearly all of it would be 1
    got = run(case, x, weight, None, "identity").double()
    want = F.conv2d(x.double(), weight.double(), None, *case[3:6], groups=case[0])
    size = F.conv2d(x.double().abs(), weight.double().abs(), None, *case[3:6], groups=case[0])
    assert ((got - want).abs() <= 16 * accumulation_unit(dtype) * size + UNIT[dtype] * want.abs()).all()


def test_weights_beyond_float16(isa):
    x = torch.full((1, 3, 4, 4), 1e-4, dtype=torch.float16)
    got = run((3, 1, (1, 1), (1, 1), (0, 0), (1, 1), 4, 4), x, torch.full((3, 1, 1, 1), 1e6), torch.full((3,), 1e5), "identity")
    assert got.isinf().all()  # 1e5 + 100
    got = run((3, 1, (1, 1), (1, 1), (0, 0), (1, 1), 4, 4), x, torch.full((3, 1, 1, 1), 1e6), torch.full((3,), -99.0), "identity")
    want = x.double() * 1e6 - 99
    assert ((got.double() - want).abs() <= 1e-4 + UNIT[torch.float16] * want.abs()).all()


def test_views_and_threads(threads, isa):
    case = CASES["5x5_strided"]
    for layout in LAYOUTS.values():
        x, weight, bias = tensors(case, torch.float32, layout)
        whole = torch.full((2, 30, 20, 20), float("nan")).contiguous(memory_format=layout)
        view = whole[:, 5:22, 3:16, 4:18]
        view.copy_(x)
        results = []
        for count in (1, 2, 7):
            threads(count)
            results += [run(case, x, weight, bias), run(case, view, weight, bias)]
        assert all(torch.equal(results[0], result) for result in results)


def test_errors():
    x, weight, bias = tensors(CASES["3x3"], torch.float32, torch.channels_last)
    isa = _C.selected_isa()
    packed, filter = ops.depthwise_conv2d_pack(weight, bias, isa), [40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    other = ops.depthwise_conv2d_pack(weight[..., :2], bias, isa)
    block = ops.separable_conv2d_pack(weight, bias, weight.new_ones(8, 40, 1, 1), None, isa)
    made = "packed must be what depthwise_conv2d_pack made on this device of 40 filters of this size, for inputs of this dtype"
    for bytes in (other, block, packed[:-1]):
        with pytest.raises(RuntimeError, match=f"depthwise_conv2d_packed: {made}"):
            ops.depthwise_conv2d_packed(x, bytes, filter, 0)
    with pytest.raises(RuntimeError, match=f"depthwise_conv2d_packed: {made}"):
        ops.depthwise_conv2d_packed(x.bfloat16(), packed, filter, 0)
    none = [0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]  # no output channels: the same bytes but for their op
    with pytest.raises(RuntimeError, match="separable_conv2d_packed: packed must be what separable_conv2d_pack made"):
        ops.separable_conv2d_packed(x, packed, none, [0.0, 0.0])
    expand = ops.pointwise_conv2d_pack(weight.new_ones(40, 40, 1, 1), None, isa)
    with pytest.raises(RuntimeError, match="inverted_residual: packed must be what separable_conv2d_pack made"):
        ops.inverted_residual(x, expand, 40, 0, 0.0, packed, none, [0.0, 0.0])
    with pytest.raises(RuntimeError, match="depthwise_conv2d_packed: packed's filter is larger than the padded input"):
        ops.depthwise_conv2d_packed(x[:, :, :1], packed, [40, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1], 0)
    with pytest.raises(RuntimeError, match="filter's out_channels must be a multiple of input's channels, 39, but got 40"):
        ops.depthwise_conv2d_packed(x[:, :39], packed, filter, 0)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d_pack: weight must have shape \(out_channels, 1, kH, kW\)"):
        ops.depthwise_conv2d_pack(weight.expand(-1, 2, -1, -1), bias, isa)
    with pytest.raises(RuntimeError, match="depthwise_conv2d_pack: isa must be the selected instruction set"):
        ops.depthwise_conv2d_pack(weight, bias, "sse9")


def test_opcheck():
    x, weight, bias = tensors(CASES["multiplier"], torch.float32, torch.channels_last)
    isa = _C.selected_isa()
    torch.library.opcheck(ops.depthwise_conv2d_pack.default, (weight, bias, isa))
    packed = ops.depthwise_conv2d_pack(weight, bias, isa)
    torch.library.opcheck(ops.depthwise_conv2d_packed.default, (x, packed, [18, 3, 3, 1, 2, 1, 1, 0, 2, 1, 1], 1))
