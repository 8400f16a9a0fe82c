"""DepthwiseConvTranspose2d and 1d: torch's layers in everything but the kernels; convert, unfuse, the compile backend."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dwconv_ext
import dwconv_ext.compile
from dwconv_ext import DepthwiseConvTranspose1d, DepthwiseConvTranspose2d, convert, cost, plan, unfuse
from dwconv_ext.compile import last_report

HOW = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 3},
]


def pair(how, channels=6, multiplier=1, dims=2, dtype=torch.float32):
    """Ours and torch's, of the same weights."""
    ours_kind, theirs_kind = (
        (DepthwiseConvTranspose2d, nn.ConvTranspose2d) if dims == 2 else (DepthwiseConvTranspose1d, nn.ConvTranspose1d)
    )
    ours = ours_kind(channels, channels * multiplier, **how, dtype=dtype)
    theirs = theirs_kind(channels, channels * multiplier, groups=channels, **how, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def same_step(ours, theirs, x, **how):
    """Outputs and gradients."""
    results = []
    for layer in (ours, theirs):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf, **how)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_layer_is_torchs(how, multiplier, layout):
    ours, theirs = pair(how, multiplier=multiplier)
    assert isinstance(ours, nn.ConvTranspose2d) and list(ours.state_dict()) == list(theirs.state_dict())
    same_step(ours, theirs, torch.randn(2, 6, 5, 7).contiguous(memory_format=LAYOUTS[layout]))
    same_step(ours, theirs, torch.randn(6, 5, 7))
    assert repr(ours).replace("Depthwise", "") == repr(theirs)


def test_a_channels_last_layer_gives_channels_last():
    ours, theirs = (m.to(memory_format=torch.channels_last) for m in pair(HOW[0]))
    x = torch.randn(2, 6, 5, 7)
    assert ours(x).stride() == theirs(x).stride()


@pytest.mark.parametrize("size", [(9, 13), (10, 14), (2, 6, 10, 13), torch.Size((10, 13))])
def test_output_size(size):
    ours, theirs = pair({"kernel_size": 3, "stride": 2, "padding": 1})
    same_step(ours, theirs, torch.randn(2, 6, 5, 7), output_size=size)


@pytest.mark.parametrize("size", [(8, 13), (11, 13), (9,)])
def test_output_sizes_that_are_none(size):
    for layer in pair({"kernel_size": 3, "stride": 2, "padding": 1}):
        with pytest.raises(ValueError, match=r"output_size|output size"):
            layer(torch.randn(2, 6, 5, 7), output_size=size)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_one_dimension(multiplier):
    ours, theirs = pair({"kernel_size": 4, "stride": 2, "padding": 1, "output_padding": 1}, multiplier=multiplier, dims=1)
    assert isinstance(ours, nn.ConvTranspose1d)
    x = torch.randn(2, 6, 11)
    same_step(ours, theirs, x)
    same_step(ours, theirs, x[0])
    same_step(ours, theirs, x, output_size=(23,))
    torch.testing.assert_close(ours(x.mT.contiguous().mT), theirs(x), rtol=1e-5, atol=1e-5)


def test_arguments():
    for kind in (DepthwiseConvTranspose2d, DepthwiseConvTranspose1d):
        for error, message, how in (
            (ValueError, "in_channels must be a positive int", {"in_channels": 0}),
            (ValueError, "out_channels must be divisible by groups", {"out_channels": 7}),
            (TypeError, "stride must be an int or a", {"stride": "2"}),
            (TypeError, "output_padding must be an int or a", {"output_padding": 1.5}),
            (ValueError, "padding mode is supported", {"padding_mode": "reflect"}),
        ):
            with pytest.raises(error, match=message):
                kind(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, **how})


def test_edited_and_traced_layers_are_torchs():
    ours, theirs = pair(HOW[0])
    x = torch.randn(2, 6, 5, 7)
    want = theirs(x)
    assert torch.equal(torch.jit.script(ours)(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), want, rtol=1e-5, atol=1e-5)
    ours.groups, ours.weight = 3, nn.Parameter(torch.randn(6, 2, 4, 4))
    want = F.conv_transpose2d(x, ours.weight, ours.bias, 2, 1, groups=3)
    assert torch.equal(ours(x), want)


def test_plan_cost_and_flops():
    layer, x = DepthwiseConvTranspose2d(64, 64, 4, 2, 1), torch.empty(2, 64, 14, 14, device="meta")
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        plans = plan(layer, given)
        assert [p.pass_ for p in plans] == ["forward", "backward_input", "backward_weight"]
        assert {p.op for p in plans} == {"depthwise_conv_transpose2d"} and "backward_input" in plans[0].kernel
    assert plan(nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8), (1, 8, 5, 5))[0].pass_ == "forward"
    with pytest.raises(TypeError, match="of one filter a channel"):
        plan(nn.ConvTranspose2d(8, 16, 3, groups=8), (1, 8, 5, 5))
    with pytest.raises(ValueError, match="the output is too small"):
        plan(nn.ConvTranspose2d(8, 8, 1, padding=2, groups=8), (1, 8, 3, 3))
    row = cost.table(nn.Sequential(layer), (2, 64, 14, 14)).rows[0]
    assert row.kernel == plan(layer, (2, 64, 14, 14))[0].kernel and row.output == (2, 64, 28, 28)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 64, 14, 14)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 * 64 * 14 * 14) * 16  # forward, and the weight's gradient


# ---- convert and unfuse ---------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.tail = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=8), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.ReLU()
        )

    def forward(self, x):
        return self.tail(F.relu(self.norm(self.up(x))))


