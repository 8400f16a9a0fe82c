"""torch.compile(model, backend="dwconv_ext"): gradients, autocast and other modes, and what Dynamo allows a model to do."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from small_models import STYLES, Loop, Named, Net, Shortcut, assert_same, assert_same_step, check, fast, fused, picture
from torch import nn
from torch.utils.checkpoint import checkpoint

import dwconv_ext
from dwconv_ext.compile import last_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# --- gradients, autocast, checkpoint, inference mode -------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train", (True, False))
def test_training_step(style, train):
    model = STYLES[style]().train(train)
    plain, compiled = copy.deepcopy(model), fast(model)
    for _ in range(2):
        assert_same_step(model, plain, compiled, picture(), 1e-3)
        assert fused()["depthwise convolutions"] == 1
        for net in (model, plain):
            torch.optim.SGD(net.parameters(), lr=0.01).step()


def test_training_norm_and_activation_as_one():
    """In pictures that are large enough for it to run as one operation."""
    model = sequential(16, 16, nn.SiLU).train()
    plain, compiled = copy.deepcopy(model), fast(model)
    assert_same_step(model, plain, compiled, picture(2, 16, 64, 64), 1e-3)
    assert fused()["training BatchNorms"] == 2


def test_second_derivatives():
    model = sequential(16, 16, nn.SiLU)
    x = picture().requires_grad_()

    def twice(f):
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert_same(twice(fast(model)), twice(model), tolerance=1e-3)


def test_gradients_are_kept_from_a_frozen_part():
    for train in (True, False):
        model = Net("loop", "no_grad").train(train)
        fast(model)(picture()).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.2.weight", "head.2.bias"}
        assert fused()


def test_inference_mode_then_gradient():
    model = sequential(16, 16).requires_grad_(False)
    compiled, x = fast(model), picture()
    with torch.inference_mode():
        assert_same(compiled(x), model(x))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward(), model(b).sum().backward()
    assert_same(a.grad, b.grad)
    with torch.no_grad():
        assert_same(compiled(x), model(x))


@pytest.mark.parametrize("last", (slice(0, 5), slice(3, 4)), ids=("block", "pointwise"))
def test_gradient_through_the_shortcut_of_a_frozen_block(last):
    block = sequential(16, 16)[last].requires_grad_(False)
    a, b = picture().requires_grad_(), picture()
    fast(lambda a, b: a + block(b))(a, b).sum().backward()
    assert a.grad is not None and torch.equal(a.grad, torch.ones_like(a))


def test_statistics_read_between_norm_and_activation():
    bn = randomised(nn.BatchNorm2d(16)).train()
    plain = copy.deepcopy(bn)

    def forward(bn, x):
        y = bn(x)
        return bn.running_mean * 1, F.relu(y)

    x = picture()
    assert_same(fast(lambda x: forward(bn, x))(x), forward(plain, x))


def test_autocast():
    x = picture() * 100
    for model, wanted in (
        (sequential(16, 16), torch.bfloat16),
        (Shortcut().eval(), torch.float32),
        (Net("yolo").eval(), torch.bfloat16),
    ):
        compiled = fast(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y, right = compiled(x), model(x)
        assert y.dtype == right.dtype == wanted and fused()["blocks"] == 1
        assert_same(y, right, tolerance=0.06)


def test_autocast_off_within():
    class Wide(Loop):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, x = Wide().eval(), picture()
    compiled = fast(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(x), model(x), tolerance=1e-5)
    assert fused() == {"blocks": 1}


def test_no_fusion_over_a_change_of_mode():
    m = Named()

    def narrow_then_wide(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.dw(x)
        return m.pw(m.bn1(y.float()))

    def frozen_first(x):
        with torch.no_grad():
            y = m.bn1(m.dw(x))
        return m.pw(y)

    check(narrow_then_wide, picture(), tolerance=0.02)
    assert "blocks" not in fused()
    fast(frozen_first)(picture()).sum().backward()
    assert m.dw.weight.grad is None and m.pw.weight.grad is not None
    # With nothing to differentiate a block would be right too; the boundary stands all the same.
    for p in (m.dw, m.bn1, m.pw):
        p.requires_grad_(False)
    assert_same(fast(frozen_first)(x := picture()), frozen_first(x))
    assert fused() == {"depthwise convolutions": 1, "pointwise convolutions": 1}


def test_checkpoint_keeps_no_more_than_plain():
    model = Loop().train()

    def run(x):
        return checkpoint(model, x, use_reentrant=False).mean()

    def kept(f):
        total = 0

        def pack(t):
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = f(picture(h=32, w=32).requires_grad_())
        y.backward()
        return total

    assert kept(fast(run)) <= 1.2 * kept(run)
    assert last_report().base == "aot_eager"


def test_report_on_a_checkpoint():
    model = sequential(16, 16)
    check(lambda x: checkpoint(model, x, use_reentrant=False), picture())
    assert fused() or last_report().refused


# --- Dynamo: shapes, breaks, threads, modules edited -------------------------------------------------------------------


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_dynamic_sizes():
    torch._dynamo.utils.counters.clear()
    model = Net("shortcut").eval()
    compiled = fast(model, dynamic=True)
    with torch.no_grad():
        for n, h, w in ((2, 8, 8), (3, 8, 8), (5, 9, 7), (4, 12, 10), (7, 6, 11), (1, 8, 8)):
            assert_same(compiled(x := picture(n, 16, h, w)), model(x))
            assert fused()["blocks"] == 1
    assert graphs() <= 3


def test_train_and_eval():
    model = Net("sequential")
    plain, compiled = copy.deepcopy(model), fast(model)
    for train in (True, False, True, False):
        model.train(train), plain.train(train)
        assert_same_step(model, plain, compiled, x := picture(), 1e-3)  # in training the statistics move
        model.eval(), plain.eval()
        with torch.no_grad():
            assert_same(compiled(x), plain(x), tolerance=1e-3)
        assert fused()


def test_random_numbers_are_drawn_at_each_call():
    np = pytest.importorskip("numpy")
    block = sequential(16, 16)
    compiled, x = fast(lambda x: x if np.random.rand() < 0.5 else x + block(x)), picture()
    np.random.seed(0)
    with torch.no_grad():
        assert 5 <= sum(torch.equal(compiled(x), x) for _ in range(40)) <= 35


def test_branches_and_graph_breaks():
    first, second = sequential(16, 16), sequential(16, 16)

    def f(x):
        x = first(x / 255 if isinstance(x, torch.Tensor) else x)
        torch._dynamo.graph_break()
        return second(x) if x.sum() > 0 else second(-x)

    check(f, picture() * 255, wanted={"blocks": 1})  # of the last of the graphs
    check(f, picture() * -255)


def test_edited_after_the_first_call():
    for edit in (
        lambda m: m.append(nn.Softmax(1)), lambda m: m.insert(3, nn.Dropout2d().eval()), lambda m: m.__delitem__(-1),
        lambda m: m.__setitem__(3, nn.Conv2d(16, 8, 1)) or m.__delitem__(slice(4, 6)),
        *(lambda m, i=i: setattr(m[i], "forward", lambda x, old=m[i].forward: old(x) * 3 + 1) for i in range(6)),
    ):  # fmt: skip
        torch._dynamo.reset()
        model = sequential(16, 16)
        compiled = check(model, x := picture(), wanted={"blocks": 1})
        edit(model)
        with torch.no_grad():
            assert_same(compiled(x), model(x))


def test_threads():
    model, inputs = Net("shortcut").eval(), [picture(n) for n in (1, 2, 3, 4)]
    compiled, wrong = fast(model), []

    def run(x):
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert_same(compiled(x), model(x))
        except BaseException as e:
            wrong.append(e)

    workers = [threading.Thread(target=run, args=(x,)) for x in inputs]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


def test_submodules():
    model = nn.Sequential(sequential(16, 16), sequential(16, 16), nn.AvgPool2d(2))
    x = picture()
    with torch.no_grad():
        right = model(x)
        model[0], _ = fast(model[0]), model[1].compile(backend="dwconv_ext")
        assert_same(model(x), right)
    assert fused() == {"blocks": 1}


def test_equal_submodules_keep_what_each_packed(monkeypatch):
    packs, pack = [], dwconv_ext.nn.folded_layers._pack
    monkeypatch.setattr(dwconv_ext.nn.folded_layers, "_pack", lambda *a: packs.append(1) or pack(*a))
    layers = [sequential(16, 16) for _ in range(3)]
    for layer in layers:
        layer.compile(backend="dwconv_ext")
    with torch.no_grad():
        for _ in range(4):
            nn.Sequential(*layers)(picture())
    assert len(packs) == len(layers)


@pytest.mark.parametrize("transform", ("grad", "vmap", "vjp"))
def test_torch_func(transform):
    model, x = sequential(16, 16, nn.SiLU), picture()
    f = {
        "grad": lambda x: torch.func.grad(lambda t: model(t).square().sum())(x),
        "vmap": lambda x: torch.func.vmap(model)(torch.stack([x, -x])),
        "vjp": lambda x: torch.func.vjp(model, x)[1](x)[0],
    }[transform]
    assert_same(fast(f)(x), f(x))
