"""Which modules may be run as one: whether a call of them is the computation that their class is known for, and no more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.activations import IDENTITIES, OF_MODULE
from ..ops.autograd import PLAIN
from ..ops.functional import DTYPES
from .conv_transpose import DepthwiseConvTranspose2d
from .depthwise import DepthwiseConv2d
from .folded_layers import NO_NORM, ConvSettings
from .folded_weights import Tensors

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_CONVS = (nn.Conv2d, DepthwiseConv2d, DepthwiseConvTranspose2d)
_KNOWN = (*NORMS, *_CONVS, *OF_MODULE, *IDENTITIES)
_METHODS = {kind: (kind.forward, getattr(kind, "_conv_forward", None)) for kind in _KNOWN}  # before anybody patches a class
_AFFINE, _STATISTICS = {"weight", "bias"}, {"running_mean", "running_var"}


def is_plain_module(module: nn.Module) -> bool:
    """Whether a call of it is a call of its class's own forward: no hooks, and nothing in the place of forward or __call__."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    kind = type(module)
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__ or kind.__call__ is not nn.Module.__call__:
        return False
    own = (kind.forward, getattr(kind, "_conv_forward", None))
    return own == _METHODS.get(kind, own)


def is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution of its own weight and bias, as they stand."""
    if type(module) not in _CONVS or module.padding_mode != "zeros" or not is_plain_module(module):
        return False
    if not module._parameters.keys() >= _AFFINE:  # parametrized
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if type(weight) not in PLAIN or weight.dim() != 4:
        return False
    if type(module) is DepthwiseConvTranspose2d and not (module.groups == module.in_channels > 1 == weight.shape[1]):
        return False
    return bias is None or (type(bias) in PLAIN and bias.dtype is weight.dtype and bias.shape == weight.shape[:1])


def starts_a_block(conv: nn.Module) -> bool:
    """Whether it is depthwise, with a filter for each channel."""
    weight = conv._parameters["weight"]
    return type(conv) is DepthwiseConv2d and conv.groups == conv.in_channels == len(weight) and weight.shape[1] == 1


def fits(input: Tensor, conv: nn.Module) -> bool:
    """Whether the convolution takes it. Others are left for the convolution to reject."""
    weight = conv._parameters["weight"]
    if input.layout is not torch.strided or input.device != weight.device or input.dim() not in (3, 4):
        return False
    if input.dtype not in DTYPES or weight.dtype not in DTYPES or input.shape[-3] != weight.shape[1] * conv.groups:
        return False
    if input.dtype is weight.dtype:
        return True
    return torch.is_autocast_enabled(input.device.type) and torch.float64 not in (input.dtype, weight.dtype)


def is_fixed_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that is a scale and a shift of each channel now."""
    if type(module) not in NORMS or module.training or not is_plain_module(module) or not module.eps > 0:
        return False
    buffers = module._buffers
    if not (module._parameters.keys() >= _AFFINE and buffers.keys() >= _STATISTICS):
        return False
    return buffers["running_mean"] is not None and buffers["running_var"] is not None


def tensors_of(conv: nn.Module, norm: nn.Module | None) -> Tensors:
    """As the folded layers take them."""
    own = conv._parameters
    if norm is None:
        return (own["weight"], own["bias"], *NO_NORM)
    at, scale = norm._buffers, norm._parameters
    return own["weight"], own["bias"], at["running_mean"], at["running_var"], scale["weight"], scale["bias"]


def settings_of(conv: nn.Module, norm: nn.Module | None, activation: str, slope: float) -> ConvSettings:
    eps = 0.0 if norm is None else norm.eps
    output_padding = conv.output_padding if type(conv) is DepthwiseConvTranspose2d else None
    return ConvSettings(conv.stride, conv.padding, conv.dilation, conv.groups, activation, slope, eps, output_padding)
