"""FLOPs of the ops, two a multiply-add, as torch.utils.flop_counter's own formulas count them.

They are registered when somebody imports torch.utils.flop_counter, before or after this package, and not sooner: it imports
Triton, which takes several times as long as all of this package.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ..when_imported import when_imported


def register(counter: ModuleType) -> None:
    conv_flop_count, formula = counter.conv_flop_count, counter.register_flop_formula
    ours = torch.ops.dwconv_ext

    def block_flops(x, dw, pw, out_shape) -> int:
        batch, _channels, height, width = out_shape
        intermediate = [batch, dw[0], height, width]
        return conv_flop_count(list(x), list(dw), intermediate) + conv_flop_count(intermediate, list(pw), list(out_shape))

    @formula([ours.depthwise_conv2d])
    def _(x, w, *_, out_shape=None, **__) -> int:
        return conv_flop_count(list(x), list(w), list(out_shape))

    @formula(ours.depthwise_conv2d_backward)
    def _(grad, x, w, stride, padding, dilation, mask, *_, **__) -> int:
        return conv_flop_count(list(x), list(w), list(grad)) * (bool(mask[0]) + bool(mask[1]))

    @formula(ours.depthwise_conv1d_step)
    def _(x, state, w, *_, **__) -> int:
        return 2 * x[0] * x[1] * w[2]

    @formula(ours.depthwise_conv_transpose2d)
    def _(x, w, *_, out_shape=None, **__) -> int:
        return conv_flop_count(list(x), list(w), list(out_shape), transposed=True)

    @formula([ours.depthwise_norm_act, ours.depthwise_conv2d_pooled])
    def _(x, w, *_, out_shape=None, **__) -> int:
        return conv_flop_count(list(x), list(w), list(out_shape[0]))

    @formula(ours.depthwise_norm_act_backward)
    def _(grad, middle, x, w, *rest, **__) -> int:
        return conv_flop_count(list(x), list(w), list(grad)) * sum(map(bool, rest[-1]))

    @formula(ours.separable_conv2d)
    def _(x, dw, db, pw, *_, out_shape=None, **__) -> int:
        return block_flops(x, dw, pw, out_shape)

    @formula(ours.separable_conv2d_packed)
    def _(x, packed, block, *_, out_shape=None, **__) -> int:
        return block_flops(x, [x[1], 1, *block[1:3]], [block[0], x[1], 1, 1], out_shape)

    @formula(ours.pointwise_conv2d)
    def _(x, packed, out_channels, *_, out_shape=None, **__) -> int:
        return conv_flop_count(list(x), [out_channels, x[1], 1, 1], list(out_shape))

    @formula(ours.inverted_residual)
    def _(x, expand, hidden, expand_act, expand_slope, packed, block, *_, out_shape=None, **__) -> int:
        expanded = [x[0], hidden, *x[2:]]
        filters = [hidden, 1, *block[1:3]], [block[0], hidden, 1, 1]
        return conv_flop_count(list(x), [hidden, x[1], 1, 1], expanded) + block_flops(expanded, *filters, out_shape)


when_imported("torch.utils.flop_counter", register)
