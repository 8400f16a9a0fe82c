"""A pytest plugin: torch's depthwise convolutions, called by whatever test, run on this package's ops.

``python -m pytest -p routed ...``; DWCONV_ROUTE=0 counts the calls and leaves them to torch.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dwconv_ext
from dwconv_ext.ops.functional import DTYPES, as_weights_layout

ROUTES = os.environ.get("DWCONV_ROUTE", "1") != "0"
calls: Counter[str] = Counter()


def _conv(function: Any, dims: int, args: tuple, kwargs: dict) -> Tensor | None:
    """Ours of the call's arguments, where it is depthwise; None for torch's own."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(names, args, strict=False)),
        **kwargs,
    }
    groups = given.pop("groups")
    x, w = given.get("input"), given.get("weight")
    if not _is_depthwise(x, w, groups, dims) or w.shape[1] != 1:
        return None
    given["input"] = as_weights_layout(x, w)  # as DepthwiseConv2d does: nn.Conv2d's rule
    return function(**given)


def _transposed(function: Any, dims: int, args: tuple, kwargs: dict) -> Tensor | None:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    groups = given.pop("groups")
    if not _is_depthwise(given.get("input"), given.get("weight"), groups, dims):
        return None
    given["input"] = as_weights_layout(given["input"], given["weight"])
    return function(**given)


def _is_depthwise(x: Any, w: Any, groups: Any, dims: int) -> bool:
    if not (isinstance(x, Tensor) and isinstance(w, Tensor)) or x.dim() not in (dims + 1, dims + 2) or w.dim() != dims + 2:
        return False
    ours = x.device.type == "cpu" and x.layout is torch.strided and x.dtype in DTYPES
    return ours and isinstance(groups, int) and groups == x.shape[-dims - 1] > 0


ROUTED = {
    torch.conv1d: (_conv, dwconv_ext.depthwise_conv1d, 1),
    torch.conv2d: (_conv, dwconv_ext.depthwise_conv2d, 2),
    torch.conv_transpose1d: (_transposed, dwconv_ext.depthwise_conv_transpose1d, 1),
    torch.conv_transpose2d: (_transposed, dwconv_ext.depthwise_conv_transpose2d, 2),
}
assert F.conv1d is torch.conv1d and F.conv_transpose2d is torch.conv_transpose2d


class Routed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ROUTED:
            route, function, dims = ROUTED[func]
            result = route(function if ROUTES else lambda **_: "counted", dims, args, kwargs)
            if result is not None:
                calls[func.__name__] += 1
                if ROUTES:
                    return result
        return func(*args, **kwargs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: Any) -> None:
    """The mode is on in the test itself alone: torch's TestCase takes one around its tearDown for one that a test left behind."""
    test = item.obj

    @functools.wraps(test)
    def routed(*args: Any, **kwargs: Any) -> Any:
        with Routed():
            return test(*args, **kwargs)

    item.obj = routed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    who = "to dwconv_ext" if ROUTES else "by torch"
    terminalreporter.write_line(f"depthwise calls {who}: " + ", ".join(f"{n} {name}" for name, n in sorted(calls.items())))
