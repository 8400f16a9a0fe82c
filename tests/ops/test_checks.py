"""Python checks tensors without data (dwconv_ext/ops/checks.py) and C++ those with (csrc/common/checks.h): both say the same.

A call that is right, with one or two mistakes made in it, on the CPU, on meta tensors and on fake ones: results of the same
shapes, dtypes and strides, or the same exception.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from calls import CHOICES, OPS, PLAIN, valid
from cases import LAYOUTS
from implementations import EMULATOR, running
from properties import given, st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dwconv_ext import _C
from dwconv_ext._extension import STAGES

ops = torch.ops.dwconv_ext

# --- mistakes ----------------------------------------------------------------------------------------------------------


def at(index: int, *values):
    """Puts these into a list from `index` on."""
    return lambda old: [*old[:index], *values, *old[index + len(values) :]]


def other_float(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)


DTYPE = {
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "other_float": other_float,
}
RANK = {"rank_less": lambda t: t.new_zeros(t.shape[1:]), "rank_more": lambda t: t[None], "scalar": lambda t: t.new_zeros(())}
SHAPE = {
    **RANK,
    "no_channels": lambda t: t[:, :0],
    "channels_other": lambda t: t[:, :3] if t.shape[1] > 3 else torch.cat((t, t), 1),
    "no_rows": lambda t: t[:, :, :0],
    "no_columns": lambda t: t[..., :0],
}
SAME_IMAGE = {
    **SHAPE,
    **DTYPE,
    "batch_more": lambda t: t.new_zeros(len(t) + 1, *t.shape[1:]),
    "rows_less": lambda t: t[:, :, 1:],
    "columns_less": lambda t: t[..., 1:],
}
FILTERS = {
    **SHAPE,
    "no_filters": lambda t: t[:0],
    "filters_more": lambda t: torch.cat((t, t[:1])),
    "filters_twice": lambda t: torch.cat((t, t)),
    "large": lambda t: t.new_zeros(*t.shape[:2], 20, 20),
    "wide": lambda t: t.new_zeros(*t.shape[:2], 1, 20),
}
VECTOR = {**RANK, "shorter": lambda t: t[1:], "longer": lambda t: torch.cat((t, t[:1])), **DTYPE}
MATRIX = {**VECTOR, "no_columns": lambda t: t[..., :0], "no_rows": lambda t: t[:0]}
LENGTH = {"none": lambda _: [], "one": lambda v: v[:1], "three": lambda v: [*v, v[-1]]}
LARGE = {"huge": lambda _: (2**45, 2**45), "huge_columns": lambda _: (1, 2**46), "largest": lambda _: (2**63 - 1, 1)}
ACTIVATION = {"unknown": lambda _: "swish", "empty": lambda _: "", "capital": lambda _: "ReLU", "quoted": lambda _: "it's"}

# By the argument's name, for every op that has one.
MISTAKES = {
    "input": {**SHAPE, "small": lambda t: t[..., :2, :2], **DTYPE},
    **dict.fromkeys(("grad_output", "middle", "residual", "gate"), SAME_IMAGE),
    "weight": {**FILTERS, **DTYPE},
    "dw_weight": {**FILTERS, **DTYPE},
    "pw_weight": {**FILTERS, **DTYPE},
    **dict.fromkeys(("bias", "dw_bias", "pw_bias", "mean", "variance", "reduce_bias", "expand_bias"), VECTOR),
    **dict.fromkeys(("mean_grad_weight", "mean_grad_bias", "norm_weight", "norm_bias"), VECTOR),
    **dict.fromkeys(("reduce_weight", "expand_weight"), MATRIX),
    "stride": {"zero": lambda _: (0, 1), "negative": lambda _: (1, -2), **LENGTH, **LARGE},
    "padding": {
        "negative": lambda _: (-1, 0),
        "negative_columns": lambda _: (0, -1),
        "overflows": lambda _: (2**62, 0),
        "overflows_columns": lambda _: (0, 2**62 - 2),
        **LENGTH,
        **LARGE,
    },
    "output_padding": {
        "negative": lambda _: (-1, 0), "stride": lambda _: (1, 0), "columns": lambda _: (0, 3), **LENGTH, **LARGE,
    },
    "dilation": {"zero": lambda _: (1, 0), "negative": lambda _: (-1, 1), "four": lambda _: (4, 4), **LENGTH, **LARGE},
    **dict.fromkeys(("act", "dw_act", "pw_act"), ACTIVATION),
    "output_mask": {"two": lambda m: m[:2], "four": lambda m: [*m, True], "none": lambda _: []},
    "eps": {"negative": lambda _: -1e-5, "long": lambda _: -0.123456789, "nan": lambda _: float("nan")},
    "isa": {"unknown": lambda _: "sse9", "empty": lambda _: ""},
    "input_dtype": {"unknown": lambda _: "int8", "float16": lambda _: "float16", "float64": lambda _: "float64"},
    "packed": {
        **DTYPE, **RANK, "cut": lambda t: t[:-1], "longer": lambda t: torch.cat((t, t[:1])), "empty": lambda t: t[:0],
        "strided": lambda t: torch.stack((t, t), 1)[:, 0],
    },
    "block": {
        "short": lambda b: b[:10], "long": lambda b: [*b, 0], "empty": lambda _: [], "outputs": lambda b: [b[0] + 64, *b[1:]],
        "no_outputs": at(0, 0), "huge": at(0, 2**62, 2**62, 2**62), "filter": at(1, 3, 5), "negative_filter": at(1, -3, -3),
        "stride": at(3, 0), "padding": at(5, 0, -1), "huge_padding": at(5, 2**45, 2**45), "dilation": at(9, -1),
        "far_apart": at(9, 9), "activation": at(12, 8), "negative_activation": at(11, -1),
    },
    "slopes": {"none": lambda _: [], "one": lambda s: s[:1], "three": lambda s: [*s, 0.0]},
}  # fmt: skip

# What the named cases find no mistake after all.
ALLOWED = {
    *((op, "stride", name) for op in ("depthwise_conv2d", "depthwise_conv2d_pooled", "depthwise_norm_act") for name in LARGE),
    *(("separable_conv2d_pack", "dw_weight", name) for name in ("large", "wide")),
    *(("depthwise_conv2d_pack", "weight", name) for name in ("large", "wide")),
    ("separable_conv2d_pack", "input_dtype", "float16"),
    *(("pointwise_conv2d_pack", "weight", name) for name in ("channels_other",)),
    ("pointwise_conv2d_pack", "input_dtype", "float16"),
    ("depthwise_conv2d_pack", "input_dtype", "float16"),
    *(("depthwise_conv_transpose2d", "weight", name) for name in ("large", "wide")),
    *(("depthwise_conv_transpose2d", "input", name) for name in ("small",)),
    ("depthwise_conv_transpose2d", "dilation", "four"),
    *((op, "input", "small") for op in ("batch_norm_act", "batch_norm_statistics", "batch_norm_act_apply")),
    *(("batch_norm_statistics", "input", name) for name in ("channels_other", "other_float")),
    ("layer_norm2d", "input", "small"),
    ("squeeze_excitation", "input", "small"),
    ("global_average_pool", "input", "small"),
    *((op, "input", name) for op in ("global_average_pool", "max_pool2d") for name in ("channels_other", "other_float")),
    *(("max_pool2d", "stride", name) for name in LARGE),
    *(("linear", "input", name) for name in ("rank_less", "rank_more")),
}


PACKED = ("pointwise_conv2d", "patch_conv2d", "linear", "depthwise_conv2d_packed")
FILTER = {
    "short": lambda f: f[:8],
    "long": lambda f: [*f, 1],
    "empty": lambda _: [],
    "outputs": lambda f: [f[0] + 64, *f[1:]],
    "no_outputs": at(0, 0),
    "huge": at(0, 2**62),
    "high": at(1, 5),
    "negative": at(1, -3, -3),
    "stride": at(3, 0),
    "endless": at(1, 2**40),
    "padding": at(5, 0, -1),
    "huge_padding": at(5, 2**45, 2**45),
    "dilation": at(9, -1),
    "far_apart": at(9, 9),
}

# And of arguments that are another op's in name alone.
OTHERS = {
    **{(op, "weight"): VECTOR for op in OPS if op.startswith("batch_norm")},
    ("layer_norm2d", "weight"): VECTOR,
    ("depthwise_conv_transpose2d", "weight"): {
        **SHAPE,
        **DTYPE,
        "no_filters": lambda t: t[:0],
        "filters_more": lambda t: torch.cat((t, t[:1])),
        "large": lambda t: t.new_zeros(*t.shape[:2], 20, 20),
        "wide": lambda t: t.new_zeros(*t.shape[:2], 1, 20),
        "filters_less": lambda t: t[:1],
    },
    ("max_pool2d", "kernel_size"): {
        "one": lambda k: k[:1],
        "none": lambda _: (0, 3),
        "negative": lambda _: (3, -1),
        "high": lambda _: (9, 3),
        "huge": lambda _: (2**62, 3),
    },
    ("squeeze_excitation", "gate"): ACTIVATION,
    ("pointwise_conv2d", "stride"): {"zero": lambda _: 0, "negative": lambda _: -1},
    ("inverted_residual", "hidden"): {"more": lambda n: n + 64, "none": lambda _: 0, "huge": lambda _: 2**62},
    ("inverted_residual", "expand_act"): {"unknown": lambda _: 8, "negative": lambda _: -1},
    **{(op, "act"): {"unknown": lambda _: 8, "negative": lambda _: -1} for op in PACKED},
    ("linear", "input"): {**RANK, "no_rows": lambda t: t[:0], "no_features": lambda t: t[..., :0], **DTYPE},
    ("linear", "out_features"): {"more": lambda n: n + 64, "none": lambda _: 0, "huge": lambda _: 2**62},
    **{(op, "filter"): FILTER for op in ("patch_conv2d", "depthwise_conv2d_packed")},
    ("interleave_channels", "second"): SAME_IMAGE,
    ("depthwise_norm_act_backward", "output_mask"): {"one": lambda m: m[:1], "three": lambda m: [*m, True], "none": lambda _: []},
    ("interleave_channels", "first"): {**RANK, **DTYPE, "channels_less": lambda t: t[:, :1]},
    ("pointwise_conv2d", "out_channels"): {"more": lambda n: n + 64, "none": lambda _: 0, "huge": lambda _: 2**62},
}


def mistakes(op: str) -> dict[tuple[str, str], object]:
    """By argument and name."""
    found = {}
    for argument in valid(op, PLAIN):
        made = OTHERS.get((op, argument), MISTAKES.get(argument, {}))
        found |= {(argument, name): make for name, make in made.items()}
    return found


ON_THE_EMULATOR = (
    *STAGES,
    "depthwise_conv2d_pooled",
    "depthwise_norm_act",
    "depthwise_norm_act_backward",
)  # whose C++ is CUDA's alone


@pytest.fixture(autouse=True)
def where_the_op_is(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    op = params.get("op") or params.get("named", ("",))[0]
    with running(EMULATOR) if op in ON_THE_EMULATOR else nullcontext():
        yield


SHORT_VECTORS = all(row["vector_bytes"] == 16 for row in _C.kernel_table() if row["isa"] == _C.selected_isa())


# --- the same on the CPU and without data ------------------------------------------------------------------------------


def strides(t: Tensor) -> tuple:
    """Where a derivative is wanted torch's activation follows, which gives axes of one element other strides on the CPU."""
    return tuple(stride if size > 1 or not t.requires_grad else None for size, stride in zip(t.shape, t.stride(), strict=True))