def decoder():
    model = Decoder()
    for norm in (model.norm, model.tail[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


class Scaled(nn.ConvTranspose2d):
    """nn.ConvTranspose2d's forward and more besides."""

    def scale(self):
        return 2


class Own(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return super().forward(x, output_size) * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_and_unfuse(layout):
    model, x = decoder(), torch.randn(2, 8, 5, 6).contiguous(memory_format=LAYOUTS[layout])
    ours = convert(copy.deepcopy(model))
    assert sum(type(m) is DepthwiseConvTranspose2d for m in ours.modules()) == 2
    assert [e.became for e in ours.conversion_report.entries] == ["DepthwiseConvTranspose2d"] * 2
    assert "ConvTranspose2d: 8 channels, 4x4, stride 2x2" in str(ours.conversion_report)
    assert list(ours.state_dict()) == list(model.state_dict())
    same_step(ours, model, x)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
        model.tail[1].weight.mul_(2)
        ours.tail[1].weight.mul_(2)
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    back = unfuse(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    again = pickle.loads(pickle.dumps(ours))
    assert type(again.up) is DepthwiseConvTranspose2d


def test_convert_of_other_layers():
    kept, own, line = Scaled(6, 6, 3, groups=6), Own(6, 6, 3, groups=6), nn.ConvTranspose1d(6, 12, 4, 2, groups=6)
    model = nn.ModuleList([kept, own, line, nn.ConvTranspose2d(6, 6, 3), nn.ConvTranspose3d(6, 6, 3, groups=6)])
    ours = convert(model)
    x = torch.randn(1, 6, 5, 5)
    assert type(ours[0]).__name__ == "DepthwiseScaled" and ours[0].scale() == 2
    torch.testing.assert_close(ours[0](x), kept(x), rtol=1e-5, atol=1e-5)
    assert type(ours[1]) is Own and type(ours[3]) is nn.ConvTranspose2d and type(ours[2]) is DepthwiseConvTranspose1d
    torch.testing.assert_close(ours[2](x[:, :, 0]), line(x[:, :, 0]), rtol=1e-5, atol=1e-5)
    reports = {entry.name: (entry.became, entry.why) for entry in ours.conversion_report.entries}
    assert reports["1"] == ("left alone", "Own overrides forward") and reports["2"][0] == "DepthwiseConvTranspose1d"
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[0]).__name__ == "DepthwiseScaled"
    assert [type(m) for m in unfuse(ours)] == [type(m) for m in model]


def test_convert_times_a_layer():
    ours = convert(nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=32)), example_input=torch.randn(1, 32, 28, 28))
    (entry,) = ours.conversion_report.entries
    assert entry.became in ("DepthwiseConvTranspose2d", "left alone")


# ---- torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_compile_backend_folds_what_follows(layout, dtype):
    model = decoder().eval().to(dtype)
    x = torch.randn(2, 8, 5, 6).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    compiled = torch.compile(model, backend="dwconv_ext", options={"base": "eager"}, fullgraph=True)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), **close)
        assert last_report().fused == {"depthwise convolutions": 2, "pointwise convolutions": 1}
        model.norm.bias.add_(1)
        torch.testing.assert_close(compiled(x), model(x), **close)


@pytest.mark.parametrize("made", [lambda m: m, convert], ids=["plain", "converted"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_compile_backend_in_training(made):
    plain, x = decoder(), torch.randn(2, 8, 5, 6)
    model = made(copy.deepcopy(plain))
    compiled = torch.compile(model, backend="dwconv_ext", options={"base": "aot_eager"})
    same_step(compiled, plain, x)
    assert last_report().fused["depthwise convolutions"] == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_frozen_and_exported():
    model, x = decoder().eval(), torch.randn(2, 8, 5, 6)
    serve = dwconv_ext.compile.freeze(torch.export.export(model, (x,)))
    torch.testing.assert_close(serve(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert last_report().fused["depthwise convolutions"] == 2


class Line(nn.Module):
    """One dimension up, as vocoders have it."""

    def __init__(self, multiplier=1):
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 8 * multiplier, 4, 2, 1, 1, groups=8)
        self.norm = nn.BatchNorm1d(8 * multiplier)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return F.silu(self.norm(self.up(x)))


@pytest.mark.parametrize("made", [lambda m: m, convert], ids=["plain", "converted"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_compile_backend_in_one_dimension(dynamic, made):
    plain = Line().eval()
    compiled = torch.compile(made(plain), backend="dwconv_ext", options={"base": "eager"}, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for x in (torch.randn(2, 8, 13), torch.randn(3, 8, 20), torch.randn(2, 20, 8).mT):
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
        assert last_report().fused == {"depthwise convolutions": 1} and not last_report().refused
        plain.norm.weight.mul_(2)
        if made is not convert:
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    serve = dwconv_ext.compile.freeze(torch.export.export(plain, (x,)))
    torch.testing.assert_close(serve(x), plain(x).detach(), rtol=1e-4, atol=1e-4)
    assert last_report().fused["depthwise convolutions"] == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_several_filters_a_channel_are_replaced_alone():
    for model, x in (
        (Line(3), torch.randn(2, 8, 13)),
        (nn.Sequential(nn.ConvTranspose2d(8, 16, 3, 2, groups=8)), torch.randn(2, 8, 5, 6)),
    ):
        ours = torch.compile(model, backend="dwconv_ext", options={"base": "eager"})
        same_step(ours, model, x)
        assert last_report().fused["depthwise convolutions"] == 1
        with torch.no_grad():
            torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
        assert last_report().fused["depthwise convolutions"] == 1 and "several filters each" in last_report().refused[0].why


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_the_compile_backend_leaves():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        compiled = torch.compile(model, backend="dwconv_ext", options={"base": "eager"})
        torch.testing.assert_close(compiled(x), model(x))
    assert not last_report().fused
