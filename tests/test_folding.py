"""convert folds BatchNorms into the convolutions before them, and packs what runs on oneDNN, and leaves no other trace of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from blocks import Recorded, randomised
from torch import nn
from torch.nn.utils import parametrizations, prune

from dwconv_ext import convert, unfuse
from dwconv_ext.onednn import PackedLinear

pytestmark = pytest.mark.isa
# oneDNN multiplies bfloat16 where the processor can and ONEDNN_MAX_CPU_ISA lets it; elsewhere such layers are torch's.
BFLOAT16_PACKS = torch.ops.mkldnn._is_mkldnn_bf16_supported()


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


# ---- other convolutions by oneDNN, packed -----------------------------------------------------------------------------


def stem(act=nn.ReLU, dtype=torch.float32, stride=2):
    """A convolution that is worth packing, before a depthwise one."""
    layers = [nn.Conv2d(16, 40, 3, stride, 1), nn.BatchNorm2d(40), act(), nn.Conv2d(40, 40, 3, 1, 1, groups=40)]
    return randomised(nn.Sequential(*layers)).to(dtype).to(memory_format=torch.channels_last)


def calls_of(model, x):
    calls = []
    with torch.no_grad(), Recorded(calls):
        y = model(x)
    return y, calls


def gelu_tanh():
    return nn.GELU(approximate="tanh")


def leaky():
    return nn.LeakyReLU(0.3)


ACTS = [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.GELU, gelu_tanh, leaky, nn.Identity]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_in_channels_last_other_convolutions_are_packed_with_their_activation(act, dtype):
    model = stem(act, dtype)
    converted = convert(model)
    limit = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for size in ((2, 16, 31, 33), (1, 16, 40, 40), (2, 16, 31, 33)):  # packed anew where the shape is another
        x = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
        y, calls = calls_of(converted, x)
        if dtype == torch.float32 or BFLOAT16_PACKS:
            packed = ["_convolution_pointwise", "depthwise_conv2d"]
            assert calls[-3:] == ["_reorder_convolution_weight", *packed]
            assert calls_of(converted, x)[1] == packed
        else:
            assert "_convolution_pointwise" not in calls and calls.count("depthwise_conv2d") == 1
            assert not any("batch_norm" in call for call in calls)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, model(x), **limit)


def test_packed_weights_follow_their_parameters():
    converted = convert(stem())
    plain = unfuse(converted)
    x = torch.randn(1, 16, 40, 40).contiguous(memory_format=torch.channels_last)
    for change in (lambda: None, lambda: converted[0].weight.mul_(2), lambda: converted[1].running_mean.add_(1)):
        with torch.no_grad():
            change()
            torch.testing.assert_close(converted(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_is_not_packed():
    """Where torch's output is NCHW; gradients; autocast; little work; padding by a word; torch without oneDNN."""
    converted = convert(stem())
    x = torch.randn(1, 16, 40, 40)
    last = x.contiguous(memory_format=torch.channels_last)
    assert "_convolution_pointwise" in calls_of(converted, last)[1]
    y, calls = calls_of(converted, x)  # its weights are channels_last
    assert "_convolution_pointwise" in calls and y.is_contiguous(memory_format=torch.channels_last)
    y, calls = calls_of(convert(copy.deepcopy(unfuse(converted)).to(memory_format=torch.contiguous_format)), x)
    assert "_convolution_pointwise" not in calls and y.is_contiguous()
    assert "_convolution_pointwise" not in calls_of(converted, last[:, :, :9, :9])[1]
    with torch.autocast("cpu", torch.bfloat16):
        y, calls = calls_of(converted, last)
    assert "_convolution_pointwise" not in calls and y.dtype == torch.bfloat16
    wanted = last.clone().requires_grad_()
    converted.requires_grad_(False)(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert "_convolution_pointwise" not in calls_of(converted, last)[1]
    same = stem(stride=1)
    same[0].padding = "same"
    y, calls = calls_of(convert(same), last)
    assert "_convolution_pointwise" not in calls
    torch.testing.assert_close(y, same(last), rtol=1e-4, atol=1e-4)


def test_a_packed_convolution_follows_its_settings():
    converted = convert(stem().requires_grad_(False))
    x = torch.randn(1, 16, 40, 40).contiguous(memory_format=torch.channels_last)
    converted(x)
    converted[0].padding = (0, 0)
    torch.testing.assert_close(converted(x), unfuse(converted)(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        converted(torch.randn(1, 16, 1, 4000).contiguous(memory_format=torch.channels_last))


def test_what_does_not_fit_a_packed_convolution_gets_torchs_error():
    model = convert(stem().requires_grad_(False))
    model[0].padding = (0, 0)
    for size, message in (
        ((1, 24, 40, 40), "to have 16 channels, but got 24"),
        ((1, 16, 1, 4000), "Kernel size can't be greater"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model(torch.randn(size).contiguous(memory_format=torch.channels_last))


# ---- linear layers ----------------------------------------------------------------------------------------------------


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, groups=64), nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 8)]
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_are_packed_once(dtype):
    packs = dtype == torch.float32 or BFLOAT16_PACKS
    model = classifier(dtype)
    converted = convert(model)
    assert converted.conversion_report.packed == 2 and "2 linear layers packed" in str(converted.conversion_report)
    for batch in (4, 9):
        x = torch.randn(batch, 64, 6, 6).to(dtype)
        y, calls = calls_of(converted, x)
        assert ("_reorder_linear_weight" in calls) == (packs and batch == 4)
        assert calls.count("_linear_pointwise") == packs and calls.count("addmm") == 2 - packs  # the second is too small
        torch.testing.assert_close(y, model(x), **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [type(m) for m in unfuse(converted)] == [type(m) for m in model] and "_kept" not in unfuse(converted)[2].__dict__


@pytest.mark.parametrize("shape", [(2, 40, 512), (2, 7, 7, 512), (1, 1, 1, 1500, 512), (1500, 512)])
def test_linear_layers_of_any_rank(shape):
    linear = nn.Linear(512, 24, bias=False)
    packed = copy.deepcopy(linear)
    packed.__class__ = PackedLinear
    for x in (torch.randn(shape), torch.randn(*shape[:-2], shape[-1], shape[-2]).mT):
        (y, calls), want = calls_of(packed, x), linear(x)
        assert "_linear_pointwise" in calls and y.stride() == want.stride()
        torch.testing.assert_close(y, want)


def test_packed_linear_weights_follow_their_parameters():
    converted = convert(classifier())
    x = torch.randn(4, 64, 6, 6)
    linear = converted[2]
    changes = {
        "nothing": lambda: None,
        "in place": lambda: linear.weight.mul_(2),
        "data": lambda: setattr(linear.weight, "data", torch.randn(512, 1024)),
        "replaced": lambda: setattr(linear, "weight", nn.Parameter(torch.randn(512, 1024))),
        "bias": lambda: linear.bias.add_(1),
        "copied": lambda: converted.__setitem__(2, copy.deepcopy(linear)),
        "inference": lambda: setattr(linear, "weight", nn.Parameter(torch.randn(512, 1024))),
    }
    for name, change in changes.items():
        with torch.inference_mode(name == "inference"), torch.no_grad():
            change()
            torch.testing.assert_close(converted(x), unfuse(converted)(x), msg=name)
            assert pickle.loads(pickle.dumps(converted[2]))._kept is None


def test_computed_linear_weights_are_left_to_torch():
    for change in (parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        model = classifier()
        converted = convert(model)
        x = torch.randn(4, 64, 6, 6)
        for linear in (model[2], converted[2]):
            change(linear)
        y, calls = calls_of(converted, x)
        assert "_linear_pointwise" not in calls
        torch.testing.assert_close(y, model(x))


def test_linear_layers_that_are_not_packed():
    converted = convert(classifier())
    x = torch.randn(4, 64, 6, 6)

    def packed(input=x):
        return "_linear_pointwise" in calls_of(converted, input)[1]

    assert packed()
    with torch.autocast("cpu", torch.bfloat16):
        assert not packed()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packed()
    converted.double()
    assert not packed(x.double())
    converted.float()
    converted(x).sum().backward()  # nothing fails, and the gradients come
    assert converted[2].weight.grad is not None
    torch.func.vmap(converted)(x[None])
    torch.testing.assert_close(torch.compile(converted, backend="aot_eager", fullgraph=True)(x), converted(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        converted[2](torch.randn(4, 1000))
    assert convert(nn.Sequential(nn.Linear(512, 512))).conversion_report.packed == 0  # nothing depthwise in it
