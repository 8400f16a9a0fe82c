"""A depthwise layer with the mean over its output's pixels, as a folded layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.autograd import call
from .folded_layers import FoldedConv, Run, as_steps, fold, folds
from .folded_weights import Tensors

ops = torch.ops.dwconv_ext


class FoldedPooled(FoldedConv):
    """``y = act(bn(conv(x)))`` of a depthwise convolution and ``y.mean((2, 3), keepdim=True)``, in one pass on CUDA, where
    squeeze-and-excitation wants both (Hu et al., arXiv:1709.01507). Its tensors: FoldedConv's."""

    def make(self, tensors: Tensors, dtype: torch.dtype) -> Run | None:
        weights = self.folded_weights(tensors, dtype)
        return weights and (lambda input, residual, gate: self.pooled(input, *weights))

    def functional(self, input: Tensor, tensors: Tensors, residual: None = None) -> tuple[Tensor, Tensor]:
        if not folds(input, tensors):
            output = as_steps(input, tensors, self.settings)
            return output, output.mean((2, 3), keepdim=True)
        return self.pooled(input, *(None if t is None else t.to(input.dtype) for t in fold(*tensors, self.settings.eps)))

    def pooled(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.settings
        conv = s.geometry("depthwise_conv2d", weight)
        return call(ops.depthwise_conv2d_pooled.default, input, weight, bias, *conv, s.activation, s.slope)
