"""FusedDSConv: equal to the unfused modules, and what it keeps of its weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from blocks import Recorded
from cases import LAYOUTS
from torch import nn

from dwconv_ext import FusedDSConv
from dwconv_ext.nn import folded_weights

MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}


def unfused(block: FusedDSConv, activation: type[nn.Module]) -> nn.Sequential:
    parts = OrderedDict(
        depthwise=block.depthwise, bn1=block.bn1, act1=activation(), pointwise=block.pointwise, bn2=block.bn2, act2=activation()
    )
    plain = copy.deepcopy(nn.Sequential(parts))
    conv = block.depthwise
    plain.depthwise = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
    )
    plain.load_state_dict(block.state_dict())
    return plain


def trained(block: FusedDSConv) -> FusedDSConv:
    """With running statistics and affine parameters that fold into something."""
    for bn in (block.bn1, block.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return block


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "activation"), MODULES.items())
def test_module_equals_the_unfused_sequence(name, activation, bias, layout):
    block = trained(FusedDSConv(24, 40, stride=2, activation=name, bias=bias))
    plain = unfused(block, activation)
    by_module = FusedDSConv(24, 40, stride=2, activation=activation(), bias=bias)
    by_module.load_state_dict(plain.state_dict())
    for mode in (True, False):
        x = torch.randn(3, 24, 15, 14).contiguous(memory_format=LAYOUTS[layout])
        xs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(3)]
        ys = [m.train(mode)(v) for m, v in zip((block, by_module, plain), xs, strict=True)]
        grad = torch.randn_like(ys[2])
        for y in ys:
            y.backward(grad)
        for i, m in enumerate((block, by_module)):
            torch.testing.assert_close(ys[i], ys[2], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(xs[i].grad, xs[2].grad, rtol=1e-3, atol=1e-4)
            for (key, a), (_, b) in zip(m.named_parameters(), plain.named_parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
            for (key, a), (_, b) in zip(m.named_buffers(), plain.named_buffers(), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")
            m.zero_grad()
        plain.zero_grad()


@pytest.mark.isa
def test_module_runs_packed_weights_where_it_can():
    block, x = trained(FusedDSConv(8, 12, padding="same")).eval(), torch.randn(2, 8, 9, 9)
    want = unfused(block, nn.ReLU).eval()(x)

    def packs(x):
        calls = []
        with Recorded(calls):
            torch.testing.assert_close(block(x).float(), want, rtol=1e-4, atol=1e-5)
        return "separable_conv2d_packed" in calls

    assert not packs(x), "the weights' gradients are lost"
    with torch.no_grad():
        assert packs(x)
        torch.testing.assert_close(block(x[0]), want[0], rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.vmap(block)(x[None])[0], want, rtol=1e-4, atol=1e-5)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(block(dual)).tangent is not None
    block.requires_grad_(False)
    assert block(x.clone().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match=r"input must have the 8 channels of weight|for 7 channels of input"):
        block(x[:, 1:])
    assert packs(x)


def test_state_dict_moves_both_ways():
    block = trained(FusedDSConv(8, 12))
    plain = unfused(block, nn.ReLU)
    assert list(block.state_dict()) == list(plain.state_dict())
    other = FusedDSConv(8, 12)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(other.eval()(x), block.eval()(x))


def kept_by(block: FusedDSConv) -> tuple:
    (made,) = (e.made for es in folded_weights._entries.values() for e in es if id(block.depthwise.weight) in e.tensors)
    return made


CHANGES = {
    "in_place": lambda m: m.bn1.running_mean.add_(1),
    "weight_in_place": lambda m: m.pointwise.weight.mul_(1.5),
    "load_state_dict": lambda m: m.load_state_dict(trained(FusedDSConv(8, 12)).state_dict()),
    "replaced_parameter": lambda m: setattr(m.depthwise, "weight", nn.Parameter(torch.randn(8, 1, 3, 3))),
    "replaced_module": lambda m: setattr(m, "bn2", nn.BatchNorm2d(12).eval()),
    "training_step": lambda m: (m.train()(torch.randn(4, 8, 9, 9)), m.eval()),
    "eps": lambda m: setattr(m.bn1, "eps", 0.1),
    "to_and_back": lambda m: m.double().float(),
    "copy_": lambda m: m.bn2.weight.copy_(torch.rand(12)),
    "stride": lambda m: setattr(m.depthwise, "stride", (2, 2)),
    "data_then_clear_cache": lambda m: (m.bn2.weight.data.mul_(2), m.clear_cache()),
}


@pytest.mark.isa
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_cache_is_dropped(change):
    block = trained(FusedDSConv(8, 12)).eval()
    x = torch.randn(2, 8, 9, 9)
    before = block(x)
    cached = kept_by(block)
    assert torch.equal(block(x), before) and kept_by(block) is cached
    CHANGES[change](block)
    torch.testing.assert_close(block(x), unfused(block, nn.ReLU).eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(block(x), before) or change == "to_and_back"


@torch.no_grad()
def test_a_channel_that_is_always_zero_stays_finite_in_float16():
    """Its mean, times a scale of some hundred, does not fit float16; what the block gives does."""
    block = FusedDSConv(16, 16).eval()
    block.depthwise.weight.zero_()
    block.depthwise.weight[:, 0, 1, 1] = 300
    block.bn1.running_mean.fill_(300)
    block.bn1.running_var.fill_(1e-12)
    y = block.half()(torch.ones(1, 16, 8, 8).half())
    assert y.isfinite().all()


@torch.no_grad()
def test_what_is_kept_stays_in_copies_too():
    """An unpickled module's attribute names are strings of their own."""
    block, x = trained(FusedDSConv(8, 12)).eval(), torch.randn(2, 8, 9, 9)
    block(x)
    for other in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        other(x)
        made = kept_by(other)
        other(x)
        assert kept_by(other) is made


