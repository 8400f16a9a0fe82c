"""Checkpoints that someone else made: a state is data. Ours load where torch allows tensors alone, and nothing in one is run.

What a pickle imports and calls is torch.load's matter, and its weights_only refuses what the user has not allowed. Here: what our
classes make of a state, and what their pickles name.
"""

from __future__ import annotations

import io
import os
import pickle
import re

import pytest
import torch
from torch import nn

import dwconv_ext
from dwconv_ext import convert
from dwconv_ext.convert.replace import _new_swapped


class Scaled(nn.Conv2d):
    """A subclass that convert gives a class of ours, as it does timm's and others'."""

    def forward(self, x):
        return 2 * super().forward(x)


def block():
    return nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))


IMAGE, ROW = (2, 4, 8, 8), (2, 4, 8)
MODULES = {  # what makes one, and its input's shape
    "DepthwiseConv2d": (lambda: dwconv_ext.DepthwiseConv2d(4, 8, 3, padding=1), IMAGE),
    "DepthwiseConv1d": (lambda: dwconv_ext.DepthwiseConv1d(4, 8, 3, causal=True), ROW),
    "DepthwiseConvTranspose2d": (lambda: dwconv_ext.DepthwiseConvTranspose2d(4, 8, 3), IMAGE),
    "DepthwiseConvTranspose1d": (lambda: dwconv_ext.DepthwiseConvTranspose1d(4, 8, 3), ROW),
    "FusedDSConv": (lambda: dwconv_ext.FusedDSConv(4, 6, activation=nn.LeakyReLU(0.2)), IMAGE),
    "InvertedResidual": (lambda: dwconv_ext.InvertedResidual(4, 4, 1, 6), IMAGE),
    "DWConv": (lambda: dwconv_ext.models.DWConv(4, 6, 3), IMAGE),
    "MobileNetV1": (lambda: dwconv_ext.models.MobileNetV1(3, 0.25), (1, 3, 32, 32)),
    "MobileNetV2": (lambda: dwconv_ext.models.MobileNetV2(3, 0.1), (1, 3, 32, 32)),
    "convert(Sequential)": (lambda: convert(block()), IMAGE),
    "convert(subclass)": (lambda: convert(Scaled(4, 4, 3, groups=4)), IMAGE),
    "convert(Conv1d)": (lambda: convert(nn.Conv1d(4, 4, 3, groups=4)), ROW),
}
each = pytest.mark.parametrize("name", MODULES)


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@each
@torch.no_grad()
def test_a_state_dict_is_tensors_alone(name):
    make, shape = MODULES[name]
    module, other, x = make().eval(), make().eval(), torch.randn(shape)
    other.load_state_dict(torch.load(saved(module.state_dict()), weights_only=True))
    assert torch.equal(other(x), module(x))


class Naming(pickle.Unpickler):
    """Notes what a pickle imports."""

    def __init__(self, bytes: bytes) -> None:
        super().__init__(io.BytesIO(bytes))
        self.named: dict[str, object] = {}

    def find_class(self, module: str, name: str) -> object:
        return self.named.setdefault(f"{module}.{name}", super().find_class(module, name))


@each
def test_what_the_pickle_of_a_module_names(name):
    """Classes, torch's functions that make tensors, and the one of ours that makes an empty instance."""
    reader = Naming(pickle.dumps(MODULES[name][0]()))
    reader.load()
    functions = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"}
    functions |= {"dwconv_ext.convert.replace._new_swapped", "collections.OrderedDict", "builtins.set"}
    classes = re.compile(r"(torch\.nn|dwconv_ext|test_hostile_states)\..*\.?[A-Z]\w*")
    assert reader.named and not {each for each in reader.named.keys() - functions if not classes.fullmatch(each)}


class Run:
    """Notes that it was called."""

    calls = 0

    def __call__(self, *_, **__):
        Run.calls += 1


