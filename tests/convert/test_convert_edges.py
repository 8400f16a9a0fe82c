"""convert: a converted model does what the plain one does with subclasses, edits and inputs that its author did not think of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from small_models import assert_same, picture
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import dwconv_ext
from dwconv_ext import DepthwiseConv2d, FusedDSConv, convert


class AlwaysDrops(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


class Doubles(nn.Identity):
    def forward(self, x):
        return 2 * x


class Backwards(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


class Thrice(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 3


class Rebuilt(nn.Sequential):
    def __reduce__(self):
        return _rebuilt, (list(self.children()),)


def _rebuilt(layers):
    return Rebuilt(*layers).eval()


def pair():
    return nn.Conv2d(16, 16, 1), randomised(nn.BatchNorm2d(16))


MODELS = {
    "identity_subclass": lambda: nn.Sequential(*sequential(16, 16)[:2], Doubles(), *sequential(16, 16)[2:]),
    "own_iteration": lambda: Backwards(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),
    "own_call": lambda: nn.Sequential(Thrice(nn.Conv2d(16, 16, 1)), nn.ReLU()),
    "own_reduce": lambda: Rebuilt(*sequential(16, 16)),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_subclasses(name):
    model, x = MODELS[name]().eval(), picture()
    converted = convert(model)
    for other in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_same(other(x), model(x))


@torch.no_grad()
def test_a_dropout_that_always_drops():
    model = nn.Sequential(*pair(), AlwaysDrops(0.5)).eval()
    zeros = (convert(model)(picture()) == 0).float().mean()
    assert 0.3 < zeros < 0.7


@torch.no_grad()
def test_a_class_patched_after_conversion(monkeypatch):
    model, x = convert(sequential(16, 16)), picture()
    model(x)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * 3)
    assert_same(model(x), nn.Sequential.forward(model, x))


class Replaces(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result + 1 if function in (torch.conv2d, F.relu, torch.relu) else result


@torch.no_grad()
def test_a_function_mode_sees_what_it_sees_in_the_plain_model():
    model, x = sequential(16, 16), picture()
    converted = convert(model)
    with Replaces():
        assert_same(converted(x), model(x))
    with torch.device("cpu"):  # torch.set_default_device's
        assert_same(converted(x), model(x))


class Shifted(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return result + 1 if function in (F.conv2d, torch.conv2d) else result


@pytest.mark.parametrize("at", (0, 3))
@torch.no_grad()
def test_a_weight_that_is_a_subclass(at):
    model, x = sequential(16, 16), picture()
    model[at]._parameters["weight"] = model[at].weight.detach().as_subclass(Shifted)
    assert_same(convert(model)(x), model(x))


@torch.no_grad()
def test_tensors_as_plain_attributes():
    for part, name in ((1, "weight"), (1, "running_mean"), (3, "weight"), (0, "bias")):
        model, x = sequential(16, 16), picture()
        value = getattr(model[part], name)
        value = torch.ones(16) if value is None else value.detach() * 2
        delattr(model[part], name)
        setattr(model[part], name, value)
        assert_same(convert(model)(x), model(x))


WRONG = {
    "norm_of_more_channels": lambda: (nn.Sequential(nn.Conv2d(16, 1, 1), nn.BatchNorm2d(32)), picture()),
    "norm_of_one_channel": lambda: (nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(1)), picture()),
    "norm_of_another_dtype": lambda: (nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16).half()), picture()),
    "integers": lambda: (sequential(16, 16), picture().int()),
    "float64_on_float32": lambda: (sequential(16, 16), picture().double()),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("autocast", (False, True))
@torch.no_grad()
def test_what_torch_refuses_is_refused(name, autocast):
    model, x = WRONG[name]()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            right = model(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                convert(model)(x)
        else:
            assert_same(convert(model)(x), right, tolerance=0.05)


@torch.no_grad()
def test_other_devices_and_layouts():
    model, x = sequential(16, 16), picture()
    assert convert(model).to("meta")(x.to("meta")).shape == x.shape
    assert FusedDSConv(16, 16).eval().to("meta")(x.to("meta")).shape == x.shape
    assert_same(convert(nn.Sequential(*pair()[:1], nn.ReLU()))(x.to_mkldnn()).to_dense().shape, x.shape)


@torch.no_grad()
def test_a_convolution_edited_after_conversion():
    model, x = convert(sequential(16, 16)), picture()
    model[0].groups, model[0].weight = 1, nn.Parameter(torch.randn(16, 16, 3, 3))
    assert_same(model(x), nn.Sequential.forward(model, x))
    assert_same(model[0](x), F.conv2d(x, model[0].weight, padding=1))


def test_running_statistics_under_a_checkpoint():
    moved = []
    for change in (lambda m: m, convert):
        torch.manual_seed(0)
        model = change(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()))
        checkpoint(model, torch.randn(8, 16, 40, 40), use_reentrant=False).sum().backward()
        moved.append({name: b.clone() for name, b in model.named_buffers()})
    assert_same(moved[1], moved[0], tolerance=1e-4)


def test_script_of_modules_outside_of_containers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.own = nn.Conv2d(8, 8, 3, groups=8), DepthwiseConv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.own(self.conv(x).relu())

    model, x = Net().eval(), torch.randn(1, 8, 9, 9)
    converted = convert(model)
    assert type(converted.conv) is DepthwiseConv2d
    assert_same(torch.jit.script(converted)(x), model(x))


def test_script_of_containers_in_a_module():
    """torch.jit.script frees what it replaces while it goes on: nothing that is made meanwhile may be taken for it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = [sequential(8 + i, 9 + i) for i in range(12)]
            self.blocks = nn.ModuleList(nn.Sequential(nn.Sequential(*block[:3]), block[3:]) for block in blocks)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Net().eval(), picture(c=8)
    for _ in range(3):
        assert_same(torch.jit.script(convert(model))(x), model(x))


def test_quantization_takes_the_plain_model():
    """Tools that replace modules by their type know torch's: dwconv_ext.unfuse gives them."""
    import torch.ao.quantization as tq

    model = convert(sequential(16, 16).eval())
    plain = dwconv_ext.unfuse(model)
    assert type(tq.fuse_modules(plain, [["0", "1", "2"]])[0]).__module__.startswith("torch.")
