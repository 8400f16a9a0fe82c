"""Squeeze-and-excitation under torch.compile(model, backend="dwconv_ext"): what is found, what is not, and the plain results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised
from small_models import assert_same, check, fast, fused, picture
from torch import nn

from dwconv_ext.nn.folded_pooled import FoldedPooled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


MEANS = {
    "method": lambda x: x.mean((2, 3), keepdim=True),
    "negative": lambda x: x.mean(dim=(-2, -1), keepdim=True),
    "function": lambda x: torch.mean(x, [2, 3], keepdim=True),
    "pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "pool_pair": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
}


class Squeeze(nn.Module):
    """As timm, torchvision and people write it: `style` says how the mean is taken, `gate` what opens."""

    def __init__(self, style="method", gate=torch.sigmoid, act=None, channels=16):
        super().__init__()
        self.style, self.gate, self.act = style, gate, act or nn.SiLU(inplace=True)
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def open(self, x):
        return self.gate(self.expand(self.act(self.reduce(MEANS[self.style](x)))))

    def forward(self, x):
        return x * self.open(x)


class Block(nn.Module):
    """depthwise - BN - act - squeeze - pointwise - BN, as in EfficientNet."""

    def __init__(self, squeeze):
        super().__init__()
        self.depthwise, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze = squeeze
        self.pointwise, self.bn2 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)

    def forward(self, x):
        x = F.silu(self.bn1(self.depthwise(x)))
        return self.bn2(self.pointwise(self.squeeze(x)))


ALL = {"depthwise convolutions": 1, "squeeze-and-excitations": 1, "pointwise convolutions": 1}


@pytest.mark.parametrize("style", MEANS)
@pytest.mark.parametrize("gate", (torch.sigmoid, F.hardsigmoid, nn.Sigmoid(), nn.Hardsigmoid(inplace=True), torch.Tensor.sigmoid))
def test_styles(style, gate):
    check(randomised(Block(Squeeze(style, gate))), picture(), wanted=ALL)


@pytest.mark.parametrize("act", (nn.ReLU(inplace=True), nn.Identity(), nn.Hardswish(), nn.LeakyReLU(0.3)))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_activations_and_layouts(act, layout):
    model = randomised(Block(Squeeze(act=act))).to(memory_format=layout)
    x = picture(2).contiguous(memory_format=layout)
    compiled = check(model, x, wanted=ALL)
    with torch.no_grad():
        assert compiled(x).stride() == model(x).stride()


def test_the_factor_before_the_picture():
    squeeze = Squeeze()
    squeeze.forward = lambda x: squeeze.open(x) * x
    check(randomised(Block(squeeze)), picture(), wanted=ALL)


def test_a_gate_that_is_used_again():
    squeeze, kept = Squeeze(), []

    def forward(x):
        kept.append(gate := squeeze.open(x))
        return x * gate

    squeeze.forward = forward
    model, x = randomised(Block(squeeze)), picture()
    with torch.no_grad():
        assert_same(fast(model)(x), model(x))
    assert_same(kept[0], kept[1])


class Before(nn.Module):
    def __init__(self, squeeze, change):
        super().__init__()
        self.squeeze, self.change, self.pointwise = squeeze, change, nn.Conv2d(16, 24, 1)

    def forward(self, x):
        return self.change(self, x + 0.0)


def written_to(m, x):
    y = m.squeeze(x)
    x.mul_(2)  # after the product was taken
    return m.pointwise(y) + x[:, :1]


def written_between(m, x):
    gate = m.squeeze.open(x)
    x.add_(1)
    return m.pointwise(x * gate)


def product_used_twice(m, x):
    y = m.squeeze(x)
    return m.pointwise(y) + y[:, :1]


def mean_used_twice(m, x):
    mean = x.mean((2, 3), keepdim=True)
    gate = torch.sigmoid(m.squeeze.expand(F.relu(m.squeeze.reduce(mean))))
    return m.pointwise(x * gate) + mean[:, :1]


def no_convolution_follows(m, x):
    return F.relu(m.squeeze(x))


def in_place_product(m, x):
    gate = m.squeeze.open(x)
    return m.pointwise(x.mul_(gate)) + x[:, :1]


def another_factor(m, x):
    return m.pointwise(x * x[:, :, :1, :1])


def without_keepdim(m, x):
    gate = torch.sigmoid(F.linear(x.mean((2, 3)), m.squeeze.reduce.weight.flatten(1)).sum(1))
    return m.pointwise(x * gate[:, None, None, None])


def over_rows(m, x):
    return m.pointwise(x * m.squeeze.open(x.mean(2, keepdim=True)))


@pytest.mark.parametrize("change", (
    written_to, written_between, product_used_twice, mean_used_twice, no_convolution_follows, in_place_product, another_factor,
    without_keepdim, over_rows,
))  # fmt: skip
def test_values_that_are_used_or_written_elsewhere(change):
    model, x = Before(Squeeze(), change).eval(), picture()
    with torch.no_grad():
        assert_same(fast(model)(x), model(x))


def test_autocast_and_dtypes():
    model, x = randomised(Block(Squeeze())), picture()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fast(model)(x), model(x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        torch._dynamo.reset()
        narrow, x = randomised(Block(Squeeze())).to(dtype), picture().to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(fast(narrow)(x), narrow(x), rtol=tolerance, atol=tolerance)


def test_weights_that_change():
    model, x = randomised(Block(Squeeze())), picture()
    compiled = fast(model)
    with torch.no_grad():
        for change in (lambda p: p.mul_(2), lambda p: p.data.add_(0.5), lambda p: p.copy_(torch.rand_like(p))):
            compiled(x)
            for p in (model.squeeze.reduce.weight, model.squeeze.expand.weight, model.squeeze.expand.bias):
                change(p)
            assert_same(compiled(x), model(x))


def test_training_and_changing_sizes():
    model = randomised(Block(Squeeze()))
    compiled = fast(model, dynamic=True)
    for size in ((1, 16, 8, 8), (3, 16, 9, 12), (2, 16, 1, 1), (0, 16, 8, 8)):
        x = torch.randn(size)
        with torch.no_grad():
            assert_same(compiled(x), model(x))
    x = picture().requires_grad_()
    compiled(x).sum().backward()
    ours, x.grad = x.grad, None
    model(x).sum().backward()
    assert_same(ours, x.grad)
    assert fused() is not None


class Pooled(nn.Module):
    """depthwise - BN - act, and the mean over its pixels."""

    def __init__(self, keepdim=True, act=F.hardswish, change=None):
        super().__init__()
        self.depthwise, self.bn = nn.Conv2d(16, 32, 3, 2, 1, groups=16), nn.BatchNorm2d(32)
        self.keepdim, self.act, self.change = keepdim, act, change

    def forward(self, x):
        y = self.act(self.bn(self.depthwise(x)))
        if self.change is not None:
            y = self.change(y)
        mean = y.mean((2, 3), keepdim=self.keepdim)
        return y, mean, y * mean.reshape(len(x), -1, 1, 1)


@pytest.fixture
def pooled_here(monkeypatch):
    """On the CPU, where the op is two."""
    monkeypatch.setattr("dwconv_ext.compile.poolings.POOLED", ("cpu",))


BOTH = {"depthwise convolutions": 1, "poolings": 1}


@pytest.mark.parametrize("options", ({}, {"base": "aot_eager"}, {"freeze": True}), ids=str)
@pytest.mark.parametrize("keepdim", (True, False))
def test_a_depthwise_layer_with_its_mean(keepdim, options, pooled_here, monkeypatch):
    calls, pooled = [], FoldedPooled.pooled
    monkeypatch.setattr(FoldedPooled, "pooled", lambda *operands: calls.append(len(operands)) or pooled(*operands))
    check(randomised(Pooled(keepdim)), picture(2), wanted=BOTH, options=options)
    assert calls


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("act", (F.relu, F.silu, nn.Identity()))
def test_a_mean_with_other_activations_and_layouts(act, layout, pooled_here):
    check(randomised(Pooled(act=act)), picture(2).contiguous(memory_format=layout), wanted=BOTH)


def test_a_squeeze_begins_with_its_depthwise_layer(pooled_here):
    check(randomised(Block(Squeeze())), picture(), wanted={**BOTH, "pointwise convolutions": 3})


def through_a_view(y):
    y.flatten().mul_(2)
    return y


@pytest.mark.parametrize("change", (lambda y: y.add_(1), lambda y: y + 1, lambda y: y[:, :, 1:], through_a_view))
def test_a_mean_of_something_else(change, pooled_here):
    model, x = randomised(Pooled(change=change)), picture(2)
    with torch.no_grad():
        assert_same(fast(model)(x), model(x))
