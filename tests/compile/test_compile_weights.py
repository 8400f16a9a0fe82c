"""torch.compile(model, backend="dwconv_ext"): folded and packed weights follow the model's own, and die with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from small_models import Net, assert_same, check, fast, fused, picture
from torch import nn
from torch.utils.checkpoint import checkpoint

import dwconv_ext
from dwconv_ext.compile import last_report
from dwconv_ext.nn import folded_weights

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def optimizer_step(kind, **how):
    def write(model):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        kind(model.parameters(), lr=0.05, **how).step()

    return write


def all_data(write):
    def every(model):
        for p in model.parameters():
            write(p)

    return every


def one_element(model):
    model[3].weight[5, 7] += 3


WRITES = {
    "data_mul": all_data(lambda p: p.data.mul_(0.5).add_(0.1)),
    "data_copy": all_data(lambda p: p.data.copy_(p * 0.5)),
    "data_replaced": all_data(lambda p: setattr(p, "data", p.data * 0.5)),
    "from_numpy": all_data(lambda p: p.detach().numpy().__imul__(0.5)),
    "sgd": optimizer_step(torch.optim.SGD),
    "adamw_fused": optimizer_step(torch.optim.AdamW, fused=True),
    "sgd_fused": optimizer_step(torch.optim.SGD, fused=True),
    "adam_foreach": optimizer_step(torch.optim.Adam, foreach=True),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
    "load_state_dict_assign": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}, assign=True),
    "one_element": one_element,
    "one_element_of_a_view": lambda m: m[0].weight.view(-1)[77].fill_(9),
    "one_element_detached": lambda m: m[3].weight.detach()[9, 9].fill_(9),
    "statistics": lambda m: m[1].running_var[3].mul_(9),
    "new_parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)),
    "float_and_back": lambda m: m.double().float(),
    "swap_tensors": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight * 2)),
    "layout": lambda m: m.to(memory_format=torch.channels_last),
    "one_training_call": lambda m: (m.train(), m(picture()), m.eval()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_written_weights_are_seen(write, mode):
    model = sequential(16, 16)
    compiled, x = fast(model), picture()
    with mode():
        assert_same(compiled(x), before := model(x))
        assert fused() == {"blocks": 1}
    with torch.no_grad():
        WRITES[write](model)
    with mode():
        assert write in ("layout", "float_and_back") or not torch.allclose(model(x), before)
        assert_same(compiled(x), model(x))


def test_one_element_past_the_version_counter():
    """Documented: may be missed, until the caches are cleared."""
    model = sequential(64, 64)
    compiled, x = fast(model), picture(c=64)
    with torch.no_grad():
        compiled(x)
        model[3].weight.data[33, 22] += 100
        dwconv_ext.clear_caches()
        assert_same(compiled(x), model(x))


def test_statistics_of_few_channels_moved_by_training():
    """A training call in which all channels but one are dead, and have been for long."""
    model = nn.Sequential(nn.Conv2d(512, 512, 1, groups=512, bias=False), nn.BatchNorm2d(512, eps=1)).eval()
    model[1].running_var.zero_()
    compiled, x = fast(model), picture(1, 512, 4, 4)
    one_alive = torch.zeros_like(x)
    one_alive[:, 9] = torch.randn(4, 4) + 3
    with torch.no_grad():
        compiled(x)
        model.train()(one_alive)
        model.eval()
        assert_same(compiled(x), model(x))


def test_narrowed_and_widened():
    model, x = sequential(16, 16), picture()
    compiled = fast(model)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            assert_same(compiled(x.to(dtype)), model(x.to(dtype)))
            assert fused() == {"blocks": 1}


def test_weights_as_inputs():
    """Other weights at each call, as functional_call and hypernetworks have them."""
    compiled = fast(f := lambda x, w, p: F.conv2d(F.relu(F.conv2d(x, w, None, 1, 1, groups=16)), p))
    with torch.no_grad():
        for _ in range(3):
            inputs = picture(), torch.randn(16, 1, 3, 3), torch.randn(16, 16, 1, 1)
            assert_same(compiled(*inputs), f(*inputs))
        assert fused() == {"blocks": 1}
    model, x = sequential(16, 16), picture()
    compiled = fast(lambda x, state: torch.func.functional_call(model, state, (x,)))
    with torch.no_grad():
        for k in (1.0, 2.0):
            state = {name: p * k for name, p in model.named_parameters()}
            assert_same(compiled(x, state), torch.func.functional_call(model, state, (x,)))


def test_copied_and_pickled_after_compile():
    model, x = Net("yolo").eval(), picture()
    with torch.no_grad():
        model.compile(backend="dwconv_ext")
        right = model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(fast(model))]
        model.head[2].weight.mul_(2), model.body[0].dconv.conv.weight.mul_(2)
        assert not torch.allclose(model(x), right)
        for other in copies:
            assert_same(other(x), right)
    assert list(copies[0].state_dict()) == list(Net("yolo").state_dict())


def test_nothing_is_kept_after_a_reset():
    model = sequential(16, 16)
    check(model, picture(), wanted={"blocks": 1})
    dead = [weakref.ref(model), weakref.ref(model[0].weight)]
    del model
    torch._dynamo.reset()
    gc.collect()
    assert [d() for d in dead] == [None, None]


@pytest.mark.parametrize(
    "make, fused",
    (
        (lambda: sequential(16, 16), {"blocks": 1}),
        (lambda: nn.Conv2d(3, 3, 3, groups=3), {"depthwise convolutions": 1}),
        (lambda: nn.Conv2d(3, 4, 1), {"pointwise convolutions": 1}),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {"other convolutions": 1}),
        (lambda: nn.Linear(16, 4), {"linear layers": 1}),
    ),
)
def test_weights_die_with_their_model(make, fused):
    """As with torch's backend "eager": what is kept of a weight does not hold it."""
    model = make().eval()
    first = next(model.parameters())
    check(model, picture() if first.dim() == 4 and first.shape[0] == 16 else torch.randn(2, 3, 8, 16), wanted=fused)
    dead = weakref.ref(first)
    del model, first
    gc.collect()
    assert dead() is None


