"""separable_conv2d, on the CPU and on CUDA, against float64."""

from __future__ import annotations

import pytest
import torch
from blocks import Recorded
from cases import DTYPES, LAYOUTS
from implementations import AMPERE, ONE_SM, TURING
from problems import BLOCKS, operands
from properties import given, st
from reference import ACTIVATIONS, Convolution, check_separable
from torch import nn

import dwconv_ext
from dwconv_ext.nn.folded_layers import ConvSettings, FoldedBlock

NONE = (None,) * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block, layout, dtype):
    tensors, conv = operands(BLOCKS[block], dtype, layout)
    check_separable(*tensors, conv, "relu", "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_implementation(block, layout, kernels):
    for dtype in DTYPES:
        tensors, conv = operands(BLOCKS[block], dtype, layout)
        for rounding in kernels.roundings(dtype):
            for _ in kernels.gpus(ONE_SM, AMPERE, TURING):
                for _ in kernels.fusions():
                    check_separable(*kernels.on_device(tensors), conv, "relu6", "identity", **rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_block_of_several_tiles(layout, dtype, isa):
    """Each begins in the middle of the image, and has pixels and outputs left over; with a residual."""
    tensors, conv = operands((1, 96, 21, (101, 61), (3, 3), Convolution((2, 2), (1, 1))), dtype, layout)
    residual = torch.randn(1, 21, 51, 31).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    check_separable(*tensors, conv, "relu", "relu", residual, peer=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(activation, dtype, layout, kernels):
    """And a residual, which is added after them."""
    tensors, conv = operands(BLOCKS["panel_plus_1"], dtype, layout)
    tensors[0].mul_(3)
    residual = torch.randn(1, 65, 8, 9).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    *tensors, residual = kernels.on_device((*tensors, residual))
    rounding = kernels.roundings(dtype)[0]
    check_separable(*tensors, conv, activation, "identity", residual, **rounding)
    check_separable(*tensors, conv, "identity", activation, **rounding)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends(activation, kernels):
    """Through an identity block: large values, NaN, infinities and zero, as torch.nn.functional has them."""
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 6.0, 20.0, -20.0, 88.0, -88.0, 104.0, -104.0, 1e30, -1e30, inf, -inf, nan]
    x = torch.tensor(values, device=kernels.device).reshape(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=kernels.device)
    ours = dwconv_ext.separable_conv2d(x, one, None, one, None, dw_act="identity", pw_act=activation)
    want = ACTIVATIONS[activation](x.double()).float()  # torch's own float32 gelu is off by 1e-4 at -3 and NaN at infinity
    loose = 1e-3 if kernels.device == "cuda" else 2e-6  # tf32 may be on
    # GELU is x times a probability that is right to 2e-7, torch's to 3.5e-7.
    near = 3 * 2e-7 if activation == "gelu" else 1e-30
    torch.testing.assert_close(ours, want, equal_nan=True, rtol=loose, atol=near)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_no_bias(layout, dtype, kernels):
    (x, dw, _, pw, _), conv = operands(BLOCKS["panel_plus_1"], dtype, layout)
    residual = torch.randn(x.shape[0], len(pw), *x.shape[2:]).to(dtype)
    x, dw, pw, residual = kernels.on_device((x, dw, pw, residual))
    for memory_format in LAYOUTS.values():
        added = residual.contiguous(memory_format=memory_format)
        check_separable(x, dw, None, pw, None, conv, "relu", "relu", added, **kernels.roundings(dtype)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_packed_weights_give_the_same_bits(block, layout, isa):
    for dtype in DTYPES:
        (x, *weights), conv = operands(BLOCKS[block], dtype, layout)
        first = ConvSettings(*conv.args(), x.shape[1], "silu", 0.3)
        folded = FoldedBlock(first, ConvSettings(activation="leaky_relu", slope=0.2))
        tensors = (*weights[:2], *NONE, *weights[2:], *NONE)
        options = {"dw_act": "silu", "pw_act": "leaky_relu", "dw_slope": 0.3, "pw_slope": 0.2}
        want = dwconv_ext.separable_conv2d(x, *weights, *conv.args(), **options)
        residual = torch.randn(want.shape).to(dtype)
        calls = []
        with Recorded(calls):
            got, added = folded(x, tensors), folded(x, tensors, residual)
        assert calls.count("separable_conv2d_packed") == 2 and calls.count("separable_conv2d_pack") == 1
        assert torch.equal(got, want) and got.stride() == want.stride()
        assert torch.equal(added, dwconv_ext.separable_conv2d(x, *weights, *conv.args(), **options, residual=residual))
        without = FoldedBlock(ConvSettings(*conv.args(), x.shape[1], "relu"), ConvSettings(activation="relu"))
        want = dwconv_ext.separable_conv2d(x, weights[0], None, weights[2], None, *conv.args())
        assert torch.equal(without(x, (weights[0], None, *NONE, weights[2], None, *NONE)), want)


def test_what_packed_weights_are_not_for():
    (x, *weights), conv = operands(BLOCKS["panel"], torch.float32, "nchw")
    tensors = (*weights[:2], *NONE, *weights[2:], *NONE)
    residual = torch.randn(1, 64, 7, 8)
    settings = ConvSettings(*conv.args(), x.shape[1], "relu")

    def packs(x, residual=None, tensors=tensors, settings=settings):
        calls = []
        try:
            with Recorded(calls):
                FoldedBlock(settings, ConvSettings(activation="relu"))(x, tensors, residual)
        except (RuntimeError, NotImplementedError):
            return False
        return "separable_conv2d_packed" in calls

    assert packs(x) and packs(x, residual)
    for other in (x[:, 1:], x.to("meta"), x.clone().requires_grad_(), nn.Parameter(x)):
        assert not packs(other, residual)
    assert not packs(x, residual.double()) and not packs(x, residual.clone().requires_grad_())
    with torch.no_grad():
        assert packs(x.clone().requires_grad_())
    uneven = settings._replace(padding="same")
    assert packs(x, tensors=(torch.randn(16, 1, 2, 2), *tensors[1:]), settings=uneven)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_same_bits_for_any_number_of_threads(block, layout, dtype, threads):
    tensors, conv = operands(BLOCKS[block], dtype, layout)
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(dwconv_ext.separable_conv2d(*tensors, *conv.args()))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@given(st.data())
def test_random_blocks(data):
    def pick(*values):
        return data.draw(st.sampled_from(values))

    kernel = (pick(1, 3, 5, 7), pick(1, 2, 3, 5))
    conv = Convolution(
        (pick(1, 2, 3), pick(1, 2)), (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))), (pick(1, 1, 2), pick(1, 1, 2))
    )
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, conv.dilation, conv.padding, strict=True)]
    size = tuple(m + data.draw(st.integers(0, 15)) for m in least)
    block = (data.draw(st.integers(0, 2)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140)), size, kernel, conv)
    tensors, conv = operands(block, pick(*DTYPES), pick(*LAYOUTS), seed=data.draw(st.integers(0, 2**31)))
    check_separable(*tensors, conv, pick("relu", "identity"), pick("relu", "identity"), peer=False)
