"""Linear layers, those and the LayerNorm over an image's channels, and squeeze-and-excitation, as folded layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extension import _C
from ..ops.activations import GATES, activate
from ..ops.functional import accumulation_dtype
from .folded_layers import NO_NORM, ConvSettings, Folded, Run, pack_pointwise, plus
from .folded_weights import Tensors, can_be_watched
from .steps import Step

ops = torch.ops.dwconv_ext

# Rows up to which a linear layer is faster as a pointwise convolution of a picture one pixel high.
MOST_ROWS = 256


def _pack_linear(s: ConvSettings, tensors: Tensors, dtype: torch.dtype) -> Tensor | None:
    """weight, bias and scale as ``linear`` and ``pointwise_conv2d`` take them; None where there is no kernel."""
    weight, bias, scale = tensors
    if (
        not (weight.is_cpu and Folded.packs(weight, dtype) and can_be_watched(weight) and weight.is_contiguous())
        or 0 in weight.shape
    ):
        return None
    if bias is not None and (not can_be_watched(bias) or bias.shape != weight.shape[:1] or bias.dtype is not weight.dtype):
        return None
    if scale is not None:
        wide = accumulation_dtype(weight.dtype)
        scale = scale.to(wide).flatten()
        weight, bias = weight.to(wide) * scale[:, None], None if bias is None else bias.to(wide) * scale
    return pack_pointwise(s, (weight[:, :, None, None], bias, *NO_NORM), dtype)


class FoldedLinear(Folded):
    """``act(linear(x))``: of few rows on the pointwise kernel, of many torch's. Its two tensors: weight, bias (or None)."""

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = settings

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        if type(input) is not Tensor or not input.is_cpu or input.dim() == 0 or input.shape[-1] != tensors[0].shape[1]:
            return False
        return 0 < input.shape[:-1].numel() <= MOST_ROWS

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        rows = input.shape[:-1]  # a symbolic size would be fixed by a look at it
        return all(type(size) is int for size in rows) and rows.numel() <= MOST_ROWS

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        packed = _pack_linear(self.settings, (*tensors, None), dtype)
        if packed is None:
            return None
        act = _C.activations[self.settings.activation]
        return Step(ops.linear.default, packed, len(tensors[0]), act, self.settings.slope)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        output = F.linear(input, *tensors)
        return activate(output, self.settings.activation, self.settings.slope, inplace=not output.requires_grad)


class FoldedImageLinear(Folded):
    """``act(linear(x)) [* scale] [+ residual]`` over the channels of a channels_last image, (N, C, H, W).

    Its three tensors: weight, bias (or None), and a scale of as many elements as there are outputs, in any shape (or None; always
    None with an activation).
    """

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = settings

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.size(1) == tensors[0].size(1)

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return (tensors[0].dtype is torch.float64) is (input.dtype is torch.float64) and tensors[0].is_contiguous()

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        packed = _pack_linear(self.settings, tensors, dtype)
        if packed is None:
            return None
        act = _C.activations[self.settings.activation]
        return Step(ops.pointwise_conv2d.default, packed, len(tensors[0]), 1, act, self.settings.slope, more=2)

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        weight, bias, scale = tensors
        output = F.linear(input.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        output = activate(output, self.settings.activation, self.settings.slope, inplace=not output.requires_grad)
        return plus(output if scale is None else output * scale.reshape(-1, 1, 1), residual)


class FoldedLayerNorm(Folded):
    """LayerNorm over the channels of each pixel, (N, C, H, W) to the same in channels_last. Its two tensors: weight, bias (or
    None)."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.numel() > 0 and tensors[0].shape == input.shape[1:2]

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return (tensors[0].dtype is torch.float64) is (input.dtype is torch.float64)

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        if not all(t.is_cpu and self.packs(t, dtype) for t in tensors if t is not None):
            return None
        return Step(ops.layer_norm2d.default, *_copies(tensors, accumulation_dtype(dtype)), self.eps)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        pixels = input.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, pixels.shape[3:], *tensors, self.eps).permute(0, 3, 1, 2)


def _copies(tensors: Tensors, dtype: torch.dtype) -> list[Tensor | None]:
    """Even of the same dtype: a view would keep the model's own alive."""
    return [None if t is None else t.detach().clone().to(dtype) for t in tensors]


class FoldedSqueeze(Folded):
    """``gate(conv2(act(conv1(x.mean((2, 3), keepdim=True)))))`` of squeeze-and-excitation (Hu et al., arXiv:1709.01507).

    Its four tensors: weight, bias of the first pointwise convolution, and of the second; biases may be None.
    """

    def __init__(self, first: ConvSettings, gate: str) -> None:
        self.first, self.gate = first, gate

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        return super().fits(input, tensors, residual) and input.numel() > 0

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        if not all(t.is_cpu and self.packs(t, dtype) for t in tensors if t is not None):
            return None
        reduce, first, expand, second = _copies(tensors, dtype)
        reduce, expand = reduce.flatten(1), expand.flatten(1).t().contiguous()
        s = self.first
        return Step(ops.squeeze_excitation.default, reduce, first, expand, second, s.activation, self.gate, s.slope)

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> Tensor:
        reduce, first, expand, second = (None if t is None else t.to(input.dtype) for t in tensors)
        hidden = F.conv2d(input.mean((2, 3), keepdim=True), reduce, first)
        return GATES[self.gate](F.conv2d(activate(hidden, self.first.activation, self.first.slope), expand, second))
