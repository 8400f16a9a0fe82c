"""Convolutions with the BatchNorms after them folded in: the depthwise-separable block, the inverted residual, any single one.

They take their tensors at every call and keep what they make of them (folded_weights.py). Where a derivative is wanted, and under
torch.compile, torch.export and torch.func, they are the same computation in differentiable operations. There is one of each kind
and settings (``folded``), so that all models and graphs of a process share what is kept of a tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extension import _C, _C_cuda
from ..ops.activations import ACTIVATIONS, SLOPE, activate
from ..ops.arguments import IntOrPair, four_paddings, to_pair
from ..ops.autograd import PLAIN, is_traced_or_transformed
from ..ops.batch_norm import norm_fits
from ..ops.conv_transpose import depthwise_conv_transpose2d
from ..ops.functional import (
    DTYPES,
    as_weights_layout,
    depthwise_conv2d,
    name_of,
    padding_of,
    separable_conv2d,
)
from .folded_weights import Tensors, fold, found, frozen, keep
from .steps import Step

ops = torch.ops.dwconv_ext
Run = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # of the input, what is added to the output, and a gate
Kept = Callable[[Tensors, torch.dtype], Any]
NO_NORM = (None, None, None, None)
_ONES = (1, (1,), (1, 1))
MOST_PATCH_CHANNELS, MOST_PATCH_SIDE = 4, 2**15  # the op's own limit


class ConvSettings(NamedTuple):
    """Of a convolution, the BatchNorm and the activation after it: all but their tensors."""

    stride: IntOrPair = 1
    padding: str | IntOrPair = 0
    dilation: IntOrPair = 1
    groups: int = 1
    activation: str = "identity"
    slope: float = SLOPE
    eps: float = 0.0
    output_padding: IntOrPair | None = None  # a transposed convolution's, which is depthwise, of one filter a channel

    @property
    def is_transposed(self) -> bool:
        return self.output_padding is not None

    def is_depthwise(self, weight: Tensor) -> bool:
        """With any channel multiplier."""
        return self.groups > 1 and weight.dim() == 4 and (weight.shape[1] == 1 or self.is_transposed)

    def has_few_channels(self, weight: Tensor) -> bool:
        """Whether it is a dense convolution that is best computed by patches: a network's first, of colours."""
        few = self.groups == 1 and weight.dim() == 4 and weight.shape[1] <= MOST_PATCH_CHANNELS
        return few and max(weight.shape[2:]) <= MOST_PATCH_SIDE and self.product_stride(weight) is None

    def geometry(self, op: str, weight: Tensor) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, int]]:
        """Stride, the four paddings and dilation, as the op takes them."""
        stride, dilation = to_pair(op, "stride", self.stride), to_pair(op, "dilation", self.dilation)
        return stride, four_paddings(padding_of(op, self.padding, weight.shape[2:], stride, dilation)), dilation

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether it is one product of its weight with every pixel, all of them."""
        return self.product_stride(weight) == 1

    def product_stride(self, weight: Tensor) -> int | None:
        """The stride, where it is a product of its weight with pixels: a 1x1 convolution; else None."""
        if weight.dim() != 4 or weight.shape[2:] != (1, 1) or self.groups != 1:
            return None
        no_padding = self.padding in (0, (0,), (0, 0), "valid", "same")
        strides = {self.stride} if type(self.stride) is int else set(self.stride)
        same = len(strides) == 1 and (self.padding != "same" or strides == {1})
        return strides.pop() if no_padding and same and self.dilation in _ONES else None


def wants_derivative(input: Tensor, residual: Tensor | None, tensors: Tensors) -> bool:
    """Whether a gradient of this call is required, or a compiler, torch.func or forward mode records its operations."""
    if is_traced_or_transformed():
        return True
    if not torch.is_grad_enabled():
        return False
    return input.requires_grad or any(t is not None and t.requires_grad for t in (residual, *tensors))


_layers: weakref.WeakValueDictionary[tuple, Folded] = weakref.WeakValueDictionary()


def folded(kind: type[Folded], *settings: ConvSettings | str) -> Folded:
    """The one of this kind and these settings."""
    if torch.compiler.is_dynamo_compiling():  # nothing is kept then
        return kind(*settings)
    try:
        layer = _layers.get((kind, settings))
    except TypeError:  # a list for a stride
        return kind(*settings)
    if layer is None:
        layer = _layers[kind, settings] = kind(*settings)
    return layer


def folds(input: Tensor, tensors: Tensors) -> bool:
    """Whether the BatchNorm can go into weights of the input's dtype. Else torch has the result, or the error."""
    if input.dtype is torch.float16 and input.is_cpu:  # a dead channel's may not fit (on CUDA: docs/design/limits.md)
        return False
    return norm_fits(len(tensors[0]), input.dtype, tensors[2:])


