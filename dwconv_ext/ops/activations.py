"""The activations and the gates, in one table each: as torch computes them, and the modules that stand for them.

csrc/common/activation.h has the same names, with the kernels' numbers for them; a test holds the two together. Those that are
functions of torch.nn.functional have their names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01  # leaky_relu's where none is given, as in torch


class Activation(NamedTuple):
    forward: Callable[[Tensor, float, bool], Tensor]  # of x and the negative slope; in x's memory if the last is true
    module: Callable[[float], nn.Module]  # of the slope


ACTIVATIONS = {
    "identity": Activation(lambda x, *_: x, lambda _: nn.Identity()),
    "relu": Activation(lambda x, _, inplace: F.relu(x, inplace), lambda _: nn.ReLU()),
    "relu6": Activation(lambda x, _, inplace: F.relu6(x, inplace), lambda _: nn.ReLU6()),
    "silu": Activation(lambda x, _, inplace: F.silu(x, inplace), lambda _: nn.SiLU()),
    "hardswish": Activation(lambda x, _, inplace: F.hardswish(x, inplace), lambda _: nn.Hardswish()),
    "gelu": Activation(lambda x, *_: F.gelu(x), lambda _: nn.GELU()),
    "gelu_tanh": Activation(lambda x, *_: F.gelu(x, approximate="tanh"), lambda _: nn.GELU(approximate="tanh")),
    "leaky_relu": Activation(lambda x, slope, inplace: F.leaky_relu(x, slope, inplace), lambda slope: nn.LeakyReLU(slope)),
}
GELU_OF = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate`: one function and one module of torch's stand for both
OF_MODULE = {type(activation.module(SLOPE)): name for name, activation in ACTIVATIONS.items() if name != "gelu_tanh"}

# Of squeeze-and-excitation.
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}

# In eval mode they give what they are given.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def activate(x: Tensor, name: str, slope: float = SLOPE, inplace: bool = False) -> Tensor:
    """The activation by torch; in x's memory where torch can and inplace allows it."""
    return ACTIVATIONS[name].forward(x, slope, inplace)


def activation_backward(grad: Tensor, x: Tensor, name: str, slope: float) -> Tensor:
    """grad times the activation's derivative at x, differentiable in both."""
    return torch.func.vjp(lambda x: activate(x, name, slope), x)[1](grad)[0]


def activation_of_module(module: nn.Module) -> tuple[str, float] | None:
    """The name and negative slope of an activation module; None where the ops have none."""
    name = OF_MODULE.get(type(module))
    if name == "gelu":
        name = GELU_OF.get(module.approximate)
    if name == "relu6" and (module.min_val, module.max_val) != (0, 6):
        name = None
    return None if name is None else (name, float(getattr(module, "negative_slope", SLOPE)))


def activation_of(owner: str, argument: str, activation: str | nn.Module) -> tuple[str, float]:
    """The same of an activation given as a string or as an nn.Module.

    Raises:
        ValueError: neither; it names the owner and the argument.
    """
    if isinstance(activation, str):
        found = (activation, SLOPE) if activation in ACTIVATIONS else None
    else:
        found = activation_of_module(activation)
    if found is None:
        modules = ", ".join(sorted(f"nn.{kind.__name__}" for kind in OF_MODULE))
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"{owner}: {argument} must be one of {names} or an instance of {modules}, but got {activation!r}")
    return found
