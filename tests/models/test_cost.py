"""Parameters and multiply-adds."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dwconv_ext import DepthwiseConv2d, FusedDSConv, convert, cost, depthwise_conv2d, models


def test_worked_examples():
    """3x3, 3 to 4 channels: 108 parameters; 27 depthwise; 12 pointwise, 768 multiply-adds at 8x8."""
    assert cost.standard(3, 3, 4).parameters == 108
    assert cost.depthwise(3, 3).parameters == 27
    assert cost.pointwise(3, 4, 8) == (12, 768)
    assert cost.separable(3, 3, 4) == (39, 39)
    assert cost.separable_ratio(3, 4) == pytest.approx(39 / 108) == pytest.approx(1 / 4 + 1 / 9)


@pytest.mark.parametrize("kernel, m, n, size", [(3, 512, 512, 14), ((1, 11), 24, 12, (7, 9)), (7, 96, 384, 56)])
def test_formulas_count_what_modules_have(kernel, m, n, size):
    modules = {
        "standard": (nn.Conv2d(m, n, kernel, bias=False), cost.standard(kernel, m, n, size)),
        "depthwise": (nn.Conv2d(m, m, kernel, groups=m, bias=False), cost.depthwise(kernel, m, size)),
        "pointwise": (nn.Conv2d(m, n, 1, bias=False), cost.pointwise(m, n, size)),
    }
    for module, counted in modules.values():
        assert counted.parameters == sum(p.numel() for p in module.parameters())
        pad = [module.kernel_size[0] - 1, module.kernel_size[1] - 1]
        height, width = (size, size) if isinstance(size, int) else size
        x = torch.empty(1, m, height + pad[0], width + pad[1], device="meta")
        with FlopCounterMode(display=False) as counter:
            module.to("meta")(x)
        assert counter.get_total_flops() == 2 * counted.multiply_adds
    both = cost.separable(kernel, m, n, size)
    assert both == tuple(a + b for a, b in zip(modules["depthwise"][1], modules["pointwise"][1], strict=True))
    assert both.multiply_adds / modules["standard"][1].multiply_adds == pytest.approx(cost.separable_ratio(kernel, n))


def test_flop_counter_counts_our_ops_like_torchs():
    x = torch.randn(2, 8, 9, 9)
    w, b = torch.randn(16, 1, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
    for bias in (None, b):
        with FlopCounterMode(display=False) as ours:
            depthwise_conv2d(x.requires_grad_(), w, bias, padding=1).sum().backward()
        assert ours.get_total_flops() == 3 * 2 * 2 * 16 * 81 * 9  # forward and two gradients; a bias's is none
    block = FusedDSConv(8, 24).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * 2 * cost.separable(3, 8, 24, 9).multiply_adds


def test_flop_counter_counts_a_converted_model_like_the_original():
    stem = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 32, 3, groups=32))
    stem.eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 8, 40, 40).contiguous(memory_format=torch.channels_last)
    flops = []
    for model in (stem, convert(stem)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 2 * 32 * 8 * 9 * 1600


def test_table():
    model = nn.Sequential(DepthwiseConv2d(8, 8, 3, padding=1), FusedDSConv(8, 16), nn.Flatten(), nn.Linear(16 * 36, 5))
    table = cost.table(model, (2, 8, 6, 6))
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["0", "1.depthwise", "1.bn1", "1.pointwise", "1.bn2", "3"]
    assert rows["0"].kernel.startswith("depthwise_forward_nchw")
    assert rows["1.depthwise"].kernel.startswith("separable_forward_nchw") and rows["1.pointwise"].kernel == "(the same)"
    assert rows["3"].kernel == "" and rows["3"].output == (2, 5)
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert rows["1.pointwise"].multiply_adds == 2 * 8 * 16 * 36
    assert rows["1.bn1"].multiply_adds == rows["1.bn2"].multiply_adds == 0  # folded, and in no paper's count
    text = str(table).splitlines()
    assert text[0].split() == ["name", "layer", "output", "parameters", "multiply-adds", "kernel"]
    assert f"{table.parameters:,}" in text[-1] and len(text) == len(rows) + 4


def test_table_of_a_converted_model_counts_the_same():
    plain = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    ).eval()
    a, b = cost.table(plain, (1, 8, 7, 7)), cost.table(convert(plain), (1, 8, 7, 7))
    assert (a.parameters, a.multiply_adds) == (b.parameters, b.multiply_adds)
    assert [r.kernel for r in a.rows] == [""] * 4 and b.rows[0].kernel.startswith("depthwise")


def test_table_without_torchinfo(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchinfo", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchinfo"):
        cost.table(models.DWConv(3, 4, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cost.standard(0, 3, 4), "kernel must be positive"),
        (lambda: cost.standard("3", 3, 4), "cost.standard: kernel must be an int or a pair of ints, but got '3'"),
        (lambda: cost.standard(3, (3, 4), 4), r"cost.standard: in_channels must be a positive int, but got \(3, 4\)"),
        (lambda: cost.depthwise(3, -1), "cost.depthwise: in_channels must be a positive int, but got -1"),
        (lambda: cost.depthwise(3, (3, 4)), "in_channels must be a positive int"),
        (lambda: cost.pointwise(3, 4, (0, 2)), r"cost.pointwise: out_size must be positive, but got \(0, 2\)"),
        (lambda: cost.separable_ratio(3, 0), "out_channels must be a positive int, but got 0"),
        (lambda: cost.separable_ratio(3, (4, 5)), "cost.separable_ratio: out_channels must be a positive int"),
        (lambda: cost.table(None), "cost.table: model must be an nn.Module, but got NoneType"),
        (lambda: cost.table(nn.Identity(), 8), "cost.table: input must be a Tensor or a shape, but got 8"),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
