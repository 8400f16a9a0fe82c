"""Filters of one row on CUDA, on the emulator: short ones have kernels of their own (depthwise_lines.cuh)."""

from __future__ import annotations

import itertools

import cuda_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from implementations import EMULATOR, running
from tolerance import UNIT

from benchmarks.layers import conv1d_layers
from benchmarks.traffic import LAYOUTS as TRAFFIC_LAYOUTS
from benchmarks.traffic import measure
from dwconv_ext import depthwise_conv1d, depthwise_conv1d_step, depthwise_conv2d
from dwconv_ext.ops.activations import SLOPE, activate

if emulator.cuda_headers() is None:
    pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch", allow_module_level=True)

E = emulator.load()


@pytest.fixture
def emulated():
    with running(EMULATOR):
        E.set_gpu({"sm_count": 4})
        yield E


def launched() -> list[str]:
    return [launch["name"] for launch in E.launches()]


@pytest.mark.parametrize("act", ["identity", "relu", "silu", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_padding_with_its_activation_is_one_launch(dtype, layout, act, emulated):
    for taps in (2, 3, 4):
        for left, right, length in itertools.product(range(taps), (0, 1, 3, 40), (1, 37, 144)):
            x = torch.randn(3, 24, 2, length).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            w, b = torch.randn(24, 1, 1, taps).to(dtype), torch.randn(24).to(dtype)
            if length + left + right < taps:
                continue
            E.launches()
            y = depthwise_conv2d(x, w, b, 1, (0, 0, left, right), act=act)
            names = launched()
            whole = (y.shape[-1] * y.element_size()) % 16 == (length * y.element_size()) % 16 == 0
            if layout == "channels_last" or whole:
                assert names == ["depthwise_lines_nhwc" if layout == "channels_last" else "depthwise_lines_nchw"]
            exact = F.conv2d(F.pad(x.double(), (left, right)), w.double(), b.double(), groups=24)
            bound = 4 * UNIT[dtype]
            torch.testing.assert_close(y.double(), activate(exact, act, SLOPE), rtol=bound, atol=8 * bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps, dilation", [(4, 1), (2, 1), (13, 1), (3, 2)])
def test_a_stream_has_the_bits_of_the_whole(taps, dilation, dtype, layout, emulated):
    """Its pieces and the whole differ in alignment, hence in kernels; a step has one of its own."""
    n, c, length = 2, 24, 160
    x = torch.randn(n, c, length).to(dtype)
    x = x if layout == "nchw" else x.mT.contiguous().mT
    w, b = torch.randn(c, 1, taps).to(dtype), torch.randn(c).to(dtype)
    zeros = torch.zeros(n, c, (taps - 1) * dilation, dtype=dtype)
    whole = depthwise_conv1d(x, w, b, 1, 0, dilation, "silu", causal=True)
    for cuts in ([1], [16, 48], [3, 4, 5, 21, 24], [length - 1]):
        state, pieces = zeros, []
        for begin, end in itertools.pairwise([0, *cuts, length]):
            y, state = depthwise_conv1d(x[..., begin:end], w, b, 1, 0, dilation, "silu", state=state)
            pieces.append(y)
        assert torch.equal(torch.cat(pieces, 2), whole), cuts
    state = zeros.clone()
    for t in range(20):
        assert torch.equal(depthwise_conv1d_step(x[..., t].contiguous(), state, w, b, "silu", dilation), whole[..., t]), t


# Blocks read the samples before their piece again, which memory sends once; the strided filter's kernel is that for any filter.
@pytest.mark.parametrize("layout", TRAFFIC_LAYOUTS)
@pytest.mark.parametrize("layer", [layer for layer in conv1d_layers() if layer.size[1] > 1], ids=lambda layer: layer.name)
def test_lines_move_their_input_and_output_about_once(layer, layout):
    moved = measure(layer._replace(batch=8), layout, torch.float16, separable=False)
    assert 0.99 <= moved.ratio <= 1.2, moved
