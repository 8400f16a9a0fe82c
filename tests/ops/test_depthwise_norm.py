"""depthwise_norm_act_backward, and a depthwise convolution with its BatchNorm and activation in training, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case
from implementations import CUDA, ONE_SM
from reference import check_depthwise_norm, check_depthwise_norm_forward

from dwconv_ext.ops.activations import ACTIVATIONS

PLAIN = ((1, 1), (0, 0), (1, 1))
CASES = {
    "3x3": Case("", 2, 40, (13, 18)),
    "3x3_stride2": Case("", 3, 24, (12, 15), stride=(2, 2)),
    "3x3_stride2_odd": Case("", 1, 72, (13, 14), stride=(2, 2)),
    "5x5": Case("", 2, 16, (9, 11), (5, 5)),
    "5x5_stride2": Case("", 2, 48, (14, 13), (5, 5), (2, 2)),
    "few_rows": Case("", 4, 8, (2, 3)),
    "odd_channels": Case("", 2, 7, (8, 9)),  # the rest have no kernel of their own
    "7x7": Case("", 1, 8, (9, 9), (7, 7)),
    "multiplier": Case("", 2, 4, (7, 8), multiplier=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(kernels, case, dtype, layout):
    x, w, _ = CASES[case].tensors(dtype, layout)
    for _ in kernels.gpus(ONE_SM):
        for _ in kernels.fusions():
            check_depthwise_norm(x, w, CASES[case].conv, "relu", device=kernels.device)
            check_depthwise_norm_forward(x, w, CASES[case].conv, "relu", device=kernels.device)


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_channel_of_one_value_has_no_variance(kernels, dtype):
    """Its values are what was rounded, and so is their mean: an exact mean would be apart from all of them."""
    x = torch.full((2, 16, 12, 14), 3.0, dtype=dtype).contiguous(memory_format=torch.channels_last).to(kernels.device)
    w = torch.full((16, 1, 3, 3), 1.1, dtype=dtype, device=kernels.device)
    _, middle, mean, variance = torch.ops.dwconv_ext.depthwise_norm_act(x, w, None, None, *PLAIN, 1e-5, "relu", 0.0)
    assert (middle == middle[0, 0, 0, 0]).all()
    assert torch.equal(mean, middle[0, :, 0, 0].to(mean)) and not variance.any()


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(kernels, act):
    x, w, _ = CASES["3x3"].tensors(torch.float32, "channels_last")
    for _ in kernels.fusions():
        check_depthwise_norm(x, w, CASES["3x3"].conv, act, affine=act != "silu", device=kernels.device)
