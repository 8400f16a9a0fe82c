"""Fused layers that follow each other become one call; a ShuffleNet's shuffles keep the layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from cases import LAYOUTS
from small_models import assert_same, check, fast, fused, picture
from torch import nn

from dwconv_ext.compile import freeze

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def calls_of(compiled, x):
    """This package's ops of a call."""
    with torch.no_grad():
        compiled(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(x)
    return [event.name.removeprefix("dwconv_ext::") for event in profile.events() if event.name.startswith("dwconv_ext::")]


def test_one_call_or_a_call_a_layer():
    model, x = nn.Sequential(sequential(16, 16), sequential(16, 16)), picture()
    assert calls_of(fast(model), x) == ["run_steps"]
    assert calls_of(fast(model, options={"sequences": False}), x) == 2 * ["separable_conv2d_packed"]
    assert calls_of(fast(model, options={"freeze": True}), x) == ["run_steps"]
    with pytest.raises(Exception, match="backend: sequences must be True or False, but got 1"):
        fast(model, options={"sequences": 1})(x)


def test_max_pooling_is_a_step():
    pools = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (1, 2), (1, 0), 2)]
    for layout in LAYOUTS.values():
        for pool in pools:
            torch._dynamo.reset()
            model, x = nn.Sequential(sequential(16, 16), pool, sequential(16, 16)), picture().contiguous(memory_format=layout)
            compiled = check(model, x, wanted={"blocks": 2, "poolings": 1})
            assert calls_of(compiled, x) == ["run_steps"]
            with torch.no_grad():
                assert compiled(x).stride() == model(x).stride()
                assert_same(freeze(torch.export.export(model.eval(), (x,)))(x), model(x))
    for other in (
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        nn.MaxPool2d(3, 1, 1),
    ):
        torch._dynamo.reset()
        x = picture(requires_grad=isinstance(other, nn.MaxPool2d) and not other.ceil_mode)
        assert_same(fast(other)(x), other(x))
        assert "poolings" not in fused()
    with torch.no_grad():
        assert fast(pools[0])(torch.empty(0, 16, 8, 8)).shape == (0, 16, 4, 4)


class Used(nn.Module):
    """Values that leave in the middle, and torch's operations in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (sequential(16, 16) for _ in range(3))

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(torch.softmax(b, 1)) + a
        return a, b * 2, c


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_leave_in_the_middle(layout):
    model, x = randomised(Used()), picture().contiguous(memory_format=LAYOUTS[layout])
    compiled = fast(model)
    with torch.no_grad():
        first = compiled(x)
        assert_same(first, model(x))
        compiled(picture().contiguous(memory_format=LAYOUTS[layout]))
        assert_same(first, model(x))  # nothing has written into them
    assert calls_of(compiled, x).count("run_steps") == 1


def test_gradients_where_they_are_wanted():
    """One graph, with the parameters frozen: the input may want a gradient or not."""
    model = sequential(16, 16)
    x = picture(requires_grad=True)
    compiled = fast(model)
    assert_same(compiled(x).detach(), model(x).detach())
    compiled(x).sum().backward()
    got, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-3, atol=1e-3)


def test_written_weights_are_seen():
    model, x = nn.Sequential(sequential(16, 16), sequential(16, 16)), picture()
    compiled = fast(model)
    with torch.no_grad():
        compiled(x)
        for write in (lambda t: t.mul_(1.5), lambda t: t.data.add_(0.1), lambda t: t.detach().numpy().__imul__(0.7)):
            write(model[1][3].weight)
            assert_same(compiled(x), model(x))
            write(model[0][1].running_mean)
            assert_same(compiled(x), model(x))


class Unit(nn.Module):
    """ShuffleNetV2's (Ma et al., arXiv:1807.11164), as torchvision writes it."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.stride, c = stride, channels // 2
        self.branch1 = nn.Sequential(
            nn.Conv2d(c, c, 3, 2, 1, groups=c), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU()
        ) if stride == 2 else nn.Sequential()  # fmt: skip
        self.branch2 = nn.Sequential(
            nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(),
            nn.Conv2d(c, c, 3, stride, 1, groups=c), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        if self.stride == 1:
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, self.branch2(b)), dim=1)
        else:
            x = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        n, c, h, w = x.shape
        return torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)


def shuffled(*units, last=True):
    return randomised(nn.Sequential(*units, *([nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1)] if last else [])))


