"""The table of activations: the kernels' names, derivatives that are autograd's, modules there and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwconv_ext import _C
from dwconv_ext.ops.activations import ACTIVATIONS, activate, activation_backward, activation_of, activation_of_module

X = torch.tensor([-7.0, -3.5, -2.9, -1.0, -0.1, 0.1, 1.0, 2.9, 3.5, 5.9, 7.0], dtype=torch.float64)


def test_names_are_the_kernels():
    assert ACTIVATIONS.keys() == _C.activations.keys()
    assert sorted(_C.activations.values()) == list(range(len(ACTIVATIONS)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives(name):
    x, grad = X.clone().requires_grad_(), torch.linspace(1, 2, len(X), dtype=torch.float64, requires_grad=True)
    y = activate(x, name, 0.3)
    (want,) = torch.autograd.grad(y, x, grad)
    with torch.no_grad():
        torch.testing.assert_close(activation_backward(grad, x, name, 0.3), want)
    torch.testing.assert_close(activation_backward(grad, x, name, 0.3), want)
    torch.autograd.gradcheck(lambda grad, x: activation_backward(grad, x, name, 0.3), (grad, x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_modules_there_and_back(name):
    slope = 0.3 if name == "leaky_relu" else 0.01
    module = ACTIVATIONS[name].module(slope)
    assert activation_of_module(module) == activation_of("FusedDSConv", "act", module) == (name, slope)
    torch.testing.assert_close(module(X.clone()), activate(X, name, slope))
    before = X.clone()
    for inplace in (False, True):
        torch.testing.assert_close(activate(before.clone(), name, slope, inplace), activate(X, name, slope))
    assert torch.equal(before, X)


def test_other_modules_are_none():
    class Own(nn.ReLU):
        def forward(self, x):
            return -x

    assert activation_of_module(Own()) is None and activation_of_module(nn.Tanh()) is None
