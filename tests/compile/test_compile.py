"""torch.compile(model, backend="dwconv_ext"): what is fused, with the plain model's results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from cases import LAYOUTS
from small_models import STYLES, TOLERANCE, Shortcut, assert_same, check, fast, fused, picture
from torch import nn

import dwconv_ext
import dwconv_ext.compile
from dwconv_ext.compile import last_report

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


@pytest.mark.parametrize(("style", "wanted"), [
    ("sequential", {"blocks": 1}), ("loop", {"blocks": 1}), ("functional", {"blocks": 1}), ("yolo", {"blocks": 1}),
    ("shortcut", {"blocks": 1, "expansions": 1}), ("in_place", {"blocks": 1}),
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
        "blocks": 1, "expansions": 1})  # fmt: skip


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
        model[1].running_mean.fill_(300), model[1].running_var.fill_(1e-12), model[1].bias.fill_(0.5)
        model, x = model.half(), torch.ones(1, 16, 8, 8).half()
        changed = dwconv_ext.convert(model) if way == "convert" else fast(model, options={"base": way})
        for _ in range(2):
            assert_same(changed(x), model(x), tolerance=0.05)


def test_dead_channel_in_float16_where_a_derivative_is_wanted():
    block = randomised(dwconv_ext.FusedDSConv(16, 16)).eval()
    with torch.no_grad():
        block.depthwise.weight.zero_()[:, 0, 1, 1] = 300
        block.bn1.running_mean.fill_(300), block.bn1.running_var.fill_(1e-12)
    assert block.half()(torch.ones(1, 16, 8, 8).half()).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_convolutions_of_any_stride(layout):
    """A residual network's shortcuts: the pixels that a stride skips are not read."""
    for stride in (2, (3, 3)):
        torch._dynamo.reset()
        layers = [nn.Conv2d(16, 24, 1, stride, bias=False), nn.BatchNorm2d(24), nn.SiLU()]
        model = randomised(nn.Sequential(*layers))
        x = picture(2, 16, 9, 7).contiguous(memory_format=LAYOUTS[layout])
        check(model, x, wanted={"pointwise convolutions": 1})
        torch._dynamo.reset()
        check(lambda x, y, model=model: model(x) * 2 + y, x, model.eval()(x).detach())
        torch._dynamo.reset()
        check(lambda x, y, model=model: model[0](x) + y, x, model(x).detach(), wanted={"pointwise convolutions": 1})
    torch._dynamo.reset()
    uneven = nn.Sequential(nn.Conv2d(16, 24, 1, (1, 2)), nn.ReLU())
    check(uneven, picture(), wanted={"other convolutions": 1})
