"""Inverted residuals: operands, the two ops that one stands for, float64, and what is asked of CUDA's kernels.

A shape: batch, input channels, hidden channels, output channels, height, width, filter, stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from implementations import Implementation
from tolerance import UNIT, assert_close

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
ACTIVATIONS = {"relu6": F.relu6, "silu": F.silu, "identity": lambda x: x}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


CPU = Implementation("cpu")


def operands(shape, dtype, layout, act="relu6", added=False, on=CPU):
    """CUDA's kernels multiply weights of the input's dtype: they are given such."""
    n, c, hidden, o, h, w, k, s = shape
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weights = [torch.randn(hidden, c, 1, 1) / c**0.5, torch.randn(hidden), torch.randn(hidden, 1, k, k) / k, torch.randn(hidden)]
    weights = [t.to(wide) for t in (*weights, torch.randn(o, hidden, 1, 1) / hidden**0.5, torch.randn(o))]
    weights = on.on_device([t.to(dtype).to(wide) if on.cuda else t for t in weights])
    isa, number = _C.selected_isa(), _C.activations[act]
    expand = ops.pointwise_conv2d_pack(*weights[:2], isa, name_of(dtype))
    packed = ops.separable_conv2d_pack(*weights[2:], isa, name_of(dtype))
    block = [o, k, k, s, s, *[k // 2] * 4, 1, 1, number, 0]
    out_h, out_w = ((side + 2 * (k // 2) - k) // s + 1 for side in (h, w))
    residual = torch.randn(n, o, out_h, out_w).to(dtype).contiguous(memory_format=layout) if added else None
    x, residual = on.on_device([x, residual])
    return (x, expand, hidden, number, 0.0, packed, block, [0.0, 0.0], residual), weights


def two_ops(x, expand, hidden, number, slope, packed, block, slopes, residual, tf32=False):
    expanded = ops.pointwise_conv2d(x, expand, hidden, 1, number, slope, None, None, tf32)
    return ops.separable_conv2d_packed(expanded, packed, block, slopes, residual, tf32)


def reference(arguments, weights, act, convert=torch.Tensor.double):
    x, block, residual = arguments[0], arguments[6], arguments[8]
    f = ACTIVATIONS[act]
    ew, eb, dw, db, pw, pb = map(convert, weights)
    middle = f(F.conv2d(f(F.conv2d(convert(x), ew, eb)), dw, db, block[3], block[5], 1, len(dw)))
    y = F.conv2d(middle, pw, pb)
    return y if residual is None else y + convert(residual)


def check_cuda(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, on: Implementation, act: str = "relu6",
    added: bool = False, tf32: bool = False,
) -> None:  # fmt: skip
    """Against float64, element by element: both intermediates are rounded to the input's dtype, and for tf32 all operands."""
    arguments, weights = operands(shape, dtype, layout, act, added, on)
    got, want = ops.inverted_residual(*arguments, tf32), reference(arguments, weights, act)
    absolute = reference(arguments, weights, "identity", lambda t: t.double().abs())
    _, c, hidden, _, _, _, kernel, _ = shape
    stretch = 1.1**2 if act == "silu" else 1
    middle = stretch * absolute * (6 * 2.0**-11 if tf32 else 2.5 * UNIT[dtype])
    assert got.dtype == dtype and got.stride() == two_ops(*arguments, tf32).stride()
    assert_close(got, want, stretch * absolute, c + kernel**2 + hidden + 16, middle=middle)
