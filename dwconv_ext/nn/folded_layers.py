"""Convolutions with the BatchNorms after them folded in: the depthwise-separable block, and any single convolution.

They take their tensors at every call and keep what they make of them (folded_weights.py). Where a derivative is wanted, and under
torch.compile, torch.export and torch.func, they are the same computation in differentiable operations. There is one of each kind
and settings (:func:`folded`), so that all models and graphs of a process share what is kept of a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extension import _C
from ..ops.activations import ACTIVATIONS, SLOPE, activate
from ..ops.autograd import taken_apart
from ..ops.functional import DTYPES, IntOrPair, depthwise_conv2d, padding_of, separable_conv2d, to_pair
from .folded_weights import PLAIN, Tensors, can_be_watched, fold, found, keep

ops = torch.ops.dwconv_ext


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(input: Tensor, residual: Tensor | None, channels: int) -> bool:
    """Whether a packed kernel runs on these; else they are torch's or the unpacked operation's to compute or to refuse."""
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 4 or input.size(1) != channels:
        return False
    return residual is None or (type(residual) is Tensor and residual.dtype is input.dtype and residual.is_cpu)


def _packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the weight can be packed for inputs of this dtype."""
    if dtype not in DTYPES or type(weight) not in PLAIN or not weight.is_cpu:
        return False
    return (dtype is torch.float64) is (weight.dtype is torch.float64)


def wanted(input: Tensor, residual: Tensor | None, tensors: Tensors) -> bool:
    """Whether a derivative of this call is wanted, or something looks at each of its operations."""
    if taken_apart():
        return True
    if not torch.is_grad_enabled():
        return False
    return input.requires_grad or any(t is not None and t.requires_grad for t in (residual, *tensors))


def is_pointwise(weight: Tensor, stride: IntOrPair, padding: str | IntOrPair, groups: int) -> bool:
    """Whether a convolution is one product of its weight with every pixel, all of them."""
    if weight.dim() != 4 or weight.shape[2:] != (1, 1) or groups != 1 or stride not in (1, (1,), (1, 1)):
        return False
    return padding in (0, (0,), (0, 0), "valid", "same")