@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("of_weights", LAYOUTS)
@pytest.mark.parametrize("last", (True, False))
@torch.no_grad()
def test_shuffles(last, of_weights, of_input):
    model = shuffled(Unit(16, 2), Unit(16), Unit(16), last=last).to(memory_format=LAYOUTS[of_weights])
    x = picture(c=8).contiguous(memory_format=LAYOUTS[of_input])
    want, compiled = model(x), fast(model)
    for got in (compiled(x), compiled(x)):
        assert_same(got, want)
        assert last or got.stride() == want.stride()
    if last and (of_weights == "channels_last" or of_input == "nchw"):
        assert fused()["channel shuffles"] == 3
        assert calls_of(compiled, x) == ["run_steps"]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_shuffles_that_others_see(layout):
    """Strides are part of what a model may read."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.conv = Unit(16), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            y = self.unit(self.conv(x))
            return y.view(-1), self.conv(y), y.chunk(2, dim=1)[0].add_(1)

    model = randomised(Seen()).to(memory_format=LAYOUTS[layout])
    x = picture().contiguous(memory_format=LAYOUTS[layout])
    want, got = model(x), fast(model)(x)
    assert_same(got, want)
    assert [t.stride() for t in got] == [t.stride() for t in want]


NOT_SHUFFLES = {
    "three_groups": lambda x: x.view(2, 4, 8, 8, 8).transpose(1, 2).contiguous().view(2, 32, 8, 8),
    "other_dims": lambda x: x.view(2, 2, 16, 8, 8).transpose(2, 1).transpose(3, 4).contiguous().view(2, 32, 8, 8),
    "two_rows": lambda x: x.view(2, 2, 16, 8, 8).transpose(1, 2).contiguous().view(2, 32, 8, 8).flip(1),
    "used_between": lambda x: (lambda y: y.contiguous().view(2, 32, 8, 8) + y.sum())(x.view(2, 2, 16, 8, 8).transpose(1, 2)),
}


@pytest.mark.parametrize("name", NOT_SHUFFLES)
@torch.no_grad()
def test_what_is_almost_a_shuffle(name):
    conv, after = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 4, 1)

    def model(x):
        return after(NOT_SHUFFLES[name](torch.cat((conv(x), x), 1)))

    x = picture()
    assert_same(fast(model)(x), model(x))


@torch.no_grad()
def test_dropout_in_eval_mode_is_what_it_was_given():
    conv, classifier = nn.Conv2d(16, 4, 1), nn.Linear(4, 3)

    def model(x):
        y = F.dropout(F.relu(conv(x)), 0.5, training=False, inplace=True)
        y = F.dropout2d(y, 0.5, training=False)
        return classifier(F.dropout(y.mean((2, 3)), 0.1, False)), F.dropout(x, 0.2, False)

    x = picture()
    want, got = model(x), fast(model)(x)
    assert_same(got, want)
    assert fused() == {"pointwise convolutions": 1, "poolings": 1, "linear layers": 1}
    assert got[1] is x


@torch.no_grad()
def test_telemetry_between_two_layers():
    body, after = sequential(16, 16), sequential(16, 16)

    def model(x):
        y = body(x)
        torch._C._log_api_usage_once("dwconv_ext.tests")
        return after(y + x)

    x = picture()
    compiled = fast(model)
    assert_same(compiled(x), model(x))
    assert calls_of(compiled, x) == ["run_steps"]


POOLS = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_pair": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "mean": lambda x: x.mean((2, 3)),
    "mean_kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1),
    "one_dimension": lambda x: x.mean(2).mean(2),
    "flatten_all": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(),
    "used_twice": lambda x: (lambda y: y + y.flatten(1)[:, :, None, None])(F.adaptive_avg_pool2d(x, 1)),
    "half": lambda x: x.mean((2, 3), dtype=torch.float64),
    "two_by_two": lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLS)
@torch.no_grad()
def test_pools(name, layout):
    conv = nn.Conv2d(16, 24, 1).to(memory_format=LAYOUTS[layout])
    x = picture().contiguous(memory_format=LAYOUTS[layout])
    assert_same(fast(lambda x: POOLS[name](conv(x)))(x), POOLS[name](conv(x)), tolerance=1e-5)
    assert bool(fused().get("poolings")) == (name not in ("one_dimension", "half", "two_by_two"))


@torch.no_grad()
def test_an_input_that_is_written_between_two_readers():
    """Both read it in channels_last, one before and one after."""
    a, b = (nn.Conv2d(16, 16, 3, groups=16).to(memory_format=torch.channels_last) for _ in range(2))

    def model(x):
        x = x * 2
        y = a(x)
        x.add_(1)
        return y + b(x) + a(x)

    x = picture()
    assert_same(fast(model)(x), model(x))
