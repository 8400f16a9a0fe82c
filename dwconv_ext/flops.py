"""FLOPs of the ops, two a multiply-add, as torch.utils.flop_counter's own formulas count them.

They are registered when somebody imports torch.utils.flop_counter, before or after this package, and not sooner: it imports
Triton, which takes several times as long as all of this package.
"""

from __future__ import annotations

import importlib.abc
import math
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def register(counter: ModuleType) -> None:
    conv_flop_count, formula = counter.conv_flop_count, counter.register_flop_formula
    ours = torch.ops.dwconv_ext

    # onednn.py calls torch's two, which its counter may know by itself one day, or a torch may lack.
    def uncounted(*names: str) -> list[Any]:
        ops = (getattr(torch.ops.mkldnn, name, None) for name in names)
        return [op for op in ops if op is not None and op not in counter.flop_registry]

    def block_flops(x, dw, pw, out_shape) -> int:
        batch, _channels, height, width = out_shape
        intermediate = [batch, dw[0], height, width]
        return conv_flop_count(list(x), list(dw), intermediate) + conv_flop_count(intermediate, list(pw), list(out_shape))

    @formula([ours.depthwise_conv2d, *uncounted("_convolution_pointwise")])
    def _(x, w, *_, out_shape=None, **__) -> int:
        return conv_flop_count(list(x), list(w), list(out_shape))

    @formula(uncounted("_linear_pointwise"))
    def _(x, w, *_, out_shape=None, **__) -> int:
        return 2 * math.prod(x) * out_shape[-1]

    @formula(ours.depthwise_conv2d_backward)
    def _(grad, x, w, stride, padding, dilation, mask, *_, **__) -> int:
        return conv_flop_count(list(x), list(w), list(grad)) * (bool(mask[0]) + bool(mask[1]))

    @formula(ours.separable_conv2d)
    def _(x, dw, db, pw, *_, out_shape=None, **__) -> int:
        return block_flops(x, dw, pw, out_shape)

    @formula(ours.separable_conv2d_packed)
    def _(x, packed, block, *_, out_shape=None, **__) -> int:
        return block_flops(x, [x[1], 1, *block[1:3]], [block[0], x[1], 1, 1], out_shape)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Steps aside at the counter's import, and registers the formulas behind it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)  # looking for it without importing it was not yet the import
                run(module)
                register(module)

            spec.loader.exec_module = run_and_register
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
