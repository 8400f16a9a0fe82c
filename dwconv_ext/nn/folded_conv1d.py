"""Depthwise convolutions in one dimension with the BatchNorms after them folded in (folded_layers.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extension import _C
from ..ops.activations import ACTIVATIONS, activate
from ..ops.batch_norm import norm_fits
from ..ops.conv1d import depthwise_conv1d, padding_of_length
from ..ops.functional import name_of
from .folded_layers import ConvSettings, Folded, Run, folds
from .folded_weights import Tensors, fold

ops = torch.ops.dwconv_ext


class FoldedConv1d(Folded):
    """``act(bn(conv1d(x)))`` as one convolution, with the BatchNorm in eval mode; its six tensors are FoldedConv's."""

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = settings

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        plain = type(input) is Tensor and input.is_cpu and input.dim() == 3 and residual is None and input.numel() > 0
        return plain and tensors[0].is_cpu and input.size(1) == self.settings.groups

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return False  # they are of images

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        s, weight = self.settings, tensors[0]
        if not (self.packs(weight, dtype) and s.activation in ACTIVATIONS and norm_fits(len(weight), dtype, tensors[2:])):
            return None
        weight, bias = fold(*tensors, s.eps)
        packed = ops.depthwise_conv2d_pack(weight.unsqueeze(2), bias, _C.selected_isa(), name_of(dtype))
        (stride,), (dilation,), taps = s.stride, s.dilation, weight.shape[2]
        pads = padding_of_length("depthwise_conv1d", s.padding, taps, stride, dilation)
        filter = [len(weight), 1, taps, 1, stride, 0, 0, *pads, 1, dilation]
        act, op = _C.activations[s.activation], ops.depthwise_conv2d_packed.default

        def run(input: Tensor, *_: Any) -> Tensor:
            return op(input.unsqueeze(2), packed, filter, act, s.slope).squeeze(2)

        return run

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        s = self.settings
        if folds(input, tensors):
            weight, bias = (None if t is None else t.to(input.dtype) for t in fold(*tensors, s.eps))
            return depthwise_conv1d(input, weight, bias, s.stride, s.padding, s.dilation, s.activation, slope=s.slope)
        weight, bias = (None if t is None else t.to(input.dtype) for t in tensors[:2])
        output = depthwise_conv1d(input, weight, bias, s.stride, s.padding, s.dilation)
        return activate(F.batch_norm(output, *tensors[2:], False, 0.0, s.eps), s.activation, s.slope)
