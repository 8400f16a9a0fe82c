"""convert folds BatchNorms into the convolutions before them, in eval mode, and leaves no other trace of it."""

from __future__ import annotations

import pytest
import torch
import torchvision
from blocks import Recorded, randomised
from torch import nn

from dwconv_ext import convert, unfuse


class Squeezed(nn.Module):
    """Squeeze-and-excitation between the convolutions; the expansion and the projection have BatchNorms."""

    def __init__(self, conv=nn.Conv2d, act=nn.SiLU):
        super().__init__()
        self.expand = nn.Sequential(conv(16, 32, 1, bias=False), nn.BatchNorm2d(32), act())
        self.depthwise = nn.Sequential(conv(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), act())
        self.gate = nn.Conv2d(32, 32, 1)
        self.project = nn.Sequential(conv(32, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return x + self.project(y)


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU6, nn.Hardswish, nn.GELU, lambda: nn.LeakyReLU(0.3), nn.Identity])
def test_batch_norms_are_folded_into_the_other_convolutions(act):
    """In eval mode alone, without a trace of it in the model, whether gradients are wanted or not."""
    model = randomised(Squeezed(act=act))
    converted = convert(model)
    entry = converted.conversion_report.entries[0]
    assert entry.became == "DepthwiseConv2d" and "depthwise.1" in entry.why and "is used 2 times" in entry.why
    assert list(converted.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 16, 9, 9)
    for layout in (torch.contiguous_format, torch.channels_last):
        calls = []
        with torch.no_grad(), Recorded(calls):
            y = converted(x.contiguous(memory_format=layout))
        assert not any("batch_norm" in call for call in calls) and calls.count("depthwise_conv2d") == 1
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    gradients = []
    for m in (model, converted):
        a = x.clone().requires_grad_()
        m(a).square().sum().backward()
        gradients.append([a.grad, *(p.grad.clone() for p in m.parameters())])
        m.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    for m in (model, converted):
        m.train()
        torch.manual_seed(0)
        m(x)
    calls = []
    with torch.no_grad(), Recorded(calls):
        converted(x)
    assert sum("batch_norm" in call for call in calls) == 3
    for m in (model, converted):
        m.eval()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    plain = unfuse(converted)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]


def test_a_folded_batch_norm_follows_its_parameters_hooks_and_replacements():
    converted = convert(randomised(Squeezed()))
    plain = unfuse(converted)  # the same parameters
    x = torch.randn(1, 16, 6, 6)

    def same():
        with torch.no_grad():
            torch.testing.assert_close(converted(x), plain(x), rtol=1e-4, atol=1e-5)

    same()
    with torch.no_grad():
        plain.expand[1].weight.mul_(2)
        plain.depthwise[1].running_mean.add_(1)
    same()
    converted.expand[1].eps = plain.expand[1].eps = 0.1
    same()
    seen = []
    handle = converted.expand[1].register_forward_hook(lambda m, i, o: seen.append(o))
    same()
    handle.remove()
    assert len(seen) == 1
    converted.expand[2] = plain.expand[2] = nn.Tanh()
    same()
    converted.project[0] = plain.project[0] = nn.Conv2d(32, 16, 1)
    same()


def test_a_convolution_that_computes_in_its_own_way_keeps_its_batch_norm():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    model = randomised(Squeezed(Own))
    model.depthwise[0] = nn.Conv2d(32, 32, 3, padding=1, groups=32).eval()
    converted = convert(model)
    x = torch.randn(1, 16, 6, 6)
    calls = []
    with torch.no_grad(), Recorded(calls):
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum("batch_norm" in call for call in calls) == 2 + 3  # expansion and projection; the model itself


def test_batch_norms_away_from_depthwise_convolutions_are_folded_once():
    """Stems and heads too, but for what a fused block or a rewritten forward holds; nothing where there is no depthwise one."""
    converted = convert(torchvision.models.mobilenet_v2())
    again = convert(converted)
    assert converted.conversion_report.folded == again.conversion_report.folded == 18
    assert "BatchNorm folded into 18 others" in str(again.conversion_report)
    calls = []
    with torch.no_grad(), Recorded(calls):
        converted.eval()(torch.randn(1, 3, 64, 64))
    assert not any("batch_norm" in call for call in calls)
    plain = convert(torchvision.models.resnet18())
    assert plain.conversion_report.folded == 0 and not any("fused" in m._modules for m in plain.modules())
