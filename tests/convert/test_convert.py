"""convert and unfuse: the same outputs, gradients, keys and behaviour, on blocks as people write them."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from blocks import Recorded, randomised, sequential
from torch import nn

import dwconv_ext
from dwconv_ext import DepthwiseConv2d, FusedDSConv, convert, unfuse


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


class Functional(nn.Module):
    """F.relu, a shortcut, and an argument with a default that changes the flow."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.pw, self.bn2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x, extra=None):
        y = self.bn2(self.pw(F.relu(self.bn1(self.dw(x)))))
        y = y if extra is None else y * extra
        return x + F.relu(y)


class Looks(nn.Module):
    """Can't be traced: looks at the data. Its child is a container all the same."""

    def __init__(self):
        super().__init__()
        self.block = sequential(16, 16)

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else self.block(-x)


class Named(nn.Sequential):
    """A subclass with a constructor of its own and nn.Sequential's forward, as torchvision's Conv2dNormActivation."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.out_channels = 24


BLOCKS = {
    "sequential": (sequential, 1),
    "linear": (lambda: sequential(last=False), 1),
    "hardswish": (lambda: sequential(act=nn.Hardswish), 1),
    "leaky": (lambda: sequential(act=lambda: nn.LeakyReLU(0.3)), 1),
    "two": (lambda: nn.Sequential(sequential(16, 16), sequential(16, 8)), 2),
    "flat": (lambda: nn.Sequential(*sequential(16, 16), *sequential(16, 8)), 2),
    "nested": (lambda: nn.Sequential(nn.Sequential(*sequential()[:3]), Named(*sequential()[3:])), 1),
    "dropout": (lambda: nn.Sequential(*sequential()[:2], nn.Dropout(), *sequential()[2:]), 1),
    "looks": (Looks, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_fused(name):
    make, blocks = BLOCKS[name]
    model = make().eval()
    converted = convert(model)
    assert converted.conversion_report.count("fused block") == blocks
    x = torch.randn(2, 16, 9, 9)
    calls = []
    with torch.no_grad(), Recorded(calls):
        y = converted(x)
    assert calls.count("separable_conv2d_packed") == blocks and "depthwise_conv2d" not in calls
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_other_forwards_stay():
    """Blocks outside of sequential containers keep their forward; their depthwise convolutions run on our kernels."""
    model = randomised(Functional())
    converted = convert(model)
    assert type(converted).forward is Functional.forward and type(converted.dw) is DepthwiseConv2d
    assert converted.conversion_report.entries[0].became == "DepthwiseConv2d"
    x, extra = torch.randn(2, 16, 6, 6), torch.randn(1)
    for call in (lambda m: m(x), lambda m: m(x, extra), lambda m: m(x, extra=extra), lambda m: m(x=x)):
        torch.testing.assert_close(call(converted), call(model), rtol=1e-4, atol=1e-5)


def test_an_expansion_of_one_channel_keeps_the_layout():
    """Whose image fits both layouts, but not the expanded one."""
    parts = (nn.Conv2d(1, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    plain = nn.Sequential(*parts).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        want, got = plain(x), convert(plain)(x)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)


def test_other_convolutions_are_folded():
    """A 3x3 convolution, a pointwise and a grouped one, each with its BatchNorm as one operation in eval mode."""
    layers = (nn.Conv2d(16, 16, 3, groups=2), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3, padding="same"), nn.BatchNorm2d(16), *layers))
    converted = convert(model)
    x, calls = torch.randn(2, 3, 9, 9), []
    with torch.no_grad(), Recorded(calls):
        y = converted(x)
    assert not any("batch_norm" in call for call in calls) and calls.count("pointwise_conv2d") == 1
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_keep_running():
    """Without derivatives wanted, so that what is not hooked is fused."""
    model = sequential()
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append(o))
    converted = convert(model)
    x = torch.randn(1, 16, 5, 5)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    handle = converted[4].register_forward_hook(lambda m, i, o: o * 2)  # one added later counts too
    converted_later = converted(x)
    handle.remove()
    assert not torch.allclose(converted_later, converted(x))


@torch.no_grad()
def test_a_replaced_part_is_used():
    converted = convert(sequential())
    x = torch.randn(2, 16, 5, 5)
    converted(x)
    converted[3] = nn.Conv2d(16, 24, 1)
    new = unfuse(converted)
    torch.testing.assert_close(converted(x), new(x), rtol=1e-4, atol=1e-5)
    converted[1] = nn.Identity()
    new = unfuse(converted)
    torch.testing.assert_close(converted(x), new(x), rtol=1e-4, atol=1e-5)
    converted[0] = nn.Conv2d(16, 16, 5, padding=2)
    new = unfuse(converted)
    torch.testing.assert_close(converted(x), new(x), rtol=1e-4, atol=1e-5)


def test_training_mode_and_back():
    model = sequential()
    converted = copy.deepcopy(convert(model))
    x = torch.randn(4, 16, 8, 8)
    for _ in range(2):
        for m in (model, converted):
            m.train()(x).sum().backward()
            m.eval()
        torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-4)
    for a, b in zip(model.parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)
    for a, b in zip(model.buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_an_optimizer_made_before_trains_the_converted_model():
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = convert(model).train()
    before = [p.clone() for p in converted.parameters()]
    converted(torch.randn(4, 16, 8, 8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, converted.parameters(), strict=True))


def test_inplace():
    model = sequential()
    assert convert(model, inplace=True) is model and type(model[0]) is DepthwiseConv2d and type(model) is not nn.Sequential
    assert unfuse(model, inplace=True) is model and type(model[0]) is nn.Conv2d and type(model) is nn.Sequential
    again = sequential()
    convert(again)
    assert type(again[0]) is nn.Conv2d and type(again) is nn.Sequential


def test_converting_twice_changes_nothing():
    once = convert(sequential())
    twice = convert(once)
    assert twice.conversion_report.entries[0].became == "fused block" and type(twice) is type(once)
    x = torch.randn(1, 16, 5, 5)
    assert torch.equal(once(x), twice(x))


def test_copy_pickle_save_and_load():
    converted = convert(torchvision.models.mobilenet_v2()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = converted(x)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    copies = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), torch.load(file, weights_only=False)]
    for other in copies:
        calls = []
        with torch.no_grad(), Recorded(calls):
            assert torch.equal(other(x), y)
        assert calls.count("inverted_residual") == 16  # but for the first block and the last convolution
        assert calls.count("separable_conv2d_packed") == calls.count("pointwise_conv2d") == 1
        with torch.no_grad():  # it is the copy's own weights that are used
            for p in other.parameters():
                p.zero_()
            assert torch.equal(converted(x), y) and not torch.equal(other(x), y)


def test_a_copied_part_leaves_the_rest_alone():
    converted = convert(sequential())
    part = copy.deepcopy(converted[0])
    assert part(torch.randn(1, 16, 5, 5)).shape == (1, 16, 5, 5)


def test_checkpoints_load_both_ways():
    model, converted = sequential(), convert(sequential())
    other = randomised(nn.Sequential(*sequential()))
    converted.load_state_dict(other.state_dict())
    model.load_state_dict(converted.state_dict())
    x = torch.randn(1, 16, 5, 5)
    torch.testing.assert_close(converted(x), other(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), other(x))


def test_what_is_left_alone_and_why():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    class Padded(nn.Conv2d):
        def forward(self, input):
            return super().forward(F.pad(input, (1, 1, 1, 1)))

    class Direct(nn.Conv2d):
        def forward(self, input):
            return F.conv2d(input, self.weight * 3, groups=self.groups)

    model = nn.ModuleDict(
        {
            "own": Own(4, 4, 3, groups=4),
            "padded": Padded(4, 4, 3, groups=4),
            "direct": Direct(4, 4, 3, groups=4),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4)),
            "complex": nn.Conv2d(4, 4, 3, groups=4, dtype=torch.complex64),
            "multiplier": nn.Conv2d(4, 8, 3, groups=4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
        }
    )
    converted = convert(model)
    became = {e.name: (e.became, e.why) for e in converted.conversion_report.entries}
    assert set(became) == set(model) - {"grouped"}
    for name, word in {
        "own": "overrides _conv_forward",
        "direct": "calls conv2d itself",
        "parametrized": "parametrized",
        "complex": "no complex64",
    }.items():
        assert became[name][0] == "left alone" and word in became[name][1]
        assert type(converted[name]) is type(model[name])
    for name in ("padded", "multiplier"):
        assert became[name][0] == "DepthwiseConv2d"
    x = torch.randn(2, 4, 7, 7)
    for name in set(model) - {"complex"}:
        torch.testing.assert_close(converted[name](x), model[name](x), rtol=1e-4, atol=1e-5)
    assert isinstance(converted["padded"], Padded)
    report = str(converted.conversion_report)
    assert report.splitlines()[0].startswith("6 depthwise convolutions") and len(report.splitlines()) == 7


@pytest.mark.parametrize("size", [(7, 8), (12, 13), (16, 16)])
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (4, 3, 1), (3, 1, 2)])
def test_timm_same_padding(size, kernel, stride, dilation):
    from timm.layers import Conv2dSame

    model = nn.Sequential(Conv2dSame(6, 6, kernel, stride, dilation=dilation, groups=6))
    converted = convert(model)
    assert converted.conversion_report.count("DepthwiseConv2d") == 1 and isinstance(converted[0], Conv2dSame)
    x = torch.randn(2, 6, *size)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert str(convert(converted).conversion_report) == str(converted.conversion_report).replace(
        "Conv2dSame:", "DepthwiseConv2dSame:"
    )
    restored = pickle.loads(pickle.dumps(converted))
    assert type(restored[0]) is type(converted[0])
    assert torch.equal(restored(x), converted(x))
    assert type(unfuse(converted)[0]) is Conv2dSame


def test_unfuse_own_modules():
    block = FusedDSConv(8, 16, activation="gelu_tanh", dw_activation="leaky_relu")
    randomised(block)
    plain = unfuse(block)
    assert list(plain.state_dict()) == list(block.state_dict())
    assert not count(plain, (FusedDSConv, DepthwiseConv2d))
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(plain(x), block(x), rtol=1e-4, atol=1e-5)
    model = nn.Sequential(OrderedDict(a=block, b=DepthwiseConv2d(16, 16, 3)))
    plain = unfuse(model)
    assert type(plain.a) is nn.Sequential and type(plain.b) is nn.Conv2d and type(model.b) is DepthwiseConv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_module_that_occurs_twice():
    block = sequential(16, 16)
    model = nn.Sequential(block, block)
    converted = convert(model)
    assert converted[0] is converted[1]
    x = torch.randn(1, 16, 6, 6)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    plain = unfuse(converted)
    assert plain[0] is plain[1]


def test_threads_share_a_converted_model():
    """Calls in several threads at once, one of them of a part alone."""
    from concurrent.futures import ThreadPoolExecutor

    converted = convert(sequential(16, 16))
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        want, part = converted(x), converted[1](converted[0](x))

        def whole(_):
            with torch.no_grad():
                return torch.equal(converted(x), want) and torch.equal(converted[1](converted[0](x)), part)

        assert all(pool.map(whole, range(50)))


def test_an_example_input_decides_what_is_left_alone(monkeypatch):
    """Timed for real; then as if torch were faster at one layer, and at all."""
    module = sys.modules["dwconv_ext.convert.convert"]
    model = nn.Sequential(sequential(16, 16), nn.Conv2d(16, 16, 5, groups=16), DepthwiseConv2d(16, 16, 3)).eval()
    x = torch.randn(2, 16, 20, 20)
    with torch.no_grad():
        want = model(x)
    assert all(e.became in ("fused block", "DepthwiseConv2d", "left alone") for e in report_of(model, x).entries)

    monkeypatch.setattr(module, "sequential_speedup", lambda container, x: 0.5)
    monkeypatch.setattr(module, "depthwise_speedup", lambda conv, x: 0.9 if conv.kernel_size == (5, 5) else 2.0)
    converted = convert(model, example_input=x)
    entries = {e.name: e for e in converted.conversion_report.entries}
    assert entries["0.0"].became == "DepthwiseConv2d" and "0.50x the speed of torch's at 2x16x20x20" in entries["0.0"].why
    assert entries["1"].became == "left alone" and type(converted[1]) is nn.Conv2d
    assert type(converted[0][0]) is DepthwiseConv2d and type(converted[0]) is type(converted) is nn.Sequential
    calls = []
    with torch.no_grad(), Recorded(calls):
        torch.testing.assert_close(converted(x), want, rtol=1e-4, atol=1e-5)
    assert not any("separable_conv2d" in call for call in calls)


def report_of(model, x):
    return convert(model, example_input=(x,)).conversion_report


def test_an_example_input_of_layers_called_by_keyword():
    class Keyword(Functional):
        def forward(self, x):
            return self.dw(input=x)

    assert report_of(Keyword(), torch.randn(1, 16, 6, 6)).count("DepthwiseConv2d") == 1


@pytest.mark.parametrize("function", [convert, unfuse])
def test_errors(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: model must be an nn\.Module, but got int"):
        function(3)


@pytest.mark.parametrize("example", ([torch.ones(1, 16, 6, 6)], {"x": torch.ones(1, 16, 6, 6)}, "x", (1, 16, 6, 6)), ids=type)
def test_an_example_input_that_the_model_does_not_take(example):
    model = sequential()
    wanted = "convert: example_input must be an input of the model or a tuple of its arguments"
    with pytest.raises(ValueError, match=f"{wanted}, but got {type(example).__name__}, and the model says: "):
        convert(model, inplace=True, example_input=example)
    assert type(model) is nn.Sequential and type(model[0]) is nn.Conv2d  # nothing was converted


def test_verbose(capsys):
    convert(sequential(), verbose=True)
    assert "1 depthwise convolution: 1 fused block" in capsys.readouterr().out


def test_exported_names():
    assert dwconv_ext.convert is convert and dwconv_ext.unfuse is unfuse
