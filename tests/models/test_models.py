"""The models against their plain-torch twins, torchvision, and the papers' numbers."""

from __future__ import annotations

import plain_models
import pytest
import torch
import torchvision
from blocks import Recorded, randomised
from cases import LAYOUTS
from torch import nn

import dwconv_ext
from dwconv_ext import FusedDSConv, cost, models

PAIRS = {
    "MobileNetV1": (lambda: models.MobileNetV1(10), lambda: plain_models.MobileNetV1(10), (2, 3, 64, 64)),
    "MobileNetV1 x0.5": (lambda: models.MobileNetV1(7, 0.5), lambda: plain_models.MobileNetV1(7, 0.5), (2, 3, 96, 64)),
    "MobileNetV2": (lambda: models.MobileNetV2(10), lambda: plain_models.MobileNetV2(10), (2, 3, 64, 64)),
    "DWConv": (lambda: models.DWConv(16, 24, 5, 2), lambda: plain_models.DWConv(16, 24, 5, 2), (2, 16, 13, 12)),
    "DWConv relu": (lambda: models.DWConv(8, 8, 3, 1, "relu"), lambda: plain_models.DWConv(8, 8, 3, 1, "relu"), (1, 8, 9, 9)),
    "DWConv lrelu": (lambda: models.DWConv(8, 9, 3, 1, "lrelu"), lambda: plain_models.DWConv(8, 9, 3, 1, "lrelu"), (1, 8, 9, 9)),
}


def pair(name):
    make, make_plain, shape = PAIRS[name]
    torch.manual_seed(0)
    plain = make_plain()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    randomised(plain)
    ours = make().eval()
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    return ours, plain, torch.randn(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_the_plain_twin(name, layout):
    ours, plain, x = pair(name)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        y, want = ours(x), plain(x)
    assert (y - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", ["MobileNetV1 x0.5", "MobileNetV2", "DWConv"])
def test_gradients_equal_the_plain_twin(name):
    ours, plain, x = pair(name)
    for model in (ours, plain):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        model.double()(x.double()).square().mean().backward()
    for (key, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (q.grad - p.grad).abs().max() <= 1e-9 * p.grad.abs().max() + 1e-12, key


def test_mobilenet_v1_of_the_paper():
    model = models.MobileNetV1()
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    assert sum(isinstance(m, FusedDSConv) for m in model.modules()) == 13
    table = cost.table(model)
    assert table.parameters == 4_231_976
    assert round(table.multiply_adds / 1e6) == 569  # table 8
    outputs = [row.output for row in table.rows if row.name.endswith("pointwise")]
    sizes = [(64, 112), (128, 56), (128, 56), (256, 28), (256, 28), *[(512, 14)] * 6, (1024, 7), (1024, 7)]
    assert outputs == [(1, c, s, s) for c, s in sizes]


# table 6 and 7: million multiply-adds and parameters
@pytest.mark.parametrize(
    "alpha, resolution, adds, parameters",
    [
        (0.75, 224, 325, 2.6),
        (0.5, 224, 149, 1.3),
        (0.25, 224, 41, 0.5),
        (1.0, 192, 418, 4.2),
        (1.0, 160, 290, 4.2),
        (1.0, 128, 186, 4.2),
    ],
)
def test_mobilenet_v1_width_and_resolution(alpha, resolution, adds, parameters):
    table = cost.table(models.MobileNetV1(width_multiplier=alpha, resolution=resolution))
    assert table.multiply_adds / 1e6 == pytest.approx(adds, rel=0.02)
    assert table.parameters / 1e6 == pytest.approx(parameters, abs=0.06)


@pytest.mark.parametrize("alpha", [0.35, 0.5, 1.0, 1.4])
def test_mobilenet_v2_is_torchvisions(alpha):
    theirs = torchvision.models.mobilenet_v2(width_mult=alpha)
    randomised(theirs)
    ours = models.MobileNetV2(width_multiplier=alpha).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert ours.conversion_report.count("fused block") == 17
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = theirs(x)
        assert (ours(x) - want).abs().max() <= 1e-4 * want.abs().max()


def test_an_inverted_residual_is_one_op():
    calls, block = [], dwconv_ext.InvertedResidual(16, 24, 2, 6).eval()
    with torch.no_grad(), Recorded(calls):
        block(torch.randn(1, 16, 9, 9))
    assert calls.count("inverted_residual") == 1 and not {"pointwise_conv2d", "separable_conv2d_packed"} & set(calls)


def test_shortcut_only_where_it_can_be():
    assert models.InvertedResidual(16, 16, 1, 6).use_shortcut
    assert not models.InvertedResidual(16, 16, 2, 6).use_shortcut
    assert not models.InvertedResidual(16, 24, 1, 6).use_shortcut


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: models.MobileNetV1(0), "num_classes must be a positive int"),
        (lambda: models.MobileNetV1(width_multiplier=-1), "width_multiplier must be a positive number"),
        (lambda: models.MobileNetV1(resolution=100), "resolution must be a multiple of 32, but got 100"),
        (lambda: models.MobileNetV2(2.5), "num_classes must be a positive int"),
        (lambda: models.InvertedResidual(8, 8, 3, 1), "stride must be 1 or 2, but got 3"),
        (lambda: models.DWConv(8, 8, 4), "ksize must be odd, but got 4"),
        (lambda: models.DWConv(8, 8, 3, act="tanh"), "act must be one of silu, relu, lrelu, but got 'tanh'"),
        (lambda: models.DWConv(8, 8, 3, act=["silu"]), r"DWConv: act must be one of silu, relu, lrelu, but got \['silu'\]"),
        (lambda: models.DWConv(8, -8, 3), "out_channels must be a positive int, but got -8"),
        (lambda: models.InvertedResidual(0, 4, 1, 6), "InvertedResidual: in_channels must be a positive int, but got 0"),
        (lambda: models.InvertedResidual(4, 4, 1, 0), "InvertedResidual: expand_ratio must be a positive number, but got 0"),
        (lambda: models.MobileNetV1(dropout="a"), "MobileNetV1: dropout must be a number between 0 and 1, but got 'a'"),
        (lambda: models.MobileNetV2(dropout=1.5), "MobileNetV2: dropout must be a number between 0 and 1, but got 1.5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