@torch.no_grad()
def test_what_is_kept_does_not_outlive_the_model():
    block = trained(FusedDSConv(8, 12)).eval()
    block(torch.randn(2, 8, 9, 9))
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_parametrized_weight_is_folded_anew():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    block = trained(FusedDSConv(8, 12)).eval()
    x = torch.randn(2, 8, 9, 9)
    block(x)
    nn.utils.parametrize.register_parametrization(block.pointwise, "weight", Twice())
    for _ in range(2):
        want = block.pointwise(block.bn1(block.depthwise(x)).relu())
        torch.testing.assert_close(block(x), block.bn2(want).relu(), rtol=1e-4, atol=1e-5)
        block.pointwise.parametrizations.weight.original.mul_(1.5)


def test_weights_that_want_gradients_again_get_them():
    block = trained(FusedDSConv(8, 12)).eval().requires_grad_(False)
    x = torch.randn(2, 8, 9, 9)
    assert not block(x).requires_grad and kept_by(block)
    block.bn1.requires_grad_()
    block(x).sum().backward()
    assert block.bn1.weight.grad is not None


@torch.no_grad()
def test_a_changed_activation_is_used():
    block = trained(FusedDSConv(8, 12)).eval()
    x = torch.randn(2, 8, 9, 9)
    before = block(x)
    block.activation = "identity"
    plain = unfused(block, nn.ReLU).eval()
    plain.act2 = nn.Identity()
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(block(x), before)
    block.depthwise.stride, block.depthwise.dilation = 1, [1, 1]  # as a caller may write them
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)
    block.activation = "swish"
    with pytest.raises(RuntimeError, match="pw_act must be one of"):
        block(x)


def test_padding_stride_dilation_and_dw_activation():
    for kwargs in (
        {"padding": "valid"},
        {"padding": (0, 2)},
        {"dilation": 2},
        {"kernel_size": (1, 5)},
        {"padding": "same", "kernel_size": 4},
    ):
        block = trained(FusedDSConv(6, 10, dw_activation="identity", activation="relu", **kwargs)).eval()
        x = torch.randn(2, 6, 13, 12)
        conv = block.depthwise
        want = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, 6)
        want = torch.relu(block.bn2(block.pointwise(block.bn1(want))))
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_default_padding_keeps_the_size():
    for kernel, dilation in ((3, 1), (5, 1), (7, 1), (3, 2), ((1, 11), 1)):
        assert FusedDSConv(4, 6, kernel, dilation=dilation)(torch.randn(2, 4, 13, 12)).shape == (2, 6, 13, 12)


def test_hooks_on_the_parts_still_run():
    block, seen = trained(FusedDSConv(6, 10)).eval(), []
    handle = block.pointwise.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 6, 8, 8)
    hooked = block(x)
    assert seen == [1]
    handle.remove()
    torch.testing.assert_close(hooked, block(x), rtol=1e-4, atol=1e-5)


def test_copy_pickle_and_save(tmp_path):
    block = trained(FusedDSConv(6, 10, activation=nn.LeakyReLU(0.2))).eval()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        want = block(x)
    torch.save(block, tmp_path / "block.pt")
    for other in (copy.deepcopy(block), torch.load(tmp_path / "block.pt", weights_only=False)):
        assert torch.equal(other(x), want)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_module_in_other_dtypes(dtype):
    block = trained(FusedDSConv(24, 40)).eval()
    x = torch.randn(2, 24, 14, 14)
    want = block(x)
    got = block.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    loose = {torch.bfloat16: 0.1, torch.float16: 2e-2, torch.float64: 1e-4}[dtype]
    torch.testing.assert_close(got.float(), want, rtol=loose, atol=loose)
