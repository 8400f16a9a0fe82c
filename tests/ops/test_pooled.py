"""depthwise_conv2d_pooled: the depthwise convolution, and the mean over the pixels of what it has rounded."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case
from implementations import CUDA, ONE_SM
from reference import check_pooled

from dwconv_ext import _C
from dwconv_ext.ops.activations import ACTIVATIONS

ANYWHERE = [*CUDA, _C.selected_isa()]  # on the CPU it is two ops

CASES = {
    "3x3": Case("", 2, 40, (13, 18)),
    "3x3_stride2": Case("", 3, 24, (13, 16), stride=(2, 2)),
    "5x5": Case("", 2, 16, (9, 12), (5, 5)),
    "5x5_stride2": Case("", 2, 48, (14, 16), (5, 5), (2, 2)),
    "several_tiles": Case("", 1, 8, (70, 64)),
    "odd_planes": Case("", 3, 16, (7, 7)),
    "ten_planes": Case("", 1, 10, (8, 12)),
    "one_pixel": Case("", 4, 8, (1, 1)),
    "odd_channels": Case("", 2, 7, (8, 9)),  # the rest have no kernel of their own
    "7x7": Case("", 1, 8, (9, 9), (7, 7)),
    "multiplier": Case("", 2, 4, (7, 8), multiplier=2),
}
ops = torch.ops.dwconv_ext


@pytest.mark.parametrize("kernels", ANYWHERE, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_mean(kernels, case, dtype, layout):
    for _ in kernels.gpus(ONE_SM):
        check_pooled(CASES[case].tensors(dtype, layout), CASES[case].conv, "hardswish", kernels.device)


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(kernels, act, layout):
    for dtype in (torch.float16, torch.float32):
        x, w, b = CASES["3x3"].tensors(dtype, layout)
        check_pooled((x, w, b if dtype == torch.float32 else None), CASES["3x3"].conv, act, kernels.device)


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["3x3", "3x3_stride2", "several_tiles"])
def test_one_pass(kernels, case, layout):
    """Nothing but the convolution's kernel reads the output's planes."""
    if kernels.emulator is None:
        pytest.skip("the emulator notes launches")
    x, w, b = CASES[case].tensors(torch.float16, layout)
    kernels.emulator.launches()
    ops.depthwise_conv2d_pooled(x, w, b, *CASES[case].conv.args(), "silu", 0.0)
    names = [launch["name"] for launch in kernels.emulator.launches()]
    assert names == [f"depthwise_rows_statistics_{'nchw' if layout == 'nchw' else 'nhwc'}", "join_means"]


@pytest.mark.parametrize("kernels", ANYWHERE, indirect=True)
def test_an_empty_batch(kernels):
    x, w = torch.zeros(0, 8, 5, 5, device=kernels.device), torch.ones(8, 1, 3, 3, device=kernels.device)
    y, mean = ops.depthwise_conv2d_pooled(x, w, None, (1, 1), (1, 1), (1, 1))
    assert y.shape == (0, 8, 5, 5) and mean.shape == (0, 8, 1, 1)
