"""torch.compile(model, backend="dwconv_ext"): what is fused and what is not, and that the results are the plain model's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from small_models import STYLES, TOLERANCE, Named, Net, Shortcut, assert_same, assert_same_step, check, fast, fused, picture
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dwconv_ext
import dwconv_ext.compile
from dwconv_ext.compile import last_report
from dwconv_ext.nn import folded_layers

ACTIVATIONS = {
    "identity": (nn.Identity, lambda x: x),
    "relu": (nn.ReLU, F.relu),
    "relu_in_place": (lambda: nn.ReLU(inplace=True), F.relu_),
    "relu6": (nn.ReLU6, F.relu6),
    "relu6_in_place": (lambda: nn.ReLU6(inplace=True), lambda x: F.hardtanh(x, 0, 6, inplace=True)),
    "silu": (nn.SiLU, F.silu),
    "silu_in_place": (lambda: nn.SiLU(inplace=True), lambda x: F.silu(x, inplace=True)),
    "hardswish": (nn.Hardswish, F.hardswish),
    "hardswish_in_place": (lambda: nn.Hardswish(inplace=True), lambda x: F.hardswish(x, inplace=True)),
    "gelu": (nn.GELU, F.gelu),
    "gelu_tanh": (lambda: nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": (lambda: nn.LeakyReLU(0.3), lambda x: F.leaky_relu(x, 0.3)),
    "leaky_relu_in_place": (lambda: nn.LeakyReLU(0.1, inplace=True), lambda x: F.leaky_relu(x, 0.1, True)),
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# --- what is fused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "wanted"), [
    ("sequential", {"blocks": 1}), ("loop", {"blocks": 1}), ("functional", {"blocks": 1}), ("yolo", {"blocks": 1}),
    ("shortcut", {"blocks": 1, "pointwise convolutions": 1}), ("in_place", {"blocks": 1}),
])  # fmt: skip
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_styles(style, wanted, layout):
    model = STYLES[style]().eval().to(memory_format=layout)
    x = picture().to(memory_format=layout)
    compiled = check(model, x, wanted=wanted)
    with torch.no_grad():
        assert compiled(x).stride() == model(x).stride()
    assert last_report().refused == []


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    module, function = ACTIVATIONS[name]
    dw, bn1, _, pw, bn2, _ = sequential(16, 16)
    check(nn.Sequential(dw, bn1, module(), pw, bn2, module()), picture(), wanted={"blocks": 1})
    check(lambda x: function(bn2(pw(function(bn1(dw(x)))))), picture(), wanted={"blocks": 1})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_not_a_number_stays(name):
    dw, bn1, _, pw, bn2, _ = sequential(16, 16)
    x = picture()
    x[0, 3, 2, 2] = torch.nan
    act = ACTIVATIONS[name][0]
    check(nn.Sequential(dw, bn1, act(), pw, bn2, act()), x, wanted={"blocks": 1})


@pytest.mark.parametrize("part", (slice(0, 6), slice(0, 3), slice(3, 6)), ids=("block", "depthwise", "pointwise"))
def test_layout_of_the_weights_alone(part):
    model = sequential(16, 16)[part].to(memory_format=torch.channels_last)
    f = lambda x: model(x).permute(0, 2, 3, 1).view(-1)  # noqa: E731
    with torch.no_grad():
        assert_same(fast(f)(x := picture()), f(x))


def test_two_activations_in_one_block_and_others_outside():
    dw, bn1, _, pw, bn2, _ = sequential(16, 16)
    check(nn.Sequential(dw, bn1, nn.SiLU(), nn.Dropout(), pw, bn2, nn.LeakyReLU(2.0)).eval(), picture(), wanted={"blocks": 1})
    check(nn.Sequential(dw, bn1, nn.Mish(), pw), picture(), wanted={"depthwise convolutions": 1, "pointwise convolutions": 1})


def added_in_place(x, y):
    y += x
    return y


@pytest.mark.parametrize("add", (
    lambda x, y: x + y, lambda x, y: y + x, torch.add, lambda x, y: y.add(x), lambda x, y: y.add_(x), added_in_place,
))  # fmt: skip
def test_shortcuts_are_fused(add):
    block = sequential(16, 16, last=False)
    calls = []

    def counted(graph, inputs):
        run = dwconv_ext.compile.backend(graph, inputs)
        calls.extend(node.name for node in graph.graph.nodes if "add" in node.name and node.op != "call_module")
        return run

    with torch.no_grad():
        x = picture()
        assert_same(torch.compile(lambda x: add(x, block(x)), backend=counted)(x), x + block(x))
    assert fused() == {"blocks": 1} and not calls


def test_a_sum_into_the_shortcut_is_seen_by_others():
    block = sequential(16, 16, last=False)

    def f(x):
        x = x * 1
        skip = x
        x += block(x)
        return torch.cat([skip, x], 1)

    check(f, picture(), wanted={"blocks": 1})
    check(lambda x: (x.add_(block(x)), x[0]), picture())


def test_sums_that_are_no_shortcut():
    block = sequential(16, 16, last=False)
    for f in (
        lambda x: block(x) + x[:, :1],  # broadcast
        lambda x: torch.add(block(x), x, alpha=2),
        lambda x: block(x) + x.double(),
        lambda x: block(x) + 1,
        lambda x: (lambda y: y + y)(block(x)),
    ):
        check(f, picture(), wanted={"blocks": 1}, tolerance=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_dtypes(dtype, layout):
    check(Shortcut().eval().to(dtype, memory_format=layout), picture(dtype=dtype).to(memory_format=layout), wanted={
        "blocks": 1, "pointwise convolutions": 1})  # fmt: skip


def test_shapes_of_convolutions():
    for conv in (
        nn.Conv2d(16, 16, 4, padding="same", groups=16), nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16),
        nn.Conv2d(16, 48, 3, groups=16), nn.Conv2d(16, 16, (3, 5), (2, 1), (1, 0), groups=16, padding_mode="reflect"),
    ):  # fmt: skip
        check(nn.Sequential(conv, nn.ReLU()), picture(), wanted={"depthwise convolutions": 1})
    check(
        nn.Sequential(nn.Conv2d(16, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()).eval(),
        picture(),
        wanted={"other convolutions": 1},
    )
    check(nn.Conv2d(16, 16, 3), picture(), wanted={})
    check(sequential(16, 16), picture(n=0), wanted={"blocks": 1})
    check(nn.Conv2d(16, 16, 3, groups=16), picture()[0], wanted={})  # without a batch


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("bias", (True, False))
def test_linear_layers(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 7, bias)).to(dtype)
    few, many = 5, folded_layers.MOST_ROWS + 3
    for shape in ((few,), (1,), (), (2, few), (few, 1, 2), (many,), (0,), (2, 0)):
        torch._dynamo.reset()
        check(model, torch.randn(*shape, 24).to(dtype), wanted={"linear layers": 2})
    check(model, torch.randn(24, few).to(dtype).t(), wanted={"linear layers": 2})


def test_linear_layers_follow_their_weights():
    model, x = nn.Linear(24, 40), torch.randn(3, 24)
    compiled = check(model, x, wanted={"linear layers": 1})
    with torch.no_grad():
        for edit in (lambda: model.weight.data.mul_(2), lambda: model.bias.add_(1), lambda: setattr(model, "bias", None)):
            edit()
            assert_same(compiled(x), model(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(x), model(x), tolerance=0.01)
    x.requires_grad_()
    assert_same(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, model)))
    with pytest.raises(RuntimeError):
        fast(model)(torch.randn(3, 23))


def test_linear_layers_give_tensors_of_their_own():
    """No views, and torch's strides."""
    layer = nn.Linear(16, 8)
    compiled = fast(layer)
    with torch.no_grad():
        y = compiled(torch.randn(3, 16))
    y.mul_(torch.ones(3, 8, requires_grad=True))
    with torch.no_grad():
        compiled(torch.randn(3, 16)).detach_()
        for x in (torch.randn(16, 5).t(), torch.randn(1, 16, 4).transpose(1, 2), torch.randn(4, 3, 16).transpose(0, 1)):
            assert compiled(x).stride() == layer(x).stride()