def as_steps(input: Tensor, tensors: Tensors, s: ConvSettings) -> Tensor:
    """``act(bn(conv(x)))`` in three operations."""
    weight, bias = (None if t is None else t.to(input.dtype) for t in tensors[:2])
    output = _convolve(input, weight, bias, s._replace(activation="identity"))
    if tensors[2] is not None:
        output = F.batch_norm(output, *tensors[2:], False, 0.0, s.eps)
    return activate(output, s.activation, s.slope)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, s: ConvSettings) -> Tensor:
    if s.is_transposed:
        conv = (s.stride, s.padding, s.output_padding, s.dilation)
        return depthwise_conv_transpose2d(input, weight, bias, *conv, s.activation, slope=s.slope)
    if s.is_depthwise(weight):
        return depthwise_conv2d(input, weight, bias, s.stride, s.padding, s.dilation, s.activation, slope=s.slope)
    output = F.conv2d(input, weight, bias, s.stride, s.padding, s.dilation, s.groups)
    return activate(output, s.activation, s.slope, inplace=not output.requires_grad)


def plus(output: Tensor, residual: Tensor | None) -> Tensor:
    return output if residual is None else output + residual


class _Packed(NamedTuple):
    """A block as ``separable_conv2d_packed`` takes it."""

    weights: Tensor
    block: list[int]
    slopes: list[float]


def has_kernels(t: Tensor) -> bool:
    """For packed weights, on the tensor's device."""
    return t.is_cpu or (t.is_cuda and _C_cuda is not None)


def _pack(first: ConvSettings, second: ConvSettings, tensors: Tensors, dtype: torch.dtype) -> _Packed | None:
    """The block of these twelve tensors; None where it has no kernel."""
    one, two = tensors[:6], tensors[6:]
    if (
        not (has_kernels(one[0]) and Folded.packs(one[0], dtype))
        or not {first.activation, second.activation} <= ACTIVATIONS.keys()
    ):
        return None
    if not all(norm_fits(len(t[0]), dtype, t[2:]) for t in (one, two)):
        return None
    (dw, dw_bias), (pw, pw_bias) = fold(*one, first.eps), fold(*two, second.eps)
    stride, padding, dilation = first.geometry("separable_conv2d", dw)
    activations = (_C.activations[s.activation] for s in (first, second))
    block = [pw.shape[0], *dw.shape[2:], *stride, *padding, *dilation, *activations]
    packed = ops.separable_conv2d_pack(dw, dw_bias, pw, pw_bias, _C.selected_isa(), name_of(dtype))
    return _Packed(packed, block, [first.slope, second.slope])


def _becomes_step(input: Tensor, layers: tuple[Tensors, ...]) -> bool:
    """Whether layers of these tensors, with data or without, can be packed for the input."""
    wide = input.dtype is torch.float64
    return all((t[0].dtype is torch.float64) is wide and norm_fits(len(t[0]), input.dtype, t[2:]) for t in layers)


def pack_pointwise(s: ConvSettings, tensors: Tensors, dtype: torch.dtype) -> Tensor | None:
    """The pointwise convolution of these six tensors, as ``pointwise_conv2d`` takes it; None where it has no kernel."""
    if (
        not (has_kernels(tensors[0]) and Folded.packs(tensors[0], dtype))
        or s.activation not in ACTIVATIONS
        or not norm_fits(len(tensors[0]), dtype, tensors[2:])
    ):
        return None
    return ops.pointwise_conv2d_pack(*fold(*tensors, s.eps), _C.selected_isa(), name_of(dtype))


