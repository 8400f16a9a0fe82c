"""The ops between convolutions: linear, poolings, interleave_channels, layer_norm2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from tolerance import UNIT, accumulation_unit, assert_close

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (1, 300), (5, 64), (2, 3, 4, 33), (0 + 17, 20)], ids=str)
def test_linear(shape, isa):
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, bias = torch.randn(shape).to(dtype), torch.randn(37, shape[-1], dtype=wide), torch.randn(37, dtype=wide)
        name = str(dtype).removeprefix("torch.")
        bytes = ops.pointwise_conv2d_pack(weight[:, :, None, None], bias, _C.selected_isa(), name)
        got = ops.linear(x, bytes, 37, _C.activations["relu"])
        assert got.is_contiguous() and got.dtype == dtype
        want = F.linear(x.double(), weight.double(), bias.double()).relu()
        absolute = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        narrow = 2 * UNIT[torch.bfloat16] * absolute if dtype == torch.bfloat16 else None
        assert_close(got, want, absolute, shape[-1] + 8, middle=narrow)


def test_linear_of_views():
    weight = torch.randn(5, 8)
    bytes = ops.pointwise_conv2d_pack(weight[:, :, None, None], None, _C.selected_isa())
    whole = torch.full((9, 6, 8), float("nan"))
    whole[4:6, 2:5] = torch.randn(2, 3, 8)
    for x in (torch.randn(8, 6).t(), whole[4, 2], whole[4, 2:5], whole[5:6, 3:4], whole[4:6, 2:5], whole[4:6, 2]):
        torch.testing.assert_close(ops.linear(x, bytes, 5, 0), F.linear(x, weight))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 3), (3, 65, 1, 9), (1, 130, 14, 14), (2, 33, 40, 1)], ids=str)
def test_global_average_pool(shape, layout, isa):
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        want, size = x.double().mean((2, 3)), x.double().abs().mean((2, 3))
        limit = (shape[2] + shape[3] + 8) * accumulation_unit(dtype) * size + UNIT[dtype] * want.abs()
        for keepdim in (True, False):
            got = ops.global_average_pool(x, keepdim)
            assert got.shape == x.mean((2, 3), keepdim).shape and got.dtype == dtype and got.is_contiguous()
            assert ((got.double().reshape(want.shape) - want).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool2d(layout, dtype, threads):
    windows = [
        (3, 2, 1, 1),
        (2, 2, 0, 1),
        (3, 1, 1, 2),
        ((5, 2), (3, 1), (2, 1), (1, 3)),
        (1, 1, 0, 1),
        ((1, 7), (4, 2), (0, 3), 1),
    ]
    for shape in [(2, 24, 13, 17), (1, 3, 9, 9), (3, 70, 8, 7)]:
        whole = torch.randn(2 * shape[0], *shape[1:]).round(decimals=1).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        whole[0, 1, 3, 4], whole[1, 0, 5, 5] = torch.nan, torch.inf
        whole[0, 2] = -torch.inf
        x = whole[::2, 1:]  # a view of a larger tensor
        for window in windows:
            want = F.max_pool2d(x, *window)
            pairs = [w if isinstance(w, tuple) else (w, w) for w in window]
            for count in (1, 2, 7):
                threads(count)
                got = ops.max_pool2d(x, *pairs)
                assert torch.equal(got.nan_to_num(nan=0.125), want.nan_to_num(nan=0.125)) and torch.equal(
                    got.isnan(), want.isnan()
                )
                assert got.dtype == dtype and got.stride() == ops.max_pool2d(torch.clone(x), *pairs).stride() == want.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interleave_channels(layout, dtype, threads):
    for shape in [(2, 5, 3, 4), (1, 1, 1, 1), (3, 58, 28, 28), (0, 4, 2, 2), (2, 3, 0, 5)]:
        whole = torch.randn(2, *shape[:1], 2 * shape[1], *shape[2:]).to(dtype)
        a, b = (t.contiguous(memory_format=LAYOUTS[layout])[:, shape[1] :] for t in whole)  # views of a larger tensor
        want = torch.stack((a, b), 2).flatten(1, 2)
        for count in (1, 2, 7):
            threads(count)
            for second in (b, b.contiguous(), b.contiguous(memory_format=torch.channels_last)):
                got = ops.interleave_channels(a, second)
                assert torch.equal(got, want)
                assert got.numel() == 0 or shape == (1, 1, 1, 1) or got.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 16, 2, 2), (3, 65, 1, 9), (1, 96, 9, 14), (2, 130, 3, 1)], ids=str
)
def test_layer_norm2d(shape, layout, isa, threads):
    channels = shape[1]
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        x = (3 * torch.randn(shape) + 5).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(channels, dtype=wide), torch.randn(channels, dtype=wide)
        pixels = x.double().permute(0, 2, 3, 1)
        for w, b, eps in [(weight, bias, 1e-6), (weight, None, 0.1), (None, bias, 1e-5), (None, None, 1e-5)]:
            affine = [None if t is None else t.double() for t in (w, b)]
            want = F.layer_norm(pixels, (channels,), *affine, eps).permute(0, 3, 1, 2)
            # The mean's error, and those of the deviation, the scale and the affine map.
            inverse = (pixels.var(-1, correction=0) + eps).rsqrt().unsqueeze(1)
            mean_error = channels * pixels.abs().mean(-1).unsqueeze(1)
            size = (x.double().abs() + mean_error) * inverse * (1 if w is None else w.double().abs().reshape(-1, 1, 1))
            rest = (channels + 8) * want.abs() + (0 if b is None else 8 * b.double().abs().reshape(-1, 1, 1))
            limit = accumulation_unit(dtype) * (2 * size + rest) + UNIT[dtype] * want.abs()
            results = []
            for count in (1, 2, 7):
                threads(count)
                results.append(ops.layer_norm2d(x, w, b, eps))
            got = results[0]
            assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(got, other) for other in results)
            assert ((got.double() - want).abs() <= limit).all()


def test_layer_norm2d_of_views():
    x = torch.randn(2, 24, 9, 10).contiguous(memory_format=torch.channels_last)[:, 3:20, 1::2, ::3]
    got = ops.layer_norm2d(x, None, None)
    torch.testing.assert_close(got, F.layer_norm(x.permute(0, 2, 3, 1), (17,)).permute(0, 3, 1, 2))


def test_layer_norm2d_keeps_nan_to_its_pixel():
    x = torch.randn(1, 5, 2, 2)
    x[0, 1, 1, 0] = torch.nan
    got = ops.layer_norm2d(x, None, None)
    assert torch.equal(got.isnan(), torch.tensor([[False, False], [True, False]]).expand(1, 5, 2, 2))
