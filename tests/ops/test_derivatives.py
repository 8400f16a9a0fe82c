"""Derivatives of every kind, and what else torch asks of an op: opcheck, torch.compile, torch.func, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

import dwconv_ext
from dwconv_ext import DepthwiseConv2d, FusedDSConv, depthwise_conv2d, separable_conv2d

ops = torch.ops.dwconv_ext
ISA = dwconv_ext._C.selected_isa()
CONVOLUTIONS = {
    "plain": ((3, 3), 1, 1, 1),
    "stride2": ((3, 3), 2, 1, 1),
    "dilated": ((2, 3), 1, (0, 2), 2),
    "even_stride3": ((2, 2), (3, 1), 1, 1),
}


def operands(kernel, multiplier=1, layout="nchw", dtype=torch.float64):
    x = torch.randn(2, 3, 6, 5, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    w = torch.randn(3 * multiplier, 1, *kernel, dtype=dtype, requires_grad=True)
    b = torch.randn(3 * multiplier, dtype=dtype, requires_grad=True)
    return x, w, b


# What the derivatives are made of is the same in both layouts: all of them in one, and one in the other.
@pytest.mark.parametrize("name, layout", [*((name, "nchw") for name in CONVOLUTIONS), ("stride2", "channels_last")])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_gradcheck(name, multiplier, layout):
    kernel, *conv = CONVOLUTIONS[name]
    args = operands(kernel, multiplier, layout)
    assert gradcheck(lambda *t: depthwise_conv2d(*t, *conv), args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *t: depthwise_conv2d(*t, *conv), args, check_fwd_over_rev=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_every_implementation(layout, stride, kernels):
    x, w, b = (t.detach().to(kernels.device).requires_grad_() for t in operands((3, 3), layout=layout))
    pw = torch.randn(4, 3, 1, 1, dtype=torch.float64, device=kernels.device, requires_grad=True)

    def block(x, w, b, pw):
        return separable_conv2d(x, w, b, pw, None, stride, 1, 1, "silu", "gelu")

    def layer(x, w, b):
        return depthwise_conv2d(x, w, b, stride, 1)

    assert gradcheck(layer, (x, w, b), fast_mode=True) and gradgradcheck(layer, (x, w, b), fast_mode=True)
    assert gradcheck(block, (x, w, b, pw), fast_mode=True) and gradgradcheck(block, (x, w, b, pw), fast_mode=True)


@pytest.mark.parametrize("leave_out", ["x", "w", "b"])
def test_second_derivatives_where_only_some_are_needed(leave_out):
    x, w, b = operands((3, 3))
    named = {"x": x, "w": w, "b": b}
    named[leave_out].requires_grad_(False)
    wanted = [t for t in named.values() if t.requires_grad]

    def f(*given):
        found = iter(given)
        return depthwise_conv2d(*(next(found) if t.requires_grad else t for t in named.values()), padding=1)

    assert gradcheck(f, wanted) and gradgradcheck(f, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_modules_training_step_is_the_functions(stride, bias):
    module = DepthwiseConv2d(6, 6, 3, stride, padding=1, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, requires_grad=True)
    operands = [x, *module.parameters()]
    ours = module(x)
    function = depthwise_conv2d(x, module.weight, module.bias, stride, 1)
    assert torch.equal(ours, function)
    along = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, operands, along), torch.autograd.grad(function, operands, along), strict=True):
        assert torch.equal(a, b)
    assert gradgradcheck(lambda x: module(x), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(module(dual)).tangent is not None
    traced = torch.jit.trace(module, (x.detach(),), check_trace=False)
    assert torch.equal(traced(x), ours)


@pytest.mark.parametrize(
    "activations, layout",
    [
        (("relu", "identity"), "nchw"),
        (("silu", "gelu"), "channels_last"),
        (("leaky_relu", "relu6"), "nchw"),
        (("gelu_tanh", "silu"), "channels_last"),
        (("hardswish", "hardswish"), "nchw"),
    ],
)
def test_separable_gradcheck(activations, layout):
    x, dw, db = operands((3, 3), layout=layout)
    pw, pb = (
        torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    residual = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)

    def f(x, dw, db, pw, pb, residual):
        return separable_conv2d(x, dw, db, pw, pb, 1, 1, 1, *activations, residual, dw_slope=0.2, pw_slope=0.3)

    assert gradcheck(f, (x, dw, db, pw, pb, residual), check_forward_ad=True)
    assert gradgradcheck(f, (x, dw, db, pw, pb, residual))


def test_second_derivatives_agree_with_torch():
    x, w, b = operands((3, 3))

    def second(f):
        y = f(x, w, b)
        gx, gw = torch.autograd.grad((y**3).sum(), (x, w), create_graph=True)
        return torch.autograd.grad((gx**2).sum() + (gw**2).sum(), (x, w, b))

    for ours, theirs in zip(
        second(lambda *t: depthwise_conv2d(*t, padding=1)), second(lambda *t: F.conv2d(*t, padding=1, groups=3)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("of", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
def test_second_derivatives_of_several_gradients_at_once(of):
    """gradgradcheck asks for one gradient's derivative after another, never for those of their sum."""
    named = dict(zip("xwb", operands((3, 3), 2), strict=True))
    factors = {name: torch.randn_like(named[name]) for name in of}
    grad = torch.randn(2, 6, 6, 5, dtype=torch.float64, requires_grad=True)
    second = []
    for function in (depthwise_conv2d, lambda *t, **k: F.conv2d(*t, **k, groups=3)):
        y = function(*named.values(), padding=1)
        first = torch.autograd.grad(y, [named[name] for name in of], grad, create_graph=True)
        total = sum((g * factors[name]).sum() for name, g in zip(of, first, strict=True))
        second.append(torch.autograd.grad(total, (grad, *named.values()), materialize_grads=True))
    torch.testing.assert_close(*second)