def test_parameters_swapped_on_conversion():
    model = sequential(16, 16)
    compiled, x = fast(model), picture()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            compiled(x)
            model.double()
            assert_same(compiled(x.double()), model(x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def entries_of(weight):
    return [e for es in folded_weights._entries.values() for e in es if id(weight) in e.tensors]


def test_graphs_share_what_is_kept():
    """One packed copy, for as many batch sizes and modes as there are graphs."""
    model = nn.Sequential(sequential(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)).eval()
    compiled = fast(model, dynamic=False)
    for n in (1, 2, 3):
        with torch.no_grad():
            compiled(picture(n))
        with torch.inference_mode():
            compiled(picture(n))
    # A layer's, and that of the one sequence of all layers, which holds the same bytes.
    first, last = entries_of(model[0][0].weight), entries_of(model[3].weight)
    assert len(first) == len(last) == 2
    (sequence,) = (entry for entry in first if entry in last)
    single = [entry.made for entry in (*first, *last) if entry is not sequence]
    packed = {bytes.data_ptr() for made in single for bytes in made.arguments if isinstance(bytes, torch.Tensor)}
    assert packed == {bytes.data_ptr() for bytes in sequence.made.weights}
    dwconv_ext.clear_caches()
    assert entries_of(model[3].weight) == []


def test_a_step_of_other_parameters_keeps_what_is_kept():
    teacher, student = sequential(16, 16), nn.Linear(3, 3)
    compiled, x = fast(teacher), picture()
    with torch.no_grad():
        compiled(x)
        (before,) = entries_of(teacher[0].weight)
    student(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    assert entries_of(teacher[0].weight) == [before]
    for p in teacher.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(teacher.parameters(), 0.1).step()
    assert entries_of(teacher[0].weight) == []


@torch.no_grad()
def test_one_convolution_with_two_norms():
    conv = sequential(16, 16)[0]
    norms = [sequential(16, 16)[1], nn.BatchNorm2d(16).eval()]
    model = dwconv_ext.convert(nn.Sequential(conv, norms[0], conv, norms[1]))
    x = picture()
    right = nn.Sequential.forward(model, x)
    for _ in range(2):
        assert_same(model(x), right)
        assert len(entries_of(conv.weight)) == 2


FREEZE = {"options": {"freeze": True}}


def test_frozen_models_of_one_structure_have_their_own_weights():
    """Dynamo runs them all by one graph."""
    models = [randomised(sequential(16, 16)) for _ in range(6)]
    x = picture()
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                assert_same(fast(model, **FREEZE)(x), model(x))
        either = fast(lambda model, x: model(x), **FREEZE)
        for model in models[:2]:
            assert_same(either(model, x), model(x))


@torch.no_grad()
def test_frozen_weights():
    model = nn.Sequential(sequential(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)).eval()
    right = copy.deepcopy(model)
    compiled = fast(model, dynamic=True, **FREEZE)
    for n in (2, 3, 300):  # more rows than the linear layer's kernel takes
        x = picture(n)
        assert_same(compiled(x), right(x))
        assert_same(compiled(x.contiguous(memory_format=torch.channels_last)), right(x))
    assert fused()["blocks"] == 1
    for p in model.parameters():
        p.mul_(2)
    dwconv_ext.clear_caches()
    assert_same(compiled(x), model(x))


def test_frozen_weights_in_other_modes():
    model = sequential(16, 16)
    compiled, x = fast(model, **FREEZE), picture()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        with context():
            torch.testing.assert_close(
                compiled(x), model(x), rtol=0.05, atol=0.1 if context().__class__ is torch.autocast else 1e-4
            )
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        assert_same(compiled.double()(x.double()), model(x.double()))


def test_frozen_weights_die_with_their_graph():
    model = sequential(16, 16)
    with torch.no_grad():
        fast(model, **FREEZE)(picture())
    dead = weakref.ref(model[0].weight)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert dead() is None


def test_nothing_is_frozen_beside_a_checkpoint():
    """Which replaces the base: the report says so, and the weights are looked at."""
    model = sequential(16, 16).requires_grad_(False)
    compiled, x = fast(lambda x: checkpoint(torch.sin, model(x), use_reentrant=False), **FREEZE), picture().requires_grad_()
    compiled(x)
    assert [r.why for r in last_report().refused if r.layer == "freeze"] == ["weights are not frozen where the base is aot_eager"]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    assert_same(compiled(x), torch.sin(model(x)))


def test_frozen_weights_in_forward_mode():
    model, x = sequential(16, 16).requires_grad_(False), picture()
    compiled = fast(model, **FREEZE)
    compiled(x)
    tangents = []
    for call in (compiled, model):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(call(dual)).tangent)
    assert_same(*tangents)
