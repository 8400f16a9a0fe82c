"""DepthwiseConv1d in the place of nn.Conv1d: as a module, by convert and in compiled graphs."""

from __future__ import annotations

import copy
import importlib
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwconv_ext import DepthwiseConv1d, convert, unfuse
from dwconv_ext.compile import freeze, last_report, patterns

MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.mark.parametrize("padding", ["same", "valid", 2, (3,)])
@pytest.mark.parametrize("mode", MODES)
def test_is_a_drop_in(mode, padding):
    ours = DepthwiseConv1d(6, 12, 4, padding=padding, dilation=2, padding_mode=mode)
    theirs = nn.Conv1d(6, 12, 4, padding=padding, dilation=2, padding_mode=mode, groups=6)
    theirs.load_state_dict(ours.state_dict())
    for shape in ((2, 6, 19), (6, 11)):
        x = torch.randn(shape)
        results = []
        for layer in (ours, theirs):
            layer.zero_grad()
            given = x.clone().requires_grad_()
            y = layer(given)
            y.square().sum().backward()
            results.append([y.detach(), given.grad, *(p.grad for p in layer.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert repr(ours) == "Depthwise" + repr(theirs)
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is DepthwiseConv1d and torch.equal(again(x), ours(x))
    assert type(copy.deepcopy(ours)) is DepthwiseConv1d
    assert torch.jit.script(ours)(x).shape == ours(x).shape


def test_causal():
    layer = DepthwiseConv1d(8, 16, 5, dilation=2, causal=True)
    assert "causal=True" in repr(layer) and list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 8, 30)
    want = F.conv1d(F.pad(x, (8, 0)), layer.weight, layer.bias, 1, 0, 2, 8)
    torch.testing.assert_close(layer(x), want)
    first, state = layer(x[..., :11], torch.zeros(2, 8, 8))
    second, _ = layer(x[..., 11:], state=state)
    assert torch.equal(torch.cat((first, second), 2), layer(x))
    assert unfuse(layer).causal  # torch has no class for it
    assert copy.deepcopy(layer).causal


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DepthwiseConv1d(4, 6, 3), "out_channels must be divisible by groups"),
        (lambda: DepthwiseConv1d(0, 4, 3), "DepthwiseConv1d: in_channels must be a positive int, but got 0"),
        (lambda: DepthwiseConv1d(4, 4, (3, 3)), r"DepthwiseConv1d: kernel_size must be an int or a 1-tuple, but got \(3, 3\)"),
        (lambda: DepthwiseConv1d(4, 4, 3, padding=None), "DepthwiseConv1d: padding must be 'same', 'valid', an int or a 1-tuple"),
        (lambda: DepthwiseConv1d(4, 4, 3, causal=1), "DepthwiseConv1d: causal must be a bool, but got 1"),
        (lambda: DepthwiseConv1d(4, 4, 3, padding=1, causal=True), "padding must be 0 where causal, .* but got 1"),
        (lambda: DepthwiseConv1d(4, 4, 3, padding_mode="reflect", causal=True), "padding_mode must be 'zeros' where causal"),
        (lambda: DepthwiseConv1d(4, 4, 3)(torch.ones(4, 9), torch.ones(4, 2)), "state is for a causal convolution"),
        (lambda: DepthwiseConv1d(4, 4, 3)(torch.ones(2, 5, 9)), "input must have the 4 channels of weight"),
    ],
)
def test_errors(make, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        make()


class ConformerModule(nn.Module):
    """The convolution module of a Conformer block (Gulati et al., arXiv:2005.08100)."""

    def __init__(self, channels: int = 12, taps: int = 15) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand, self.project = nn.Conv1d(channels, 2 * channels, 1), nn.Conv1d(channels, channels, 1)
        self.depthwise = nn.Conv1d(channels, channels, taps, padding=(taps - 1) // 2, groups=channels)
        self.bn, self.act = nn.BatchNorm1d(channels), nn.SiLU()

    def forward(self, x):
        y = F.glu(self.expand(self.norm(x).transpose(1, 2)), dim=1)
        return x + self.project(self.act(self.bn(self.depthwise(y)))).transpose(1, 2)


class Causal(nn.Module):
    """As WaveNet's and Mamba's: zeros before the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 4, groups=8, dilation=2)

    def forward(self, x):
        return F.silu(self.conv(F.pad(x, (6, 0))))


class Own(nn.Module):
    """Our own module in the place of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = DepthwiseConv1d(8, 8, 4, dilation=2, causal=True), nn.BatchNorm1d(8)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


def trained(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


def test_convert():
    model, x = trained(ConformerModule()), torch.randn(2, 40, 12)
    converted = convert(model)
    (entry,) = converted.conversion_report.entries
    assert (entry.name, entry.became) == ("depthwise", "DepthwiseConv1d") and "12 channels, 15, stride 1" in entry.layer
    assert type(converted.depthwise) is DepthwiseConv1d and list(converted.state_dict()) == list(model.state_dict())
    assert converted.depthwise.weight is model.depthwise.weight and type(model.depthwise) is nn.Conv1d
    torch.testing.assert_close(converted(x), model(x))
    converted.train()(x).sum().backward()
    assert type(unfuse(converted).depthwise) is nn.Conv1d

    class Mine(nn.Conv1d):
        def forward(self, input):
            return super().forward(F.pad(input, (2, 0)))

    class Calls(nn.Conv1d):
        def forward(self, input):
            return F.conv1d(input, self.weight, None, groups=4)

    both = nn.Sequential(Mine(4, 4, 3, groups=4), Calls(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3))
    converted = convert(both)
    assert [e.became for e in converted.conversion_report.entries] == ["DepthwiseConv1d", "left alone"]
    assert converted.conversion_report.entries[1].why == "Calls.forward calls conv1d itself"
    assert isinstance(converted[0], Mine) and type(converted[2]) is nn.Conv1d
    x = torch.randn(2, 4, 20)
    torch.testing.assert_close(converted(x), both(x))
    assert isinstance(pickle.loads(pickle.dumps(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4)))), nn.Sequential)
    assert type(unfuse(converted)[0]) is Mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make, shape", [(ConformerModule, (2, 40, 12)), (Causal, (2, 8, 30)), (Own, (2, 8, 30))])
def test_compiled(make, shape, dtype):
    model, x = trained(make()).to(dtype), torch.randn(shape).to(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        for each in (model, convert(model)):
            compiled = torch.compile(each, backend="dwconv_ext", options={"base": "eager"})
            close = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
            for _ in range(2):
                torch.testing.assert_close(compiled(x), model(x), **close)
            assert last_report().fused["depthwise convolutions"] == 1 and not last_report().refused
            torch._dynamo.reset()
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv1d) and m.groups > 1)
        compiled(x)
        conv.weight.data.mul_(2)  # what was folded is made again
        torch.testing.assert_close(compiled(x), model(x), **close)


