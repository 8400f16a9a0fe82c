"""Models by combination, edited after their first call, and rows of random edits: always as the plain model, edited alike."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from small_models import CHANNELS, REGIONS, STYLES, Net, assert_same, assert_same_step, picture
from torch import nn

import dwconv_ext
import dwconv_ext.compile

# What makes a model fast; its result is called like the model, whose own modules stay where they are.
WAYS = {
    "compile": lambda model: torch.compile(model, backend="dwconv_ext", options={"base": "eager"}),
    "convert": lambda model: dwconv_ext.convert(model, inplace=True),
}


def model_of(fast):
    """The module that is edited: the one that a compiled one wraps, or itself."""
    return getattr(fast, "_orig_mod", fast)


# --- the edits: each does the same to a model and to its copy, whatever class its layers have now ----------------------


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def append(net, r):
    net.body.append(STYLES[r.choice(sorted(STYLES))]().train(net.training).to(net.head[2].weight.dtype))


def append_to_head(net, r):
    net.head.append(nn.Softmax(1))


def replace_layer(net, r):
    old = r.choice(convolutions(net.body))
    parent = next(m for m in net.modules() if old in m.children())
    name = next(name for name, child in parent.named_children() if child is old)
    how = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups)
    new = nn.Conv2d(old.in_channels, old.out_channels, *how, bias=False)
    setattr(parent, name, new.to(old.weight.dtype))


def patch_forward(net, r):
    layer = r.choice(list(net.body))
    old = layer.forward
    layer.forward = lambda x: old(x) * 0.5 + 1


def hook(net, r):
    layer = r.choice([*convolutions(net.body), *net.body])
    layer.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(net, r):
    r.choice(list(net.body)).register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def write_data(net, r):
    r.choice(list(net.parameters())).data.mul_(-0.7)


def write_element(net, r):
    """By a torch operation, which the version counter sees, of one element among hundreds."""
    with torch.no_grad():
        weight = r.choice(convolutions(net.body)).weight
        weight.view(-1)[r.randrange(weight.numel())] += 2


def new_data(net, r):
    for p in net.parameters():
        p.data = p.data * 0.9 + 0.01


def double(net, r):
    net.double()


def narrow(net, r):
    net.bfloat16()


def single(net, r):
    net.float()


def channels_last(net, r):
    net.to(memory_format=torch.channels_last)


def switch_mode(net, r):
    net.train(not net.training)


def freeze(net, r):
    for p in r.choice([net.body, net.head, net]).parameters():
        p.requires_grad_(not p.requires_grad)


def norms_apart(net, r):
    """BatchNorms in the other mode than the rest."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train(not net.training)