def test_linear_layers_of_unusual_shapes():
    for size in ((0, 8), (16, 0)):
        torch._dynamo.reset()
        check(nn.Linear(*size), torch.randn(3, size[0]))
    weight = torch.randn(8, 16)
    for bias in (torch.randn(1), torch.randn(1, 8), torch.randn(5, 8), torch.tensor(1.0)):
        check(lambda x, b: F.linear(x, weight, b), torch.randn(5, 16), bias)
    check(lambda x: F.linear(x, torch.randn(16, 8).t() * 0 + 1), torch.randn(5, 16))
    with pytest.raises(RuntimeError):
        fast(lambda x, b: F.linear(x, weight.bfloat16(), b))(torch.randn(5, 16).bfloat16(), torch.randn(8))


class OnlyLinear(torch.Tensor):
    """A weight that knows F.linear alone, as quantised ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["inner"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return F.linear(args[0], args[1].inner * 2, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(function))


def test_weights_that_are_subclasses():
    layer, x = nn.Linear(16, 8), torch.randn(3, 16)
    layer.weight = nn.Parameter(OnlyLinear(layer.weight.detach()), requires_grad=False)
    with torch.no_grad():
        assert_same(fast(layer)(x), layer(x))


def test_sizes_that_follow_from_a_pictures_need_no_new_graphs():
    torch._dynamo.utils.counters.clear()
    w = torch.randn(16, 1, 3, 3)
    compiled = fast(f := lambda x: F.conv2d(x, w, padding=x.shape[-1] // 4, groups=16), dynamic=True)
    with torch.no_grad():
        for size in (8, 12, 16, 20, 24):
            assert_same(compiled(x := picture(2, 16, size, size)), f(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_numpy_numbers():
    np = pytest.importorskip("numpy")
    check(nn.Conv2d(16, 16, np.int64(3), stride=np.int64(2), padding=np.int64(1), groups=16), picture())


def test_dead_channel_in_float16():
    """mean * scale of a channel that never varies does not fit float16; what the block gives does."""
    model = sequential(16, 16)
    with torch.no_grad():
        model[0].weight.zero_()[:, 0, 1, 1] = 300
        model[1].running_mean.fill_(300), model[1].running_var.fill_(1e-12), model[1].weight.fill_(1), model[1].bias.fill_(0.5)
    check(model.half(), torch.ones(1, 16, 8, 8).half(), wanted={"blocks": 1}, tolerance=0.05)


@pytest.mark.parametrize("groups", (1, 16))
@pytest.mark.parametrize("way", ("convert", "eager", "aot_eager"))
def test_dead_channel_in_float16_outside_of_blocks(groups, way):
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(16)).eval()
    with torch.no_grad():
        conv.weight.zero_()
        for i in range(16):
            conv.weight[i, i if groups == 1 else 0, 1, 1] = 300
        model[1].running_mean.fill_(300), model[1].running_var.fill_(1e-12)
        model, x = model.half(), torch.ones(1, 16, 8, 8).half()
        changed = dwconv_ext.convert(model) if way == "convert" else fast(model, options={"base": way})
        for _ in range(2):
            assert_same(changed(x), model(x), tolerance=0.01)


def test_dead_channel_in_float16_where_a_derivative_is_wanted():
    block = randomised(dwconv_ext.FusedDSConv(16, 16)).eval()
    with torch.no_grad():
        block.depthwise.weight.zero_()[:, 0, 1, 1] = 300
        block.bn1.running_mean.fill_(300), block.bn1.running_var.fill_(1e-12)
    assert block.half()(torch.ones(1, 16, 8, 8).half()).isfinite().all()


# --- what is not -------------------------------------------------------------------------------------------------------


def test_report_says_why_and_where():
    class Mish(Named):
        def forward(self, x):
            y = self.bn1(self.dw(x))
            return self.pw(F.mish(y))

    check(Mish(), picture())
    (refusal,) = last_report().refused
    assert "mish" in refusal.why and refusal.layer
    assert "mish" in str(last_report()) and "1 depthwise convolutions" in str(last_report())
    assert "test_compile.py:" in refusal.line and refusal.line.endswith("y = self.bn1(self.dw(x))")
    assert last_report().base == "eager"


def test_values_used_twice():
    m = Named()
    check(lambda x: (lambda y: (m.bn1(y), y))(m.dw(x)), picture(), wanted={"depthwise convolutions": 1})
    check(lambda x: (lambda y: m.pw(y) + y.mean())(m.dw(x)), picture(), wanted={
        "depthwise convolutions": 1, "pointwise convolutions": 1})  # fmt: skip
    check(lambda x: (lambda y: (m.pw(y), y.detach()))(m.dw(x)), picture())


def test_writes_in_between():
    m = Named()

    def the_input(x):
        y = m.dw(x)
        x.mul_(3)
        return m.bn1(y), x

    def the_statistics(x):
        y = m.dw(x)
        m.bn1.running_mean.add_(1)
        z = m.bn1(y)
        m.bn1.running_mean.sub_(1)
        return z

    def the_result(x):
        y = m.dw(x)
        y.mul_(2)
        return m.bn1(y), y

    def a_view_of_the_input(x):
        v = x[:, :, 1:]
        y = m.dw(v)
        x[:, :, 2] = 5
        return m.pw(y)

    def a_view_of_the_result(x):
        y = m.dw(x)
        y[:, 3].zero_()
        return m.pw(y)

    def a_view_by_shape(x):
        return m.bn1(m.dw(x).view(1, 16, 8, 16))

    for f in (the_input, the_statistics, the_result, a_view_of_the_input, a_view_of_the_result):
        check(f, picture())
        assert "blocks" not in fused(), f.__name__
    check(a_view_by_shape, picture(n=2))


@pytest.mark.parametrize("compute", (
    weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal,
    lambda c: prune.l1_unstructured(c, "weight", 0.5),
))  # fmt: skip
def test_computed_weights(compute):
    model = sequential(16, 16)
    compute(model[3])
    model(picture()), model.eval()
    compiled = check(model, picture())
    assert "blocks" not in fused() and any("computed" in r.why for r in last_report().refused)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        assert_same(compiled(x := picture()), model(x))


def test_shared_modules():
    dw, bn, act, pw, _, _ = sequential(16, 16)
    model = nn.Sequential(dw, bn, act, pw, bn, act, dw, bn, act, pw, bn, act)
    compiled = check(model, picture(), wanted={"blocks": 2})
    with torch.no_grad():
        bn.weight.mul_(2)
        assert_same(compiled(x := picture()), model(x))


# --- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.xdist_group("inductor"))))
def test_bases(base):
    model = sequential(16, 16) if base == "inductor" else Net("shortcut").eval()
    compiled, x = fast(model, options={"base": base}), picture()
    with torch.no_grad():
        assert_same(compiled(x), model(x))
        assert last_report().base == base and fused()["blocks"] == 1
        for p in model.parameters():
            p.data.mul_(0.7)
        assert_same(compiled(x), model(x))
    if base == "aot_eager":
        assert_same_step(model, copy.deepcopy(model), compiled, x, 1e-3)


def test_unknown_option():
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(ValueError, match=r"base.*but got bse"):
        dwconv_ext.compile.backend(graph, [picture()], options={"bse": "eager"})
    # Dynamo wraps whatever a backend raises.
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ValueError: .*bse"):
        fast(lambda x: x + 1, options={"bse": "eager"})(picture())


def test_backend_is_known_by_name():
    assert "dwconv_ext" in torch._dynamo.list_backends(exclude_tags=())
    with torch.no_grad():
        torch._dynamo.lookup_backend("dwconv_ext")(torch.fx.symbolic_trace(nn.Identity()), [picture()])
    assert last_report() is not None and fused() == {}


NAMED = """
import torch
{before}
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
compiled = torch.compile(model, backend="dwconv_ext")
with torch.no_grad():
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
from dwconv_ext.compile import last_report
assert last_report().fused["blocks"] == 1
"""


@pytest.mark.parametrize("before", ("", "import dwconv_ext", "import torch._dynamo, dwconv_ext"), ids=("not", "first", "last"))
@pytest.mark.parametrize("installed", (True, False))
def test_the_name_alone(before, installed):
    """Imported by nobody, before Dynamo or after it; from an installed package, and from a source tree on the path."""
    known = bool(entry_points(group="torch_dynamo_backends", name="dwconv_ext"))
    if installed and not known:
        pytest.skip("the package is not installed")
    if not installed:
        if not before:
            pytest.skip("nothing names the package")
        hidden = "import importlib.metadata as m; m.entry_points = lambda **how: m.EntryPoints()"
        before = f"{hidden}\n{before}"
    environment = {**os.environ, "PYTHONPATH": str(Path(dwconv_ext.__file__).parents[1])}
    command = [sys.executable, "-c", NAMED.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_own_modules_and_converted_models():
    """A FusedDSConv and what convert made of a model are found as the block that they are."""
    block = randomised(dwconv_ext.FusedDSConv(16, 24, activation="silu"))
    check(block, picture(), wanted={"blocks": 1})
    check(dwconv_ext.convert(sequential(16, 16)), picture(), wanted={"blocks": 1})


def test_a_wanted_derivative_is_a_reason():
    fast(sequential(16, 16))(picture())
    assert "no_grad" in last_report().refused[0].why and fused() == {"depthwise convolutions": 1}


def test_reports_of_all_graphs():
    before = len(dwconv_ext.compile.reports())
    block = sequential(16, 16)

    def twice(x):
        x = block(x)
        torch._dynamo.graph_break()
        return x + 1

    check(twice, picture())
    assert [dict(r.fused) for r in dwconv_ext.compile.reports()[before:]] == [{"blocks": 1}, {}]


def test_a_refusal_names_the_module_where_no_line_is_known():
    dw, *_, pw, _, _ = sequential(16, 16)
    check(nn.Sequential(dw, nn.Tanh(), pw), picture())
    assert [r.line for r in last_report().refused] == ["module 0"]