def as_autocast(input: Tensor) -> Tensor:
    """The input in the dtype that autocast would run a convolution in."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input
    if input.dtype is torch.float64 or not input.is_floating_point():
        return input
    return input.to(torch.get_autocast_dtype(device))


_layers: dict[tuple, Any] = {}


def folded(kind: type, settings: Any) -> Any:
    """The FoldedBlock, FoldedConv or FoldedLinear of these settings."""
    if torch.compiler.is_dynamo_compiling():  # nothing is kept then
        return kind(settings)
    try:
        layer = _layers.get((kind, settings))
    except TypeError:  # a list for a stride
        return kind(settings)
    if layer is None:
        layer = _layers[kind, settings] = kind(settings)
    return layer


def _narrow(input: Tensor) -> bool:
    """Whether a folded weight or bias of a channel that is always zero may not fit the dtype."""
    return input.dtype is torch.float16 and input.is_cpu  # on CUDA it is folded all the same (docs/design/limits.md)


def _unfolded(input: Tensor, tensors: Tensors, how: tuple, eps: float, activation: str, slope: float) -> Tensor:
    """``act(bn(conv(x)))`` in three operations."""
    weight, bias = (None if t is None else t.to(input.dtype) for t in tensors[:2])
    output = _convolve(input, weight, bias, how)
    if tensors[2] is not None:
        mean, var, bn_weight, bn_bias = tensors[2:]
        output = F.batch_norm(output, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    return activate(output, activation, slope)


def _convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, how: tuple, activation: str = "identity", slope: float = SLOPE
) -> Tensor:
    """how: stride, padding, dilation, groups."""
    *sizes, groups = how
    if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
        return depthwise_conv2d(input, weight, bias, *sizes, activation, slope=slope)
    output = F.conv2d(input, weight, bias, *how)
    return activate(output, activation, slope, inplace=not output.requires_grad)


class BlockSettings(NamedTuple):
    stride: IntOrPair
    padding: str | IntOrPair
    dilation: IntOrPair
    activations: tuple[str, str]
    slopes: tuple[float, float]
    eps: tuple[float, float]


class FoldedBlock:
    """``act2(bn2(pointwise(act1(bn1(depthwise(x)))))) [+ residual]`` with BatchNorms in eval mode, as one kernel.

    Its twelve tensors: weight, bias of the depthwise convolution, mean, variance, weight, bias of the BatchNorm after it, and the
    same of the pointwise convolution. Biases may be None, and the four of a BatchNorm where there is none.
    """

    def __init__(self, settings: BlockSettings) -> None:
        self.settings = settings

    def __call__(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        if wanted(input, residual, tensors) or not _fits(input, residual, tensors[0].size(0)):
            return self.functional(input, tensors, residual)
        made = found(self, tensors, input.dtype)
        if made is None:
            if not self._packs(tensors[0], input.dtype):
                return self.functional(input, tensors, residual)
            made = keep(self, tensors, input.dtype, lambda: self._pack(tensors, input.dtype))
        packed, block, slopes = made
        return ops.separable_conv2d_packed.default(input, packed, block, slopes, residual)

    def _packs(self, weight: Tensor, dtype: torch.dtype) -> bool:
        if not _packs(weight, dtype) or not set(self.settings.activations) <= ACTIVATIONS.keys():
            return False
        return self.settings.padding != "same" or not any(self._padding(weight)[1])

    def _padding(self, weight: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        s = self.settings
        return padding_of(s.padding, weight.shape[2:], to_pair("stride", s.stride), to_pair("dilation", s.dilation))

    def _pack(self, tensors: Tensors, dtype: torch.dtype) -> tuple:
        s, folded = self.settings, self.folded(tensors)
        numbers = (_C.activations[name] for name in s.activations)
        sizes = (
            *folded[0].shape[2:],
            *to_pair("stride", s.stride),
            *self._padding(folded[0])[0],
            *to_pair("dilation", s.dilation),
        )
        packed = ops.separable_conv2d_pack(*folded, _C.selected_isa(), _name(dtype))
        return packed, [folded[2].shape[0], *sizes, *numbers], list(s.slopes)

    def folded(self, tensors: Tensors) -> Tensors:
        """Weight and bias of both convolutions, in the accumulation type."""
        first, second = self.settings.eps
        return (*fold(*tensors[:6], first), *fold(*tensors[6:], second))

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        """The same in operations that torch can take apart and differentiate."""
        s = self.settings
        if _narrow(input):
            how = (s.stride, s.padding, s.dilation, tensors[0].shape[0])
            middle = _unfolded(input, tensors[:6], how, s.eps[0], s.activations[0], s.slopes[0])
            output = _unfolded(middle, tensors[6:], (1, 0, 1, 1), s.eps[1], s.activations[1], s.slopes[1])
            return output if residual is None else output + residual
        weights = (None if t is None else t.to(input.dtype) for t in self.folded(tensors))
        return separable_conv2d(
            input, *weights, s.stride, s.padding, s.dilation, *s.activations, residual, dw_slope=s.slopes[0], pw_slope=s.slopes[1]
        )


_DO_NOT_FIT = ("folded weights do not fit the dtype",)


class ConvSettings(NamedTuple):
    stride: IntOrPair
    padding: str | IntOrPair
    dilation: IntOrPair
    groups: int
    activation: str
    slope: float
    eps: float


class FoldedConv:
    """``act(bn(conv(x))) [+ residual]`` as one convolution, with the BatchNorm in eval mode.

    A depthwise one runs on this package's kernels; so does a pointwise one, as the block whose depthwise stage copies; any other
    is torch's. Its six tensors: weight, bias, and mean, variance, weight, bias of the BatchNorm; None for what there is not.
    """

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = s = settings
        self.block = FoldedBlock(BlockSettings(1, 0, 1, ("identity", s.activation), (SLOPE, s.slope), (0.0, s.eps)))

    def __call__(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        if wanted(input, residual, tensors):
            return self.functional(input, tensors, residual)
        weight, s = tensors[0], self.settings
        made = found(self, tensors, input.dtype)
        if not is_pointwise(weight, s.stride, s.padding, s.groups):
            weights = made or keep(self, tensors, input.dtype, lambda: self._fitting(input, tensors))
            fit = weights is not _DO_NOT_FIT
            return self._convolve(input, weights, residual) if fit else self.functional(input, tensors, residual)
        if not _fits(input, residual, weight.size(1)) or not (made or _packs(weight, input.dtype)):
            return self.functional(input, tensors, residual)
        packed, block, slopes = made or keep(self, tensors, input.dtype, lambda: self._pack(tensors, input.dtype))
        return ops.separable_conv2d_packed.default(input, packed, block, slopes, residual)

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        """The same in operations that torch can take apart and differentiate."""
        s = self.settings
        if _narrow(input):
            output = _unfolded(input, tensors, s[:4], s.eps, s.activation, s.slope)
            return output if residual is None else output + residual
        return self._convolve(input, self._folded(tensors, input.dtype), residual)

    def _pack(self, tensors: Tensors, dtype: torch.dtype) -> tuple:
        copy = tensors[0].new_ones((tensors[0].shape[1], 1, 1, 1))
        return self.block._pack((copy, None, None, None, None, None, *tensors), dtype)

    def _folded(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        return tuple(None if t is None else t.to(dtype) for t in fold(*tensors, self.settings.eps))

    def _fitting(self, input: Tensor, tensors: Tensors) -> Tensors:
        """The folded weights, where they fit the dtype."""
        weights = self._folded(tensors, input.dtype)
        fit = not _narrow(input) or all(t is None or t.isfinite().all() for t in weights)
        return weights if fit else _DO_NOT_FIT

    def _convolve(self, input: Tensor, weights: Tensors, residual: Tensor | None) -> Tensor:
        output = _convolve(input, *weights, self.settings[:4], self.settings.activation, self.settings.slope)
        return output if residual is None else output + residual


# Rows up to which a linear layer is faster as a pointwise convolution of a picture one pixel high.
MOST_ROWS = 256


class LinearSettings(NamedTuple):
    activation: str
    slope: float


class FoldedLinear:
    """``act(linear(x))``: of few rows on the pointwise kernel, of many torch's. Its two tensors: weight, bias (or None)."""

    def __init__(self, settings: LinearSettings) -> None:
        self.settings = settings
        self.conv = FoldedConv(ConvSettings(1, 0, 1, 1, settings.activation, settings.slope, 0.0))

    def __call__(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        if not self._packs(input, tensors) or wanted(input, None, tensors):
            return self.functional(input, tensors)
        weight, bias = tensors
        as_conv = weight[:, :, None, None], bias, None, None, None, None
        made = found(self, tensors, input.dtype)
        packed, block, slopes = made or keep(self, tensors, input.dtype, lambda: self.conv._pack(as_conv, input.dtype))
        with torch._C._AutoDispatchBelowADInplaceOrView():  # the result is a tensor of its own, not a view, as torch's
            pixels = input.contiguous().reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)
            output = ops.separable_conv2d_packed.default(pixels, packed, block, slopes, None)
            return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def _packs(input: Tensor, tensors: Tensors) -> bool:
        weight, bias = tensors
        features, channels = weight.shape
        if input.dim() == 0 or input.shape[-1] != channels or not 0 < input.shape[:-1].numel() <= MOST_ROWS or 0 in weight.shape:
            return False
        if not can_be_watched(weight) or not weight.is_contiguous() or type(input) is not Tensor or not input.is_cpu:
            return False
        if bias is not None and (not can_be_watched(bias) or bias.shape != (features,) or bias.dtype is not weight.dtype):
            return False
        return input.dtype in DTYPES and (input.dtype is torch.float64) is (weight.dtype is torch.float64)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        """The same in torch's operations."""
        output = F.linear(input, *tensors)
        return activate(output, *self.settings, inplace=not output.requires_grad)