def write_statistics(net, r):
    m = r.choice([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    m.running_mean.add_(0.5), m.running_var.mul_(1.5)


def optimizer_step(net, r, kind=torch.optim.SGD, **how):
    optimizer = kind(net.parameters(), lr=0.01, **how)
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p)
    optimizer.step()


def fused_step(net, r):
    if net.head[2].weight.dtype in (torch.float32, torch.float64):
        optimizer_step(net, r, torch.optim.AdamW, fused=True)


def load(net, r):
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    state = net.state_dict()
    net.load_state_dict({k: v + 0.1 * torch.rand(v.shape, generator=g).to(v) for k, v in state.items()}, assign=r.random() < 0.5)


def through_meta(net, r):
    """To no device and back, as large models are moved."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.to("meta")
    net.to_empty(device="cpu")
    net.load_state_dict(state)


EDITS = {e.__name__: e for e in (
    append, append_to_head, replace_layer, patch_forward, hook, pre_hook, write_data, write_element, new_data, double, narrow,
    channels_last, switch_mode, freeze, norms_apart, write_statistics, optimizer_step, fused_step, load, through_meta,
)}  # fmt: skip
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Dynamo gives a function up that it has compiled too often, and runs it plain: that would prove nothing. By default it does
    # not look for hooks registered after the first call, with any backend.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=200, skip_nnmodule_hook_guards=False):
        yield
    torch._dynamo.reset()


def both_edited(edit, fast, plain, seed):
    """The same edit of both, with the same random numbers."""
    for net in (model_of(fast), plain):
        torch.manual_seed(seed)
        edit(net, random.Random(seed))


def compare(fast, plain, x, train):
    net = model_of(fast)
    dtype = plain.head[2].weight.dtype
    # A region of bfloat16 rounds as that, whatever the model's own type.
    tolerance = max(ROUNDING[dtype], ROUNDING[torch.bfloat16] if plain.region == "autocast" else 0)
    x = x.to(dtype)
    if train and plain.region == "checkpoint" and any(m.training for m in plain.body.modules()):
        # Plain checkpointing runs the BatchNorms twice, and moves their statistics twice; a graph, of any backend, once.
        assert_same_step(net, plain, fast, x, tolerance, buffers=False)
        plain.load_state_dict(net.state_dict())
    elif train:
        assert_same_step(net, plain, fast, x, tolerance)
    else:
        with torch.no_grad():
            assert_same(fast(x.clone()), plain(x.clone()), tolerance=tolerance)


def combinations(count):
    """So many of all combinations, at random but always the same; each style, region and edit among them.

    One in ten has a checkpoint, which is slow to compile.
    """
    every = list(itertools.product(WAYS, STYLES, REGIONS, EDITS, (False, True)))
    r = random.Random(26)
    slow = [c for c in every if c[2] == "checkpoint"]
    chosen = [*r.sample([c for c in every if c not in slow], count - count // 10), *r.sample(slow, count // 10)]
    for at, values in enumerate((WAYS, STYLES, REGIONS, EDITS)):
        assert {c[at] for c in chosen} == set(values)
    return [pytest.param(*c, id="-".join([*c[:4], "train" if c[4] else "eval"])) for c in chosen]


@pytest.mark.parametrize(("way", "style", "region", "edit", "train"), combinations(100))
def test_edited_after_the_first_call(way, style, region, edit, train):
    net, x = Net(style, region).train(train), picture()
    plain = copy.deepcopy(net)
    fast = WAYS[way](net)
    compare(fast, plain, x, train)
    if way == "compile" and region != "checkpoint":  # whose body is a graph of its own
        assert dwconv_ext.compile.last_report().fused
    both_edited(EDITS[edit], fast, plain, seed=7)
    compare(fast, plain, x, train)
    if train:  # the statistics have moved
        compare(fast, plain, x, train=False)


def soak(way, edits, seed):
    """Random edits of a random model, with a call after each. Both go on from the same values, so that rounding stays small."""
    r = random.Random(seed)
    again = {**EDITS, "single": single}
    regions = [region for region in REGIONS if region != "checkpoint"]  # seconds to compile, each time

    def begin():
        torch._dynamo.reset()
        net = Net(r.choice(sorted(STYLES)), r.choice(regions)).train(r.random() < 0.5)
        plain = copy.deepcopy(net)
        return WAYS[way](net), plain

    fast, plain = begin()
    for at in range(edits):
        if at % 16 == 15 or len(plain.body) > 2:  # before it grows too large, and Dynamo's list of guarded graphs too long
            fast, plain = begin()
        name = r.choice(sorted(again))
        both_edited(again[name], fast, plain, seed=r.randrange(1 << 30))
        n, h, w = (2, 8, 8) if r.random() < 0.9 else (3, 9, 7)
        try:
            compare(fast, plain, picture(n, CHANNELS, h, w), train=r.random() < 0.4)
        except AssertionError as wrong:
            raise AssertionError(f"after edit {at}, {name}, of seed {seed}: {wrong}") from wrong
        plain.load_state_dict(model_of(fast).state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_random_edits(way):
    soak(way, 40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_random_edits(way):
    soak(way, 1000, seed=3)
