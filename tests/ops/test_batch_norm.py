"""batch_norm_act, BatchNorm by the batch's statistics with its activation, against float64; and where the modules use it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import Recorded, sequential
from cases import LAYOUTS
from implementations import CUDA, EMULATOR, ONE_SM, running
from properties import given, st
from reference import check_batch_norm
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import dwconv_ext
from dwconv_ext import FusedDSConv, convert
from dwconv_ext.nn.batch_norm_act import norm_then_activation
from dwconv_ext.ops import batch_norm
from dwconv_ext.ops.activations import ACTIVATIONS

ops = torch.ops.dwconv_ext
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {
    "one_pixel": (2, 9, 1, 1),
    "one_channel": (3, 1, 5, 7),
    "lanes_less_one": (2, 7, 3, 5),
    "lanes_and_one": (2, 17, 3, 11),
    "small_planes_in_one_piece": (23, 5, 9, 11),
    "a_piece_less_one": (2, 3, 23, 89),
    "a_piece": (2, 3, 32, 64),
    "a_piece_and_one": (2, 3, 3, 683),
    "many_parts": (3, 33, 40, 41),
    "wide": (1, 600, 5, 9),
}


def operands(shape, dtype=torch.float32, layout="nchw", offset=3.0, spread=2.0):
    torch.manual_seed(0)
    channels = shape[1]
    x = torch.randn(shape) * spread + torch.randn(channels, 1, 1) * offset
    wide = torch.promote_types(dtype, torch.float32)
    w, b = torch.randn(channels, dtype=wide), torch.randn(channels, dtype=wide)
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), w, b


@pytest.fixture
def any_size(monkeypatch):
    """The modules use the op for small inputs too."""
    monkeypatch.setattr(batch_norm, "LEAST_NCHW", 0)
    monkeypatch.setattr(batch_norm, "LEAST_CHANNELS_LAST", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(kernels, name, dtype, layout):
    for _ in kernels.gpus(ONE_SM):
        check_batch_norm(*kernels.on_device(operands(SHAPES[name], dtype, layout)), "relu")


PROBLEMS = (
    st.tuples(st.integers(2, 4), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(DTYPES),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(list(ACTIVATIONS)),
)


@given(*PROBLEMS, st.sampled_from(dwconv_ext._C.supported_isas()))
def test_random_problems(shape, dtype, layout, act, isa):
    with running(isa):
        check_batch_norm(*operands(shape, dtype, layout), act, peer=False)


@given(*PROBLEMS)
def test_random_problems_on_the_emulator(shape, dtype, layout, act):
    with running(EMULATOR):
        check_batch_norm(*operands(shape, dtype, layout), act, peer=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(kernels, act, dtype, layout):
    for channels in (13, 16):  # in channels_last without and with runs of 16 bytes
        check_batch_norm(*kernels.on_device(operands((3, channels, 9, 10), dtype, layout)), act)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero_cancels_nothing(kernels, layout):
    """The first pixel is unlike the rest, as a padded border's is: no guess of the mean from it will do."""
    x, w, b = operands((2, 10, 60, 70), layout=layout, offset=0, spread=0.01)
    x += 300
    x[:, :, 0, 0] = 0
    check_batch_norm(*kernels.on_device((x, w, b)), "identity")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_weight_nor_bias(kernels, layout):
    x, _, _ = operands((2, 10, 6, 7), layout=layout)
    check_batch_norm(x.to(kernels.device), None, None, "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_expanded_gradients(kernels, layout):
    x, w, b = kernels.on_device(operands((4, 12, 9, 10), layout=layout))
    check_batch_norm(x[1:3, :, 2:7, 1:], w, b, "relu6")
    check_batch_norm(x, w, b, "relu6", grad_output=torch.tensor(0.5, device=x.device).expand(x.shape))
    check_batch_norm(x, w, b, "relu6", grad_output=torch.randn(x.shape, device=x.device))  # perhaps of the other layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_same_bits_for_any_number_of_threads(act, layout):
    x, w, b = operands((4, 70, 29, 31), layout=layout)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, mean, variance = ops.batch_norm_act(x, w, b, 1e-5, act)
        results.append((y, mean, variance, *ops.batch_norm_act_backward(y, x, w, b, mean, variance, 1e-5, act)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_channel(kernels, layout):
    x, w, b = kernels.on_device(operands((2, 5, 6, 7), layout=layout))
    x[1, 3, 2, 2] = float("nan")
    y, _, _ = ops.batch_norm_act(x, w, b, 1e-5, "relu")
    assert y[:, 3].isnan().all() and not y[:, [0, 1, 2, 4]].isnan().any()


@pytest.mark.parametrize("kernels", CUDA, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stages_of_several_batches(dtype, layout, kernels):
    """The statistics of two halves joined, and the sums of backward added, make what the whole batch has."""
    x, w, b = kernels.on_device(operands((6, 16, 9, 8), dtype, layout))
    grad = torch.randn(x.shape, device=x.device).to(x)
    halves, grads = x.split((4, 2)), grad.split((4, 2))
    y, mean, variance = ops.batch_norm_act(x, w, b, 1e-5, "silu")
    want = ops.batch_norm_act_backward(grad, x, w, b, mean, variance, 1e-5, "silu")

    means, variances = (torch.stack(t) for t in zip(*map(ops.batch_norm_statistics, halves), strict=True))
    share = torch.tensor([[2 / 3], [1 / 3]], device=x.device).to(means)
    joint = (share * means).sum(0)
    squares = (share * (variances + (means - joint) ** 2)).sum(0)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(joint, mean, **close)
    torch.testing.assert_close(squares, variance, **close)

    how = (w, b, mean, variance)
    for x_, y_ in zip(halves, y.split((4, 2)), strict=True):
        assert torch.equal(ops.batch_norm_act_apply(x_, *how, 1e-5, "silu"), y_)
    sums = [ops.batch_norm_act_backward_sums(g, x_, *how, 1e-5, "silu") for g, x_ in zip(grads, halves, strict=True)]
    totals = [torch.stack(t).sum(0) for t in zip(*sums, strict=True)]
    for got, wanted in zip(totals, want[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    shares = [t / (x.numel() // x.shape[1]) for t in want[1:]]
    for g, x_, wanted in zip(grads, halves, want[0].split((4, 2)), strict=True):
        got = ops.batch_norm_act_backward_apply(g, x_, *how, *shares, 1e-5, "silu")
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stages_are_cuda_s(layout):
    x, _, _ = operands((2, 3, 4, 4), layout=layout)
    with pytest.raises(RuntimeError, match="batch_norm_statistics: tensors must be on a GPU"):
        ops.batch_norm_statistics(x)


# --- derivatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["identity", "silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish"])
def test_gradcheck(act, layout):
    x, w, b = operands((2, 3, 3, 4), torch.float64, layout)
    given = [t.requires_grad_() for t in (x, w, b)]

    def output(*tensors):
        return ops.batch_norm_act(*tensors, 1e-5, act, 0.1)[0]

    assert gradcheck(output, given, check_forward_ad=True)
    assert gradgradcheck(output, given)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["silu", "hardswish", "gelu", "gelu_tanh"])
def test_slopes_far_out(act, layout, kernels):
    """From where an exponential is nothing to where a square is infinite: zero or one, as the slope is."""
    magnitudes = torch.cat((torch.logspace(-3, 38, 200), torch.linspace(0, 20, 333), torch.tensor([0.0, 1e-40])))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        z = torch.cat((magnitudes, -magnitudes)).to(wide)  # a weight of zero: the activation sees the bias
        x = (
            torch.tensor([1.0, -1.0])
            .reshape(2, 1, 1, 1)
            .expand(2, len(z), 2, 2)
            .to(dtype)
            .contiguous(memory_format=LAYOUTS[layout])
        )
        grad = torch.full_like(x, 0.125)
        zeros, ones = torch.zeros(len(z), dtype=wide), torch.ones(len(z), dtype=wide)
        got = ops.batch_norm_act_backward(*kernels.on_device((grad, x, zeros, z, zeros, ones)), 1e-5, act)[2].cpu()
        exact = z.double().requires_grad_()
        (want,) = torch.autograd.grad(ACTIVATIONS[act].forward(exact, 0.0, False).sum(), exact)
        limit = 1e-12 if dtype == torch.float64 else 2e-6
        same = (got.double() - want).abs() <= limit
        assert (same | want.isnan()).all(), (dtype, z[~same & ~want.isnan()])


def test_opcheck():
    x, w, b = operands((2, 3, 5, 4))
    _, mean, variance = ops.batch_norm_act(x, w, b, 1e-5, "silu")
    given = (x.requires_grad_(), w.requires_grad_(), b.requires_grad_())
    torch.library.opcheck(ops.batch_norm_act.default, (*given, 1e-5, "silu"))
    torch.library.opcheck(ops.batch_norm_act_backward.default, (torch.randn(x.shape), *given, mean, variance, 1e-5, "silu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(2, 3, 4)}, "input must be 4-dimensional"),
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, "input must be float32, float64, bfloat16 or float16"),
        ({"input": torch.randn(0, 3, 4, 4)}, "input must not be empty"),
        ({"weight": torch.randn(4)}, r"weight must have shape \[3\], but got \[4\]"),
        ({"bias": torch.randn(3).double()}, "bias must be torch.float32 for this input, but got torch.float64"),
        ({"eps": -1.0}, "eps must be non-negative"),
        ({"act": "mish"}, "act must be one of identity, relu"),
    ],
)
def test_errors(change, message):
    given = {"input": torch.randn(2, 3, 4, 4), "weight": None, "bias": None, "eps": 1e-5, "act": "relu", **change}
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm_act(**given)


def test_errors_of_backward():
    x, w, b = operands((2, 3, 4, 4))
    _, mean, variance = ops.batch_norm_act(x, w, b, 1e-5, "relu")
    with pytest.raises(RuntimeError, match="grad_output must have input's shape"):
        ops.batch_norm_act_backward(x[:1], x, w, b, mean, variance, 1e-5, "relu")
    with pytest.raises(RuntimeError, match=r"variance must have shape \[3\], but got \[2\]"):
        ops.batch_norm_act_backward(x, x, w, b, mean, variance[:2], 1e-5, "relu")


# --- in the modules ------------------------------------------------------------------------------------------------------


def step(model, x):
    """Output, gradients and buffers after a step of training."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads, **dict(model.named_buffers())}


def ops_of(model, x):
    calls = []
    with Recorded(calls):
        copy.deepcopy(model)(x)
    return calls


def assert_same_step(ours, plain, x, tolerance=1e-4):
    got, want = step(ours, x), step(plain, x)
    for name, value in want.items():
        scale = value.abs().max().clamp(min=1e-6) if value.is_floating_point() else 1
        assert (got[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
def test_a_converted_block_trains_like_the_original(any_size, act, layout):
    plain = sequential(act=act).double().train()
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(3, 16, 9, 11, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    assert_same_step(ours, plain, x, 1e-9)
    assert ops_of(ours, x).count("batch_norm_act") == 2


@pytest.mark.isa
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_kinds_of_batch_norm(any_size, affine, tracked, momentum):
    plain = nn.BatchNorm2d(6, momentum=momentum, affine=affine, track_running_stats=tracked).double().train()
    ours = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
        calls = []
        with Recorded(calls):
            y = norm_then_activation(ours, x, "relu", 0.01)
        assert "batch_norm_act" in calls
        torch.testing.assert_close(y, plain(x).relu())
    for got, want in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.isa
def test_narrow_parameters_and_autocast(any_size):
    x = torch.randn(4, 32, 12, 12)
    block = FusedDSConv(32, 32)
    plain = dwconv_ext.unfuse(copy.deepcopy(block)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_step(block.train(), plain, x, 0.1)
    block, plain = block.to(torch.bfloat16), plain.to(torch.bfloat16)
    assert "batch_norm_act" in ops_of(block, x.bfloat16())
    got, want = block(x.bfloat16()), plain(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(block.bn2.running_var, plain.bn2.running_var, rtol=0.02, atol=1e-3)


def test_frozen_hooked_and_replaced_parts_run_by_themselves(any_size):
    plain = sequential(act=nn.ReLU).train()
    x = torch.randn(3, 16, 9, 11)

    def fused(change):
        model = convert(copy.deepcopy(plain))
        reference = copy.deepcopy(plain)
        change(model), change(reference)
        assert_same_step(model, reference, x)
        return ops_of(model, x).count("batch_norm_act")

    assert fused(lambda m: None) == 2
    assert fused(lambda m: m[1].eval()) == 1
    assert fused(lambda m: m[2].register_forward_hook(lambda *_: None)) == 1
    assert fused(lambda m: m.__setitem__(2, nn.Tanh())) == 1
    assert fused(lambda m: m.__setitem__(4, nn.Identity())) == 1
    assert fused(lambda m: m.register_forward_hook(lambda *_: None)) == 2
    seen = []
    fused(lambda m: m[4].register_forward_hook(lambda *_: seen.append(1)))
    assert len(seen) == 3  # a step each, and one recorded


def test_dropout_between_batch_norm_and_activation(any_size):
    layers = sequential().train()
    plain = nn.Sequential(layers[0], layers[1], nn.Dropout(0.5), *layers[2:]).train()
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(3, 16, 9, 11)
    torch.manual_seed(5)
    want = plain(x)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    assert ops_of(ours, x).count("batch_norm_act") == 1


@pytest.mark.isa
def test_small_inputs_and_what_torch_takes_apart_are_left_to_torch():
    bn = nn.BatchNorm2d(32).train()

    def by_the_op(x, act="relu", bn=bn):
        calls = []
        with Recorded(calls):
            norm_then_activation(bn, x, act, 0.01)
        return "batch_norm_act" in calls

    large = torch.randn(8, 32, 32, 32)
    assert by_the_op(large) and not by_the_op(large[:1, :, :8, :8])
    last = torch.randn(64, 32, 32, 32).contiguous(memory_format=torch.channels_last)
    assert by_the_op(last) and not by_the_op(last, "identity") and by_the_op(last.contiguous(), "identity")
    for refused in (large[0], large[:, :31]):
        with pytest.raises((ValueError, RuntimeError)):
            norm_then_activation(bn, refused, "relu", 0.01)
    assert not by_the_op(large, bn=copy.deepcopy(bn).eval())
    assert torch.func.vmap(lambda x: norm_then_activation(nn.BatchNorm2d(32, track_running_stats=False), x, "relu", 0))(
        large[None]
    ).shape == (1, *large.shape)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FusedDSConv(8, 8, padding=1).train()(torch.randn(1, 8, 1, 1))


def test_second_order_through_a_block(any_size):
    block = FusedDSConv(4, 5, activation="silu").double().train()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(block, (x,))


# --- what a graph may stand for in training mode -------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, last=None):
        super().__init__()
        self.body = sequential(16, 16, last=False)
        self.last = last or nn.Identity()

    def forward(self, x):
        return x + self.last(self.body(x))


class DropPath(nn.Module):
    keep = 1.0

    def forward(self, x):
        return x * self.keep if self.training else x


class Counts(Residual):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Draws(Residual):
    def forward(self, x):
        return super().forward(x) if not self.training or torch.rand(()) < 2 else x


class Averages(Residual):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps.add_(1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Residual, Counts, Draws, Averages])
def test_training_keeps_what_forward_does_besides(any_size, kind):
    plain = kind().train()
    before, state = copy.deepcopy(plain.__dict__.get("calls")), torch.get_rng_state()
    ours = convert(copy.deepcopy(plain))
    assert torch.equal(torch.get_rng_state(), state) and ours.__dict__.get("calls") == before
    x = torch.randn(2, 16, 7, 7)
    torch.manual_seed(0)
    got = step(ours, x)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    want = step(plain, x)
    assert torch.equal(torch.get_rng_state(), after)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)
    if kind is Averages:
        assert ours.steps == 1
    assert ours.__dict__.get("calls", 0) == plain.__dict__.get("calls", 0)


def test_stochastic_depth_is_called_as_it_is_now(any_size):
    plain = Residual(DropPath()).train()
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(2, 16, 7, 7)
    assert ops_of(ours, x).count("batch_norm_act") == 1
    ours.last.keep = plain.last.keep = 0.5
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_module_that_does_something_else_in_training(any_size):
    class TwoHeads(Residual):
        def forward(self, x):
            y = super().forward(x)
            return (y, x.mean()) if self.training else y

    plain = TwoHeads().train()
    ours = convert(copy.deepcopy(plain))
    x = torch.randn(2, 16, 7, 7)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    assert isinstance(ours(x), tuple) and F.relu(ours.eval()(x)).shape == x.shape
