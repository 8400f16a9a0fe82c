"""Linear layers under torch.compile(model, backend="dwconv_ext")."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_same, check, fast
from torch import nn

from dwconv_ext.compile import freeze
from dwconv_ext.nn import folded_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("bias", (True, False))
def test_linear_layers(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 7, bias)).to(dtype)
    few, many = 5, folded_linear.MOST_ROWS + 3
    for shape in ((few,), (1,), (), (2, few), (few, 1, 2), (many,), (0,), (2, 0)):
        torch._dynamo.reset()
        check(model, torch.randn(*shape, 24).to(dtype), wanted={"linear layers": 2})
    check(model, torch.randn(24, few).to(dtype).t(), wanted={"linear layers": 2})


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_linear_layers_of_parts(layout):
    """Of what begins later in its memory."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 4)

        def forward(self, x):
            one, two = self.conv(x).mean((2, 3)).split(2)
            return self.first(one[1:]), self.second(two), self.second(two[:, None])

    model, x = Heads().eval(), torch.randn(6, 3, 7, 8).contiguous(memory_format=layout)[1:5]
    check(model, x)
    frozen = freeze(torch.export.export(model, (x,)))
    with torch.no_grad():
        assert_same(frozen(x), model(x))


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