CUTS = {
    "length": lambda y, x: y[..., : x.shape[-1]],
    "columns": lambda y, x: y[:, :, : x.shape[-1]],
    "from_the_end": lambda y, x: y[:, :, :-6],
    "fewer": lambda y, x: y[..., :-2],
    "all_and_more": lambda y, x: y[..., :-7],
    "from_the_beginning": lambda y, x: y[..., 6:],
    "every_other": lambda y, x: y[..., : x.shape[-1] : 2],
    "channels": lambda y, x: y[:, :3, : x.shape[-1]],
}
ABSORBED = ("length", "columns", "from_the_end", "fewer")


class Trimmed(nn.Module):
    """As Mamba's convolution is written without kernels: zeros on both sides, and the outputs after the end dropped."""

    def __init__(self, cut: str, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.cut = nn.Conv1d(8, 8, 4, stride, groups=8, dilation=2, padding=6), CUTS[cut]

    def forward(self, x):
        return F.silu(self.cut(self.conv(x), x))


@pytest.mark.parametrize("made", [lambda m: m, convert], ids=["plain", "converted"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_outputs_that_are_dropped_are_not_computed(cut, dynamic, made):
    plain = Trimmed(cut).eval()
    compiled = torch.compile(made(plain), backend="dwconv_ext", options={"base": "eager"}, fullgraph=True, dynamic=dynamic)
    graphs = []
    fuse = patterns.fuse
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.import_module("dwconv_ext.compile.backend"),
            "fuse",
            lambda module, **how: (fuse(module, **how), graphs.append(module))[0],
        )
        for x in (torch.randn(2, 8, 30), torch.randn(3, 8, 41), torch.randn(2, 30, 8).mT):
            torch.testing.assert_close(compiled(x), plain(x))
    sliced = any(node.target is operator.getitem for node in graphs[0].graph.nodes)
    assert sliced is not (cut in ABSORBED and not (cut == "fewer" and dynamic))
    serve = freeze(torch.export.export(plain, (x,)))
    torch.testing.assert_close(serve(x), plain(x).detach())


@pytest.mark.usefixtures("fresh_dynamo")
def test_dropped_outputs_in_training_and_at_a_stride():
    for model in (Trimmed("length"), Trimmed("from_the_end", 2)):
        compiled, x = torch.compile(model, backend="dwconv_ext", options={"base": "eager"}), torch.randn(2, 8, 30)
        grads = []
        for call in (compiled, model):
            model.zero_grad()
            call(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        assert last_report().fused["depthwise convolutions"] == 1


def test_compiled_in_training():
    model, x = trained(ConformerModule()), torch.randn(2, 40, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dwconv_ext", options={"base": "eager"})
    for mode in (True, False):
        model.train(mode)
        grads = []
        for call in (compiled, model):
            model.zero_grad()
            call(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert last_report().fused["depthwise convolutions"] == 1
