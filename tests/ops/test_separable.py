"""separable_conv2d, on the CPU and on CUDA, and FusedDSConv against float64 and against the unfused modules."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from blocks import Recorded
from cases import DTYPES, LAYOUTS
from implementations import AMPERE, ONE_SM, TURING
from problems import BLOCKS, operands
from properties import given, st
from reference import ACTIVATIONS, Convolution, check_separable
from torch import nn

import dwconv_ext
from dwconv_ext import FusedDSConv
from dwconv_ext.nn import folded_weights
from dwconv_ext.nn.folded_layers import ConvSettings, FoldedBlock

NONE = (None,) * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block, layout, dtype):
    tensors, conv = operands(BLOCKS[block], dtype, layout)
    check_separable(*tensors, conv, "relu", "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_implementation(block, layout, kernels):
    for dtype in DTYPES:
        tensors, conv = operands(BLOCKS[block], dtype, layout)
        for rounding in kernels.roundings(dtype):
            for _ in kernels.gpus(ONE_SM, AMPERE, TURING):
                for _ in kernels.fusions():
                    check_separable(*kernels.on_device(tensors), conv, "relu6", "identity", **rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_block_of_several_tiles(layout, dtype, isa):
    """Each begins in the middle of the image, and has pixels and outputs left over; with a residual."""
    tensors, conv = operands((1, 96, 21, (101, 61), (3, 3), Convolution((2, 2), (1, 1))), dtype, layout)
    residual = torch.randn(1, 21, 51, 31).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    check_separable(*tensors, conv, "relu", "relu", residual, peer=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(activation, dtype, layout, kernels):
    """And a residual, which is added after them."""
    tensors, conv = operands(BLOCKS["panel_plus_1"], dtype, layout)
    tensors[0].mul_(3)
    residual = torch.randn(1, 65, 8, 9).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    *tensors, residual = kernels.on_device((*tensors, residual))
    rounding = kernels.roundings(dtype)[0]
    check_separable(*tensors, conv, activation, "identity", residual, **rounding)
    check_separable(*tensors, conv, "identity", activation, **rounding)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends(activation, kernels):
    """Through an identity block: large values, NaN, infinities and zero, as torch.nn.functional has them."""
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 6.0, 20.0, -20.0, 88.0, -88.0, 104.0, -104.0, 1e30, -1e30, inf, -inf, nan]
    x = torch.tensor(values, device=kernels.device).reshape(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1, device=kernels.device)
    ours = dwconv_ext.separable_conv2d(x, one, None, one, None, dw_act="identity", pw_act=activation)
    want = ACTIVATIONS[activation](x.double()).float()  # torch's own float32 gelu is off by 1e-4 at -3 and NaN at infinity
    loose = 1e-3 if kernels.device == "cuda" else 2e-6  # tf32 may be on
    torch.testing.assert_close(ours, want, equal_nan=True, rtol=loose, atol=1e-30)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_no_bias(layout, dtype, kernels):
    (x, dw, _, pw, _), conv = operands(BLOCKS["panel_plus_1"], dtype, layout)
    residual = torch.randn(x.shape[0], len(pw), *x.shape[2:]).to(dtype)
    x, dw, pw, residual = kernels.on_device((x, dw, pw, residual))
    for memory_format in LAYOUTS.values():
        added = residual.contiguous(memory_format=memory_format)
        check_separable(x, dw, None, pw, None, conv, "relu", "relu", added, **kernels.roundings(dtype)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_packed_weights_give_the_same_bits(block, layout, isa):
    for dtype in DTYPES:
        (x, *weights), conv = operands(BLOCKS[block], dtype, layout)
        first = ConvSettings(*conv.args(), x.shape[1], "silu", 0.3)
        folded = FoldedBlock(first, ConvSettings(activation="leaky_relu", slope=0.2))
        tensors = (*weights[:2], *NONE, *weights[2:], *NONE)
        options = {"dw_act": "silu", "pw_act": "leaky_relu", "dw_slope": 0.3, "pw_slope": 0.2}
        want = dwconv_ext.separable_conv2d(x, *weights, *conv.args(), **options)
        residual = torch.randn(want.shape).to(dtype)
        calls = []
        with Recorded(calls):
            got, added = folded(x, tensors), folded(x, tensors, residual)
        assert calls.count("separable_conv2d_packed") == 2 and calls.count("separable_conv2d_pack") == 1
        assert torch.equal(got, want) and got.stride() == want.stride()
        assert torch.equal(added, dwconv_ext.separable_conv2d(x, *weights, *conv.args(), **options, residual=residual))
        without = FoldedBlock(ConvSettings(*conv.args(), x.shape[1], "relu"), ConvSettings(activation="relu"))
        want = dwconv_ext.separable_conv2d(x, weights[0], None, weights[2], None, *conv.args())
        assert torch.equal(without(x, (weights[0], None, *NONE, weights[2], None, *NONE)), want)


def test_what_packed_weights_are_not_for():
    (x, *weights), conv = operands(BLOCKS["panel"], torch.float32, "nchw")
    tensors = (*weights[:2], *NONE, *weights[2:], *NONE)
    residual = torch.randn(1, 64, 7, 8)
    settings = ConvSettings(*conv.args(), x.shape[1], "relu")

    def packs(x, residual=None, tensors=tensors, settings=settings):
        calls = []
        try:
            with Recorded(calls):
                FoldedBlock(settings, ConvSettings(activation="relu"))(x, tensors, residual)
        except (RuntimeError, NotImplementedError):
            return False
        return "separable_conv2d_packed" in calls

    assert packs(x) and packs(x, residual)
    for other in (x[:, 1:], x.to("meta"), x.clone().requires_grad_(), nn.Parameter(x)):
        assert not packs(other, residual)
    assert not packs(x, residual.double()) and not packs(x, residual.clone().requires_grad_())
    with torch.no_grad():
        assert packs(x.clone().requires_grad_())
    lopsided = settings._replace(padding="same")
    assert not packs(x, tensors=(torch.randn(16, 1, 2, 2), *tensors[1:]), settings=lopsided)


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
    with pytest.raises(RuntimeError, match=r"C = 7 channels of input"):
        block(x[:, 1:])
    assert packs(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_same_bits_for_any_number_of_threads(block, layout, dtype, threads):
    tensors, conv = operands(BLOCKS[block], dtype, layout)
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(dwconv_ext.separable_conv2d(*tensors, *conv.args()))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@given(st.data())
def test_random_blocks(data):
    def pick(*values):
        return data.draw(st.sampled_from(values))

    kernel = (pick(1, 3, 5, 7), pick(1, 2, 3, 5))
    conv = Convolution(
        (pick(1, 2, 3), pick(1, 2)), (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))), (pick(1, 1, 2), pick(1, 1, 2))
    )
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, conv.dilation, conv.padding, strict=True)]
    size = tuple(m + data.draw(st.integers(0, 15)) for m in least)
    block = (data.draw(st.integers(0, 2)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140)), size, kernel, conv)
    tensors, conv = operands(block, pick(*DTYPES), pick(*LAYOUTS), seed=data.draw(st.integers(0, 2**31)))
    check_separable(*tensors, conv, pick("relu", "identity"), pick("relu", "identity"), peer=False)


# ---- the module -------------------------------------------------------------------------------------------------------


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


NOTICED = {
    "in_place": lambda t: t[0].add_(1),
    "one_element": lambda t: t[0].view(-1)[777].mul_(2),
    "all_of_data": lambda t: t[1].data.mul_(2),
    "other_data": lambda t: setattr(t[0], "data", t[0].data.clone()),
    "swapped": lambda t: torch.utils.swap_tensors(t[0], nn.Parameter(t[0] * 2)),
}


@pytest.mark.parametrize("change", NOTICED)
@torch.no_grad()
def test_what_watched_tensors_notice(change):
    tensors = (nn.Parameter(torch.randn(64, 50)), torch.randn(3), None)
    watched = dwconv_ext._C.WatchedTensors(tensors)
    assert watched.unchanged(tensors)
    NOTICED[change](tensors)
    assert not watched.unchanged(tensors)


def test_watched_tensors_are_these_objects():
    a, b = torch.randn(5), torch.randn(5)
    watched = dwconv_ext._C.WatchedTensors((a, None))
    assert watched.unchanged((a, None))
    assert not any(map(watched.unchanged, [(b, None), (a,), (a, b), (a.clone(), None), (a.view(5), None)]))


def test_watched_tensors_know_the_instruction_set(isa):
    tensors = (torch.randn(5),)
    watched = dwconv_ext._C.WatchedTensors(tensors)
    dwconv_ext._C.select_isa("baseline")
    assert watched.unchanged(tensors) == (isa == "baseline")


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
