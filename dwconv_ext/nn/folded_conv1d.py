"""Depthwise convolutions in one dimension with the BatchNorms after them folded in: FoldedConv's of an image of one row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.autograd import PLAIN
from .folded_layers import ConvSettings, Folded, FoldedConv, Run
from .folded_weights import Tensors


def _in_one_row(s: ConvSettings) -> ConvSettings:
    """The settings of the same convolution in two dimensions; a padding of two is before and after."""
    pads = s.padding if isinstance(s.padding, str) else (0, *s.padding) if len(s.padding) == 1 else (0, 0, *s.padding)
    more = None if s.output_padding is None else (0, *s.output_padding)
    return s._replace(stride=(1, *s.stride), padding=pads, dilation=(1, *s.dilation), output_padding=more)


def _rows(tensors: Tensors) -> Tensors:
    return (tensors[0].unsqueeze(2), *tensors[1:])


class FoldedConv1d(Folded):
    """``act(bn(conv1d(x)))`` or of a transposed one as one convolution, with the BatchNorm in eval mode; its six tensors are
    FoldedConv's, its settings' numbers tuples."""

    on_cuda = True

    def __init__(self, settings: ConvSettings) -> None:
        self.settings = settings
        self.row = FoldedConv(_in_one_row(settings))

    def fits(self, input: Tensor, tensors: Tensors, residual: Tensor | None) -> bool:
        plain = type(input) is Tensor and type(tensors[0]) in PLAIN and input.dim() == 3 and residual is None
        return plain and input.numel() > 0 and input.device == tensors[0].device and input.size(1) == self.settings.groups

    def is_step(self, input: Tensor, tensors: Tensors) -> bool:
        return False  # they are of images

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        run = self.row.make(_rows(tensors), dtype)
        return run and (lambda input, *_: run(input.unsqueeze(2), None, None).squeeze(2))

    def functional(self, input: Tensor, tensors: Tensors, residual: Tensor | None = None) -> Tensor:
        return self.row.functional(input.unsqueeze(2), _rows(tensors)).squeeze(2)