OPCHECK = {
    "forward": lambda x, w, b: (ops.depthwise_conv2d.default, (x, w, b, (2, 1), (1, 1), (1, 1))),
    "forward_no_bias": lambda x, w, b: (ops.depthwise_conv2d.default, (x, w, None, (1, 1), (1, 1), (1, 1))),
    "backward": lambda x, w, b: (
        ops.depthwise_conv2d_backward.default,
        (torch.randn(2, 3, 6, 5), x, w, (1, 1), (1, 1), (1, 1), [True] * 3),
    ),
    "backward_some": lambda x, w, b: (
        ops.depthwise_conv2d_backward.default,
        (torch.randn(2, 3, 6, 5), x, w, (1, 1), (1, 1), (1, 1), [True, False, True]),
    ),
    "separable": lambda x, w, b: (
        ops.separable_conv2d.default,
        (
            x,
            w,
            b,
            torch.randn(4, 3, 1, 1, requires_grad=True),
            None,
            (1, 1),
            (1, 1),
            (1, 1),
            "relu",
            "silu",
            torch.randn(2, 4, 6, 5),
        ),
    ),
    "pack": lambda x, w, b: (ops.separable_conv2d_pack.default, (w.detach(), b.detach(), torch.randn(4, 3, 1, 1), None, ISA)),
    "packed": lambda x, w, b: (
        ops.separable_conv2d_packed.default,
        (
            x.detach(),
            ops.separable_conv2d_pack(w.detach(), b.detach(), torch.randn(4, 3, 1, 1), None, ISA),
            [4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3],
            [0.0, 0.0],
            torch.randn(2, 4, 6, 5),
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", OPCHECK)
def test_opcheck(sample, layout):
    op, args = OPCHECK[sample](*operands((3, 3), layout=layout, dtype=torch.float32))
    torch.library.opcheck(op, args)


class TwoConvolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = DepthwiseConv2d(8, 16, 3, padding=1)
        self.block = FusedDSConv(16, 24, stride=2, activation="silu")

    def forward(self, x):
        return self.block(self.first(x)).mean((2, 3))


@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize(
    "training, layout, backend", [(False, "nchw", "aot_eager"), (True, "nchw", "aot_eager"), (True, "channels_last", "inductor")]
)
def test_compile_fullgraph_with_dynamic_shapes(training, layout, backend):
    torch._dynamo.reset()
    model = TwoConvolutions().train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, size in ((2, 12), (3, 17), (5, 20)):
        x = torch.randn(batch, 8, size, size + 1).contiguous(memory_format=LAYOUTS[layout])
        state = {k: v.clone() for k, v in model.state_dict().items()}
        want = model(x)
        want.sum().backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters()}
        model.zero_grad()
        model.load_state_dict(state)
        got = compiled(x)
        got.sum().backward()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for k, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[k], rtol=1e-3, atol=1e-4, msg=lambda text, k=k: f"{k}: {text}")
        model.zero_grad()


def test_export_and_reload(tmp_path):
    model = TwoConvolutions().eval()
    x = torch.randn(2, 8, 12, 12)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_output_keeps_the_layout(layout):
    torch._dynamo.reset()
    f = torch.compile(lambda x, w: depthwise_conv2d(x.relu(), w, padding=1) * 2, fullgraph=True)
    x, w = torch.randn(2, 8, 9, 9).contiguous(memory_format=LAYOUTS[layout]), torch.randn(8, 1, 3, 3)
    assert f(x, w).stride() == x.stride()


def test_func_grad_vmap_and_per_sample_gradients():
    x, w, b = (t.detach() for t in operands((3, 3)))

    def loss(f):
        return lambda w, b, sample: (f(sample.unsqueeze(0), w, b) ** 2).sum()

    def ours(*t):
        return depthwise_conv2d(*t, padding=1)

    def theirs(*t):
        return F.conv2d(*t, padding=1, groups=3)

    per_sample = [torch.func.vmap(torch.func.grad(loss(f), (0, 1)), (None, None, 0))(w, b, x) for f in (ours, theirs)]
    for a, c in zip(*per_sample, strict=True):
        torch.testing.assert_close(a, c)
    ensemble = [torch.func.vmap(f, (None, 0, 0))(x, torch.stack([w, 2 * w]), torch.stack([b, -b])) for f in (ours, theirs)]
    torch.testing.assert_close(*ensemble)
    torch.testing.assert_close(torch.func.jacrev(ours)(x, w, b), torch.func.jacrev(theirs)(x, w, b))
    torch.testing.assert_close(torch.func.jacfwd(ours)(x, w, b), torch.func.jacfwd(theirs)(x, w, b))
    tangents = (torch.randn_like(x), torch.randn_like(w), torch.randn_like(b))
    torch.testing.assert_close(torch.func.jvp(ours, (x, w, b), tangents), torch.func.jvp(theirs, (x, w, b), tangents))
    hessians = [torch.func.hessian(lambda w, f=f: f(x, w, b).pow(3).sum())(w) for f in (ours, theirs)]
    torch.testing.assert_close(*hessians)


def test_vmap_of_the_fused_block():
    x, dw, pw = torch.randn(4, 2, 3, 6, 6), torch.randn(3, 1, 3, 3), torch.randn(4, 5, 3, 1, 1)

    def f(x, pw):
        return separable_conv2d(x, dw, None, pw, None, padding=1)

    for dims, args in (((0, None), (x, pw[0])), ((0, 0), (x, pw)), ((None, 0), (x[0], pw))):
        got = torch.func.vmap(f, dims)(*args)
        want = torch.stack([f(*(a if d is None else a[i] for a, d in zip(args, dims, strict=True))) for i in range(4)])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_does_what_it_does_for_conv2d(enabled):
    x, w, b = (
        torch.randn(2, 8, 9, 9, requires_grad=True),
        torch.randn(8, 1, 3, 3, requires_grad=True),
        torch.randn(8, requires_grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        ours, theirs = depthwise_conv2d(x, w, b), F.conv2d(x, w, b, groups=8)
        double = depthwise_conv2d(x.double(), w.double(), b.double())
        block = FusedDSConv(8, 12).eval()(x)
    assert ours.dtype == theirs.dtype == block.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert double.dtype == F.conv2d(x.double(), w.double(), groups=8).dtype == torch.float64
    grads = [torch.autograd.grad(y.float().sum(), (x, w, b)) for y in (ours, theirs)]
    for a, c in zip(*grads, strict=True):
        assert a.dtype == c.dtype == torch.float32
        torch.testing.assert_close(a, c, rtol=0.02, atol=0.5)


def test_inference_mode_and_no_grad():
    x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3, requires_grad=True)
    with torch.inference_mode():
        inner = depthwise_conv2d(x, w)
        block = FusedDSConv(8, 12).eval()
        assert block(x).is_inference()
    with torch.no_grad():
        assert not depthwise_conv2d(x, w).requires_grad
    assert inner.is_inference() and depthwise_conv2d(x, w).requires_grad


def test_another_padding_at_each_end():
    """Every derivative and transform; two values for each side are the same as four."""
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6, 5), (6, 1, 3, 2)))
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for stride, padding, dilation in ((1, (2, 0, 0, 1), 1), (2, (0, 3, 1, 2), (2, 1))):

        def call(x, w, b, conv=(stride, padding, dilation)):
            return dwconv_ext.depthwise_conv2d(x, w, b, *conv)

        torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, fast_mode=True)
        torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)
        want = torch.stack([call(t[None], w, b)[0] for t in x])
        torch.testing.assert_close(torch.vmap(call, (0, None, None))(x[:, None], w, b)[:, 0], want)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, w, b), call(x, w, b))
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x.float(), w.float(), b.float()).dtype == torch.bfloat16
    assert torch.equal(*(dwconv_ext.depthwise_conv2d(x, w, b, 1, p) for p in ((1, 2), (1, 1, 2, 2))))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", 1, (2, 1)])
