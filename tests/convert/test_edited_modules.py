"""Modules that were edited, replaced or given unusual tensors: what is fused must be what the plain parts compute, or refuse."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from small_models import assert_same, fast
from torch import nn

import dwconv_ext
from dwconv_ext import FusedDSConv, convert, unfuse
from dwconv_ext.nn import folded_layers, folded_weights

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def outcome(function, *args):
    """The result, or that there is none."""
    try:
        return function(*args)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None


def assert_same_outcome(ours, plain, *args):
    want, got = outcome(plain, *args), outcome(ours, *args)
    assert (want is None) == (got is None), f"plain gives {'an error' if want is None else 'a result'}"
    if want is not None:
        assert_same(got, want)
        assert got.dtype == want.dtype and got.stride() == want.stride()


# --- weights that are another view of the same memory --------------------------------------------------------------------

VIEWS = {
    "transposed": lambda w: w.transpose(0, 1),
    "as_strided": lambda w: w.as_strided(w.shape, (1, w.shape[0], 1, 1)),
    "mT": lambda w: w.mT,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kernel", (1, 3))
@torch.no_grad()
def test_data_that_is_another_view(view, kernel):
    model = nn.Sequential(nn.Conv2d(8, 8, kernel, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    converted, compiled, x = convert(model), fast(model), torch.randn(1, 8, 5, 5)
    for call in (converted, compiled):
        call(x)
    model[0].weight.data = VIEWS[view](model[0].weight.data)
    for call in (converted, compiled):
        assert_same(call(x), model(x))


@torch.no_grad()
def test_a_linear_layers_transposed_data():
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    compiled = fast(model)
    compiled(x)
    model[0].weight.data = model[0].weight.data.t()
    assert_same(compiled(x), model(x))


@torch.no_grad()
def test_new_parameters_over_old_memory():
    flat, x = torch.randn(64), torch.randn(1, 8, 4, 4)
    for shape in ((8, 8, 1, 1), (4, 8, 1, 1), (8, 8, 1, 1), (2, 8, 2, 2)) * 3:
        conv = nn.Conv2d(8, shape[0], shape[2], bias=False)
        conv.weight = nn.Parameter(flat[: torch.Size(shape).numel()].view(shape))
        model = nn.Sequential(conv, nn.ReLU()).eval()
        assert_same(convert(model)(x), model(x))


def test_an_inference_tensor_at_a_known_place():
    flat, x = torch.randn(64), torch.randn(2, 8, 6, 6)
    for _ in range(10):
        conv = nn.Conv2d(8, 8, 1, bias=False)
        conv.weight = nn.Parameter(flat.view(8, 8, 1, 1), requires_grad=False)
        convert(nn.Sequential(conv, nn.ReLU()).eval(), inplace=True)(x)
        del conv
        with torch.inference_mode():
            model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU()).eval()
            assert_same(convert(model)(x), model(x))


# --- FusedDSConv, its parts edited -----------------------------------------------------------------------------------------


def parts_of(block):
    def call(x):
        x = torch.relu(block.bn1(block.depthwise(x)))
        return torch.relu(block.bn2(block.pointwise(x)))

    return call


EDITS = {
    "nothing": lambda b: None,
    "no variance": lambda b: setattr(b.bn1, "running_var", None),
    "pointwise stride": lambda b: setattr(b.pointwise, "stride", (2, 2)),
    "pointwise padding": lambda b: setattr(b.pointwise, "padding", (1, 1)),
    "pointwise dilation": lambda b: setattr(b.pointwise, "dilation", (0, 0)),
    "grouped pointwise": lambda b: setattr(b, "pointwise", nn.Conv2d(8, 8, 1, groups=2)),
    "3x3 for pointwise": lambda b: setattr(b, "pointwise", nn.Conv2d(8, 8, 3)),
    "multiplier": lambda b: setattr(b, "depthwise", dwconv_ext.DepthwiseConv2d(8, 16, 3, padding=1)),
    "patched convolution": lambda b: setattr(b.pointwise, "_conv_forward", lambda x, w, bias: x * 0),
    "patched depthwise": lambda b: setattr(b.depthwise, "_conv_forward", lambda x, w, bias: x * 0),
    "groups": lambda b: setattr(b.depthwise, "groups", 2),
    "bfloat16 pointwise": lambda b: b.pointwise.bfloat16(),
    "narrow norm": lambda b: setattr(b, "bn1", nn.BatchNorm2d(7).eval()),
    "double norm": lambda b: b.bn2.double(),
    "bias of one": lambda b: setattr(b.pointwise, "bias", nn.Parameter(torch.ones(1))),
    "channels_last": lambda b: b.to(memory_format=torch.channels_last),
    "SyncBatchNorm": lambda b: setattr(b, "bn1", nn.SyncBatchNorm(8).eval()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_blocks(edit):
    block = FusedDSConv(8, 8).eval()
    EDITS[edit](block)
    block.requires_grad_(False)
    for x in (torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6).bfloat16(), torch.randn(2, 7, 6, 6)):
        assert_same_outcome(block, parts_of(block), x)


@pytest.mark.parametrize("edit", ("pointwise stride", "grouped pointwise", "groups", "bfloat16 pointwise", "bias of one"))
def test_edited_containers(edit):
    layers = {"depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "bn1": nn.BatchNorm2d(8), "pointwise": nn.Conv2d(8, 8, 1)}
    plain = nn.Sequential()
    for name, layer in layers.items():
        plain.add_module(name, layer)
    plain.eval().requires_grad_(False)
    converted = convert(copy.deepcopy(plain))
    for model in (plain, converted):
        torch.manual_seed(0)
        EDITS[edit](model)
    converted.load_state_dict(plain.state_dict())
    plain.requires_grad_(False), converted.requires_grad_(False)
    assert_same_outcome(converted, plain, torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("training", (False, True))
def test_edited_activations(training):
    for act, edit in ((nn.ReLU6(), {"max_val": 0.5}), (nn.ReLU6(), {"min_val": -1.0}), (nn.GELU(), {"approximate": "none "})):
        plain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act).train(training)
        for name, value in edit.items():
            setattr(plain[2], name, value)
        converted = convert(copy.deepcopy(plain))
        assert_same_outcome(converted, plain, torch.randn(2, 8, 40, 60))


def test_a_stride_given_as_a_number():
    conv = nn.Conv2d(8, 8, 3, groups=8)
    conv.stride = 2
    assert "stride 2x2" in str(convert(nn.Sequential(conv)).conversion_report)


# --- BatchNorm in training: what torch refuses is refused, and nothing moves -------------------------------------------------

STATISTICS = {
    "double variance": lambda bn: setattr(bn, "running_var", bn.running_var.double()),
    "double mean": lambda bn: setattr(bn, "running_mean", bn.running_mean.double()),
    "no mean": lambda bn: setattr(bn, "running_mean", None),
    "a row": lambda bn: setattr(bn, "running_var", bn.running_var[None]),
    "too long": lambda bn: setattr(bn, "running_var", torch.ones(17)),
    "half weight": lambda bn: setattr(bn, "weight", nn.Parameter(bn.weight.detach().bfloat16())),
    "eps 0": lambda bn: setattr(bn, "eps", 0.0),
}


@pytest.mark.parametrize("change", STATISTICS)
def test_statistics_of_other_kinds(change):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()).train()
    STATISTICS[change](plain[1])
    converted, x = convert(copy.deepcopy(plain)), torch.randn(4, 16, 64, 64)
    assert_same_outcome(converted, plain, x)
    for name, value in plain[1].state_dict().items():
        if name != "num_batches_tracked":  # which torch counts before it looks
            torch.testing.assert_close(converted[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)


# --- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", (1, 8))
@torch.no_grad()
def test_folded_weights_below_float16s_range(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False, groups=groups), nn.BatchNorm2d(8)).half().eval()
    model[0].weight.mul_(0.1)
    model[1].running_var.fill_(6e4)
    model[1].weight.fill_(1e-2)
    x = torch.randn(1, 8, 16, 16).half() * 300
    exact = copy.deepcopy(model).double()(x.double())
    for call in (model, convert(model), fast(model)):
        assert (call(x).double() - exact).norm() <= 2e-3 * exact.norm()


# --- derivatives, autocast, tracing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ("relu", "silu", "hardswish", "gelu", "leaky_relu"))
def test_torch_func_through_the_block(activation):
    torch.manual_seed(0)
    block, x = FusedDSConv(3, 4, activation=activation).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plain = unfuse(block)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(block)(x), transform(plain)(x))
    small = x[:1, :, :3, :3]
    hessians = (torch.func.hessian(lambda x, m=m: m(x).pow(2).sum())(small) for m in (block, plain))
    torch.testing.assert_close(*hessians)
    tangents = (torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (block, plain))
    torch.testing.assert_close(*tangents)


def test_backward_within_autocast():
    block, x = FusedDSConv(8, 8).eval(), torch.randn(2, 8, 6, 6, requires_grad=True)
    y = block(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    ours, x.grad = x.grad, None
    unfuse(block)(x).sum().backward()
    assert_same(ours, x.grad)
    conv = dwconv_ext.DepthwiseConv2d(8, 8, 3)
    (first,) = torch.autograd.grad(conv(x).pow(2).sum(), x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_jit_of_the_block():
    block, x = FusedDSConv(8, 8).eval(), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        for _ in range(2):
            assert_same(torch.jit.trace(block, x)(x), block(x))
            block(x)
        assert_same(torch.jit.script(block)(x), block(x))


@torch.no_grad()
def test_a_shortcut_of_another_layout():
    conv, x = nn.Conv2d(8, 8, 1).eval(), torch.randn(2, 8, 6, 6)
    last = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(lambda x, r: (r + conv(x)).permute(0, 2, 3, 1).view(-1, 8), backend="dwconv_ext")
    assert_same(compiled(x, last), (last + conv(x)).permute(0, 2, 3, 1).view(-1, 8))


# --- what is kept ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_models_that_come_and_go_over_living_weights():
    def make():
        return nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()

    state, x = make().state_dict(), torch.randn(1, 16, 4, 4)
    dwconv_ext.clear_caches()
    for _ in range(30):
        with torch.device("meta"):
            model = make()
        model.load_state_dict(state, assign=True)
        convert(model, inplace=True)(x)
    assert sum(map(len, folded_weights._entries.values())) <= folded_weights._MOST
    model = convert(make())
    for _ in range(30):
        model[2].bias = nn.Parameter(torch.randn(16))
        model(x)
    assert sum(map(len, folded_weights._entries.values())) <= 2 * folded_weights._MOST


@torch.no_grad()
def test_settings_that_nobody_uses():
    dwconv_ext.clear_caches()
    gc.collect()
    before = len(folded_layers._layers)
    for i in range(20):
        convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=1e-3 * (i + 1))).eval())(torch.randn(1, 4, 3, 3))
    dwconv_ext.clear_caches()
    gc.collect()
    assert len(folded_layers._layers) <= before


@torch.no_grad()
def test_two_norms_without_weights_on_one_convolution():
    conv, x = nn.Conv2d(4, 4, 1).eval(), torch.randn(1, 4, 3, 3)
    norms = [nn.BatchNorm2d(4, affine=False).eval() for _ in range(2)]
    norms[1].running_var.fill_(4)
    model = nn.Sequential(conv, norms[0], conv, norms[1])
    converted = convert(model)
    for _ in range(3):
        assert_same(converted(x), model(x))
    entries = [e for es in folded_weights._entries.values() for e in es if id(converted[0].weight) in e.tensors]
    assert len(entries) == 2