class Folded:
    """A layer that keeps what it makes of its tensors.

    on_cuda: whether it has kernels there, where nothing can be kept of tensors that may change (folded_weights.py): what a frozen
    graph makes once is else made for each call, or not at all where that would take more launches than :meth:`functional`.
    residual: what is added to its output; gate: (N, C, 1, 1), what a pointwise convolution's input is multiplied by;
    kept(tensors, dtype): what was made of them, in place of :meth:`kept`, False where nothing is faster than :meth:`functional`.
    """

    on_cuda = False

    def __call__(
        self, input: Tensor, tensors: Tensors, residual: Tensor | None = None, gate: Tensor | None = None, *,
        kept: Kept | None = None,
    ) -> Tensor:  # fmt: skip
        own = tensors if gate is None else (*tensors, gate)
        if not wants_derivative(input, residual, own) and self.fits(input, tensors, residual):
            may_make = kept is not None or input.is_cpu or self.is_made_for_a_call(input, tensors)
            run = may_make and (kept or self.kept)(tensors, input.dtype)
            if run:
                return run(input, residual, gate)
        return self.functional(input if gate is None else input * gate, tensors, residual)

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        """Whether :meth:`make` gives a step of such tensors on the CPU; it may still not, and then layers run one by one."""
        return True

    def kept(self, tensors: Tensors, dtype: torch.dtype) -> Any:
        run = found(self, tensors, dtype)
        return keep(self, tensors, dtype, lambda: self.make(tensors, dtype) or False) if run is None else run

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        """Whether the input is one for :meth:`make`'s function; else :meth:`functional` computes or refuses it."""
        if type(input) is not Tensor or not (input.is_cpu or (self.on_cuda and has_kernels(input))) or input.dim() != 4:
            return False
        if input.is_cuda and any(t is not None and t.device != input.device for t in (residual, *tensors)):
            return False
        return residual is None or (
            type(residual) is Tensor and residual.dtype is input.dtype and residual.is_cpu is input.is_cpu
        )

    def is_made_for_a_call(self, input: Tensor, tensors: Tensors) -> bool:
        """Whether to :meth:`make` it for one call on CUDA: for inputs of 16 bits, whose weights are copied anyway."""
        return input.element_size() == 2

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        """What computes the layer of inputs of this dtype while its tensors stay as they are; None for :meth:`functional`."""
        raise NotImplementedError

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        """The same in operations that torch can take apart and differentiate."""
        raise NotImplementedError

    @staticmethod
    def packs(weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether the weight can be packed for inputs of this dtype."""
        if dtype not in DTYPES or type(weight) not in PLAIN:
            return False
        return (dtype is torch.float64) is (weight.dtype is torch.float64)


class Frozen:
    """A folded layer, or a sequence of them, of tensors that never change: what it makes of them, it makes once.

    Dynamo runs one graph for all models of the same structure, hence the tensors by their ids; kept beside what was made of them,
    since a dead one's id may be another's.
    """

    MOST = 4  # as folded_weights.py keeps of one tensor

    def __init__(self, layer: Folded) -> None:
        self.layer = layer
        self.made: dict[tuple, tuple[Any, Tensors]] = {}
        frozen.add(self)  # for clear_caches

    def __call__(self, *arguments: Any, **gate: Tensor) -> Any:
        return self.layer(*arguments, **gate, kept=self.kept)

    def kept(self, tensors: Tensors, dtype: torch.dtype) -> Any:
        key = (dtype, *map(id, tensors))
        found = self.made.get(key)
        if found is None:
            while len(self.made) >= self.MOST:
                del self.made[next(iter(self.made))]
            with torch.inference_mode(False), torch.no_grad():
                found = self.made[key] = (self.layer.make(tensors, dtype) or False, tensors)
        return found[0]


class FoldedBlock(Folded):
    """``act2(bn2(pointwise(act1(bn1(depthwise(x)))))) [+ residual]`` with BatchNorms in eval mode, as one kernel.

    Its twelve tensors: weight, bias of the depthwise convolution, mean, variance, weight, bias of the BatchNorm after it, and the
    same of the pointwise convolution. Biases may be None, and the four of a BatchNorm where there is none.
    """

    on_cuda = True

    def __init__(self, first: ConvSettings, second: ConvSettings) -> None:
        self.first, self.second = first, second

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return _becomes_step(input, (tensors[:6], tensors[6:]))

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.size(1) == tensors[0].size(0)

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        packed = _pack(self.first, self.second, tensors, dtype)
        if packed is None:
            return None
        return Step(ops.separable_conv2d_packed.default, *packed, more=1)

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        (one, first), (two, second) = layers = (tensors[:6], self.first), (tensors[6:], self.second)
        if not (folds(input, one) and folds(input, two)):
            return plus(as_steps(as_steps(input, one, first), two, second), residual)
        weights = (None if t is None else t.to(input.dtype) for layer, s in layers for t in fold(*layer, s.eps))
        return separable_conv2d(
            input, *weights, first.stride, first.padding, first.dilation, first.activation, second.activation, residual,
            dw_slope=first.slope, pw_slope=second.slope,
        )  # fmt: skip


class FoldedConv(Folded):
    """``act(bn(conv(x))) [+ residual]`` as one convolution, with the BatchNorm in eval mode.

    A depthwise or pointwise one runs on this package's kernels, any other on torch's. Its six tensors: weight, bias, and mean,
    variance, weight, bias of the BatchNorm; None for what there is not.
    """

    on_cuda = True

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = settings

    def is_made_for_a_call(self, input: Tensor, tensors: Tensors) -> bool:
        return self.settings.product_stride(tensors[0]) is None  # torch's product is one launch, and a fold with it

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        s, weight = self.settings, tensors[0]
        if s.product_stride(weight):
            return super().fits(input, tensors, residual) and input.size(1) == weight.size(1)
        if s.is_depthwise(weight) or s.has_few_channels(weight):
            plain = type(input) is Tensor and type(weight) in PLAIN and input.dim() == 4 and residual is None
            return plain and (input.is_cpu is weight.is_cpu) and input.size(1) == s.groups * weight.size(1)
        return type(input) is Tensor and type(weight) in PLAIN

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        s, weight = self.settings, tensors[0]
        ours = s.is_depthwise(weight) or s.product_stride(weight) or s.has_few_channels(weight)
        return bool(ours) and not s.is_transposed and _becomes_step(input, (tensors,))

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        s, weight = self.settings, tensors[0]
        if stride := s.product_stride(weight):
            packed = pack_pointwise(s, tensors, dtype)
            if packed is None:
                return None
            act = _C.activations[s.activation]
            return Step(ops.pointwise_conv2d.default, packed, len(weight), stride, act, s.slope, more=2)
        packs = not s.is_transposed and norm_fits(len(weight), dtype, tensors[2:])
        if packs and weight.is_cpu and self.packs(weight, dtype) and s.activation in ACTIVATIONS:
            if s.is_depthwise(weight):
                return self.of_filters(tensors, dtype)
            if s.has_few_channels(weight):
                return self.of_patches(tensors, dtype)
        weights = self.folded_weights(tensors, dtype)
        return weights and (lambda input, residual, gate: plus(_convolve(input, *weights, s), residual))

    def folded_weights(self, tensors: Tensors, dtype: torch.dtype) -> list[Tensor | None] | None:
        """Weight and bias, where keeping them saves something."""
        if not norm_fits(len(tensors[0]), dtype, tensors[2:]):
            return None
        if dtype is torch.float16 and tensors[2] is not None:  # whose range holds no folded weights
            return None
        weights = [None if t is None else t.to(dtype) for t in fold(*tensors, self.settings.eps)]
        return None if weights[0] is tensors[0] else weights

    def of_filters(self, tensors: Tensors, dtype: torch.dtype) -> Step:
        s = self.settings
        weight, bias = fold(*tensors, s.eps)
        packed = ops.depthwise_conv2d_pack(weight, bias, _C.selected_isa(), name_of(dtype))
        filter = self.filter("depthwise_conv2d", weight)
        return Step(ops.depthwise_conv2d_packed.default, packed, filter, _C.activations[s.activation], s.slope)

    def of_patches(self, tensors: Tensors, dtype: torch.dtype) -> Step:
        s = self.settings
        weight, bias = fold(*tensors, s.eps)
        patches = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
        packed = ops.pointwise_conv2d_pack(patches, bias, _C.selected_isa(), name_of(dtype))
        filter = self.filter("patch_conv2d", weight)
        last = as_weights_layout(weight.new_empty(1, 2, 2, 2), tensors[0]).is_contiguous(memory_format=torch.channels_last)
        return Step(ops.patch_conv2d.default, packed, filter, _C.activations[s.activation], s.slope, last)

    def filter(self, op: str, weight: Tensor) -> list[int]:
        """The numbers that the op takes."""
        stride, padding, dilation = self.settings.geometry(op, weight)
        return [len(weight), *weight.shape[2:], *stride, *padding, *dilation]

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        s = self.settings
        if not folds(input, tensors):
            return plus(as_steps(input, tensors, s), residual)
        weights = (None if t is None else t.to(input.dtype) for t in fold(*tensors, s.eps))
        return plus(_convolve(input, *weights, s), residual)


class FoldedInvertedResidual(Folded):
    """A pointwise convolution and the block after it (Sandler et al., arXiv:1801.04381) as one kernel; where caches hold the
    expanded image, as two.

    Its eighteen tensors: those of the convolution as FoldedConv's, then the block's as FoldedBlock's.
    """

    on_cuda = True

    def __init__(self, expand: ConvSettings, first: ConvSettings, second: ConvSettings) -> None:
        self.expand, self.first, self.second = expand, first, second

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return _becomes_step(input, (tensors[:6], tensors[6:12], tensors[12:]))

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.size(1) == tensors[0].size(1)

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        expand, block = pack_pointwise(self.expand, tensors[:6], dtype), _pack(self.first, self.second, tensors[6:], dtype)
        if expand is None or block is None:
            return None
        act = _C.activations[self.expand.activation]
        return Step(ops.inverted_residual.default, expand, len(tensors[0]), act, self.expand.slope, *block, more=1)

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        expanded = folded(FoldedConv, self.expand).functional(input, tensors[:6])
        return folded(FoldedBlock, self.first, self.second).functional(expanded, tensors[6:], residual)