def test_module_is_a_drop_in(mode, padding):
    ours = DepthwiseConv2d(6, 12, (3, 4), padding=padding, dilation=(1, 2), padding_mode=mode)
    theirs = torch.nn.Conv2d(6, 12, (3, 4), padding=padding, dilation=(1, 2), padding_mode=mode, groups=6)
    assert isinstance(ours, torch.nn.Conv2d)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 12, 13)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))


@pytest.mark.parametrize("size", [(9, 10), (3, 3), (3, 7), (7, 3)])
@pytest.mark.parametrize("channels", [1, 6])
def test_a_channels_last_module_gives_channels_last(channels, size):
    """As nn.Conv2d, whatever the input: one channel's is in both layouts, and only the weight says which is wanted."""
    ours = DepthwiseConv2d(channels, 2 * channels, 3).to(memory_format=torch.channels_last)
    theirs = torch.nn.Conv2d(channels, 2 * channels, 3, groups=channels).to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    x, x2 = (torch.randn(2, channels, *size, generator=torch.manual_seed(0)).requires_grad_() for _ in range(2))
    y, want = ours(x), theirs(x2)
    assert y.stride() == want.stride() and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_function_is_an_autograd_function():
    assert issubclass(dwconv_ext.DepthwiseConv2dFunction, torch.autograd.Function)
    x, w, b = operands((3, 3), dtype=torch.float32)
    y = dwconv_ext.DepthwiseConv2dFunction.apply(x, w, b, (1, 1), (1, 1), (1, 1))
    assert "DepthwiseConv2dFunction" in type(y.grad_fn).__name__
    assert "DepthwiseConv2dFunction" in type(depthwise_conv2d(x, w, b).grad_fn).__name__


def test_data_loader_workers_may_fork_after_use():
    depthwise_conv2d(torch.randn(2, 64, 56, 56), torch.randn(64, 1, 3, 3))

    class Filtered(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return depthwise_conv2d(torch.full((1, 2, 9, 9), float(i)), torch.ones(2, 1, 3, 3))

    loader = torch.utils.data.DataLoader(Filtered(), batch_size=1, num_workers=2, timeout=60)
    assert [float(y.max()) for y in loader] == [0.0, 9.0, 18.0, 27.0]