def outcome(op: str, arguments: dict) -> tuple:
    try:
        results = getattr(ops, op)(**arguments)
    except Exception as e:
        return type(e), str(e)
    return tuple((t.shape, t.dtype, strides(t)) for t in (results if isinstance(results, tuple) else (results,)))


def without_data(arguments: dict, convert) -> dict:
    return {name: convert(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def on_meta(t: Tensor) -> Tensor:
    meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return meta.requires_grad_(t.requires_grad)


def check(op: str, arguments: dict) -> tuple:
    """What the call gives on the CPU, after seeing that it gives the same without data."""
    wanted = outcome(op, arguments)
    if SHORT_VECTORS and " must be what " in str(wanted):
        # Without data packed weights have a size alone, which vectors of 16 bytes make the same for 3 and 4 channels.
        return wanted
    assert outcome(op, without_data(arguments, on_meta)) == wanted
    with FakeTensorMode() as mode:
        assert outcome(op, without_data(arguments, mode.from_tensor)) == wanted
    return wanted


def raised(result: tuple) -> bool:
    return isinstance(result[0], type)


MADE = {op: mistakes(op) for op in OPS}
NAMED = [(op, *mistake) for op in OPS for mistake in MADE[op]]


@pytest.mark.parametrize("changed", [(name, value) for name, choices in CHOICES.items() for value in choices], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_right_calls(op, changed):
    for layout in LAYOUTS:
        assert not raised(check(op, valid(op, {**PLAIN, "layout": layout, changed[0]: changed[1]})))


# Bytes of the same number for another dtype: only what they hold says so.
NAMED.remove(("depthwise_conv2d_packed", "input", "other_float"))


@pytest.mark.parametrize("named", NAMED, ids="-".join)
def test_one_mistake(named):
    op, argument, name = named
    arguments = valid(op, {**PLAIN, "kernel": 1} if argument == "gate" else PLAIN)
    arguments[argument] = MADE[op][argument, name](arguments[argument])
    assert raised(check(op, arguments)) == (named not in ALLOWED)


def mistaken(op: str):
    """What a call is like, the mistakes in it, and whether a derivative is wanted of it."""
    how = st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in CHOICES.items()})
    made = st.lists(st.sampled_from(list(MADE[op])), max_size=2, unique_by=lambda mistake: mistake[0])
    return st.tuples(how, made, st.booleans())


@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_generated(op, data):
    how, made, with_gradients = data.draw(mistaken(op))
    arguments = valid(op, how)
    for argument, name in made:
        if arguments[argument] is not None:
            arguments[argument] = MADE[op][argument, name](arguments[argument])
    if with_gradients:
        for t in arguments.values():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.requires_grad_()
    wanted = outcome(op, arguments)
    if raised(wanted) and "packed must be what" in wanted[1]:
        return  # the bytes say what they were made of: without them it may not be seen, where their number fits
    check(op, arguments)


@pytest.mark.parametrize("op", ("depthwise_conv2d", "separable_conv2d"))
def test_no_images_too_large_to_allocate(op):
    arguments = valid(op, {**PLAIN, "batch": 0, "optional": False})
    assert raised(check(op, {**arguments, "padding": (2**45, 2**45)}))