CODE = (
    "__import__('os').system('touch {}')",
    "__class__",
    "__init__",
    "forward",
    "eval",
    "os.system",
    "lambda x: x",
    "nn.ReLU()",
)


def copied(module: nn.Module, **changed) -> nn.Module:
    """As unpickling makes one."""
    kind, arguments, state, *_ = module.__reduce_ex__(2)
    again = kind(*arguments)
    again.__setstate__({**state, **changed})
    return again


@each
@torch.no_grad()
def test_nothing_in_a_state_is_run(name, tmp_path):
    """Whatever its keys: names of settings, of methods, of what nn.Module and object look up. A `forward` in it is the module's
    when it is called, as nn.Module has it for those that patch one; not before."""
    make, shape = MODULES[name]
    module, x = make().eval(), torch.randn(shape)
    want = module(x)
    own = {key for key in dir(type(module)) if not key.startswith("__")} | {"__reduce__", "__init__", "__class__", "__call__"}
    settings = {key for key in module.__dict__ if not key.startswith("_")} | {"causal", "checkpointing"}
    for key in sorted(own - settings - {"forward", "_conv_forward"}):
        again = copied(module, **{key: Run()})
        assert isinstance(again, type(module)) and again.__dict__[key] is not None
    for key in sorted(settings - {"training"}):
        for value in (Run(), *(text.format(tmp_path / "run") for text in CODE)):
            try:
                got = copied(module, **{key: value})(x)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                assert str(error)
            else:
                assert isinstance(got, torch.Tensor)
    assert not (tmp_path / "run").exists() and Run.calls == 0 and torch.equal(copied(module)(x), want)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["activation", "dw_activation"])
def test_an_activation_that_is_none_is_refused_when_it_is_loaded(name, train):
    module = dwconv_ext.FusedDSConv(4, 6).train(train)
    for value in CODE:
        with pytest.raises(
            ValueError, match=f"FusedDSConv: {name} must be one of identity, relu, .*, but got {re.escape(repr(value))}"
        ):
            copied(module, **{name: value})
    for value in (Run(), 7, None, ["relu"], b"relu", nn.ReLU()):
        with pytest.raises(TypeError, match=f"FusedDSConv: {name} must be an activation's name, but got "):
            copied(module, **{name: value})
    slope = name.replace("activation", "slope")
    for value in ("0.1", None, [0.1], os.system):
        with pytest.raises(TypeError, match=f"FusedDSConv: {slope} must be a number, but got "):
            copied(module, **{slope: value})
    assert copied(module, **{name: "silu"}).extra_repr() != module.extra_repr()


NO_LAYERS = {str(n): kind for n, kind in enumerate((os.system, eval, str, type, nn.Module, nn.Linear, "nn.Conv2d", None, Run()))}


@pytest.mark.parametrize("kind", NO_LAYERS.values(), ids=NO_LAYERS)
def test_what_makes_an_empty_instance_makes_no_other(kind):
    with pytest.raises(TypeError, match=r"a pickle must name a class of convolutions or of nn\.Sequential here, but has "):
        _new_swapped(kind)


class Calls:
    """A pickle that calls os.mkdir where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@each
def test_where_our_classes_are_allowed_nothing_else_is(name, tmp_path):
    """torch.load with weights_only, of a whole module, whose classes the user allows."""
    module = MODULES[name][0]()
    reader = Naming(pickle.dumps(module))
    reader.load()
    with torch.serialization.safe_globals([*reader.named.values(), *{type(part) for part in module.modules()}]):
        assert type(torch.load(saved(module), weights_only=True)) is type(module)
        for key in ("activation", "forward", "training", "_checkpointing"):
            hostile = MODULES[name][0]()
            hostile.__dict__[key] = Calls(tmp_path / "run")
            with pytest.raises(pickle.UnpicklingError, match="mkdir"):
                torch.load(saved(hostile), weights_only=True)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved(module), weights_only=True)
    assert not (tmp_path / "run").exists()
