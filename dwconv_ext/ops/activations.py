"""The activations, in one table: as torch computes them, their derivatives, and the modules that stand for them.

csrc/activation.h has the same names, with the kernels' numbers for them; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01  # leaky_relu's where none is given, as in torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    forward: Callable[[Tensor, float, bool], Tensor]  # of x and the negative slope; in x's memory if the last is true
    backward: Callable[[Tensor, Tensor, float], Tensor]  # of the gradient, x and the slope
    module: Callable[[float], nn.Module]  # of the slope
    # The gradient in operations that have derivatives, where torch's backward op has none.
    differentiable_backward: Callable[[Tensor, Tensor], Tensor] | None = None


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


def _hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * torch.where(x < -3, 0, torch.where(x <= 3, x / 3 + 0.5, 1))


ACTIVATIONS = {
    "identity": Activation(lambda x, *_: x, lambda grad, *_: grad, lambda _: nn.Identity()),
    "relu": Activation(
        lambda x, _, inplace: F.relu(x, inplace),
        lambda grad, x, _: aten.threshold_backward(grad, x, 0),
        lambda _: nn.ReLU(),
    ),
    "relu6": Activation(
        lambda x, _, inplace: F.relu6(x, inplace),
        lambda grad, x, _: aten.hardtanh_backward(grad, x, 0.0, 6.0),
        lambda _: nn.ReLU6(),
    ),
    "silu": Activation(
        lambda x, _, inplace: F.silu(x, inplace),
        lambda grad, x, _: aten.silu_backward(grad, x),
        lambda _: nn.SiLU(),
        _silu_backward,
    ),
    "hardswish": Activation(
        lambda x, _, inplace: F.hardswish(x, inplace),
        lambda grad, x, _: aten.hardswish_backward(grad, x),
        lambda _: nn.Hardswish(),
        _hardswish_backward,
    ),
    "gelu": Activation(
        lambda x, *_: F.gelu(x),
        lambda grad, x, _: aten.gelu_backward(grad, x),
        lambda _: nn.GELU(),
    ),
    "gelu_tanh": Activation(
        lambda x, *_: F.gelu(x, approximate="tanh"),
        lambda grad, x, _: aten.gelu_backward(grad, x, approximate="tanh"),
        lambda _: nn.GELU(approximate="tanh"),
    ),
    "leaky_relu": Activation(
        lambda x, slope, inplace: F.leaky_relu(x, slope, inplace),
        lambda grad, x, slope: aten.leaky_relu_backward(grad, x, slope, False),
        lambda slope: nn.LeakyReLU(slope),
    ),
}
OF_MODULE = {type(activation.module(SLOPE)): name for name, activation in reversed(ACTIVATIONS.items())}


# In eval mode they give what they are given.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def activate(x: Tensor, name: str, slope: float = SLOPE, inplace: bool = False) -> Tensor:
    """The activation by torch; in x's memory where torch can and inplace allows it."""
    return ACTIVATIONS[name].forward(x, slope, inplace)


def activation_backward(grad: Tensor, x: Tensor, name: str, slope: float) -> Tensor:
    """grad times the activation's derivative at x, differentiable in both."""
    activation = ACTIVATIONS[name]
    if activation.differentiable_backward and torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad):
        return activation.differentiable_backward(grad, x)
    return activation.backward(grad, x, slope)


def activation_of_module(module: nn.Module) -> tuple[str, float] | None:
    """The name and negative slope of an activation module; None where the ops have none."""
    name = OF_MODULE.get(type(module))
    if type(module) is nn.GELU and module.approximate == "tanh":
        name = "gelu_tanh"
    return None if name is None else (name, float(getattr(module, "negative_slope", SLOPE)))


def activation_of(argument: str, activation: str | nn.Module) -> tuple[str, float]:
    """The same of an activation given as a string or as an nn.Module.

    Raises:
        ValueError: neither; it names the argument.
    """
    if isinstance(activation, str):
        found = (activation, SLOPE) if activation in ACTIVATIONS else None
    else:
        found = activation_of_module(activation)
    if found is None:
        modules = ", ".join(sorted(f"nn.{kind.__name__}" for kind in OF_MODULE))
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"{argument} must be one of {names} or an instance of {modules}, but got {activation!r}")
    return found
