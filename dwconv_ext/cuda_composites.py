"""CUDA ops that have no kernel of ours yet, composed of ones that exist.

``depthwise_conv2d`` has its CUDA kernel (csrc/cuda); its backward is torch's own convolution backward, and the fused block
is the unfused sequence. Without the CUDA half every op says what is missing instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import activation_function

ops = torch.ops.dwconv_ext
_library = torch.library.Library("dwconv_ext", "IMPL")


def _depthwise_backward(grad: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, mask: Any) -> tuple:
    bias_sizes = [w.shape[0]] if mask[2] else None
    grads = torch.ops.aten.convolution_backward(
        grad, x, w, bias_sizes, stride, padding, dilation, False, [0, 0], x.shape[1], mask
    )
    return tuple(x.new_empty((0,)) if g is None else g for g in grads)


def _separable(
    x, dw, db, pw, pb, stride, padding, dilation, dw_act, pw_act, residual=None, dw_slope=0.01, pw_slope=0.01, pw_packed=None
):  # fmt: skip
    middle = activation_function(ops.depthwise_conv2d(x, dw, db, stride, padding, dilation), dw_act, dw_slope)
    output = activation_function(F.conv2d(middle, pw, pb), pw_act, pw_slope)
    return output if residual is None else output + residual


def register(available: bool, why_not: str) -> None:
    """Registers the CUDA key of every op that _C_cuda does not."""
    if available:
        _library.impl("depthwise_conv2d_backward", _depthwise_backward, "CUDA")
        _library.impl("separable_conv2d", _separable, "CUDA")
        return
    if torch.version.cuda is None:
        return  # torch itself says that it has no CUDA

    def missing(*args: Any) -> None:
        raise RuntimeError(f"dwconv_ext: CUDA tensors need the CUDA half, but {why_not}")

    for name in ("depthwise_conv2d", "depthwise_conv2d_backward", "separable_conv2d"):
        _library.impl(name, missing, "CUDA")
