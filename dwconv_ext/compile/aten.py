"""An exported graph's ATen operations as the functions of torch that Dynamo's graphs have, which the patterns know."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten

_BOTH = ("silu", "hardswish", "leaky_relu", "hardtanh", "relu6")  # of new memory and in place
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.conv2d.default: torch.conv2d,
    aten.conv2d.padding: torch.conv2d,
    aten.conv1d.default: torch.conv1d,
    aten.conv1d.padding: torch.conv1d,
    aten.conv_transpose1d.default: torch.conv_transpose1d,
    aten.conv_transpose2d.input: torch.conv_transpose2d,
    aten.linear.default: F.linear,
    aten.max_pool2d.default: F.max_pool2d,
    aten.sigmoid.default: torch.sigmoid,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.mean.dim: torch.mean,
    aten.flatten.using_ints: torch.flatten,
    aten.mul.Tensor: torch.mul,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: operator.iadd,
    aten.gelu.default: F.gelu,
    **{getattr(aten, name).default: getattr(F, name) for name in _BOTH},
    aten.dropout.default: F.dropout,
}
_IN_PLACE = {
    **{getattr(aten, f"{name}_").default: getattr(F, name) for name in _BOTH},
    aten.dropout_.default: F.dropout,
}


def _batch_norm(input, weight, bias, mean, variance, training, momentum, eps, cudnn_enabled):
    return (input, mean, variance, weight, bias, training, momentum, eps)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return (input, normalized_shape, weight, bias, eps)


def as_torch(graph: fx.Graph) -> None:
    """Each node that has one in the place of its ATen operation; the rest as they are."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default:
            node.args, node.kwargs, node.target = _batch_norm(*node.args, **node.kwargs), {}, F.batch_norm
        elif node.target is aten.layer_norm.default:
            node.args, node.kwargs, node.target = _layer_norm(*node.args, **node.kwargs), {}, F.layer_norm
        elif node.target in _IN_PLACE:
            node.kwargs, node.target = {**node.kwargs, "inplace": True}, _IN_PLACE[node.target]
        elif node.target is aten.add_.Tensor and node.kwargs:  # alpha, which an operator does not have
            continue
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
