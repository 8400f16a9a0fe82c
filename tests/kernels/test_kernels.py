"""Every row of the kernel table is forced and run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import CACHE_CASES, CASES, LAYOUTS, Case
from reference import Convolution, check_batch_norm, check_depthwise, check_separable, convolved
from rows import TABLE, check_nan_at_an_edge, forced_case, label

import dwconv_ext

_C = dwconv_ext._C


def test_the_table_names_each_kernel_once():
    labels = [label(row) for row in TABLE]
    assert len(set(labels)) == len(labels) > 0
    assert {row["isa"] for row in TABLE} == set(_C.supported_isas())


@pytest.mark.parametrize("forced", TABLE, ids=label, indirect=True)
def test_row(forced):
    case, dtype, layout = forced_case(forced, channels=35, width=37)
    if forced["op"] == "depthwise_conv2d":
        plan = _C.plan(
            forced["op"],
            forced["pass"],
            forced["dtype"],
            forced["layout"],
            2,
            35,
            case.size,
            case.kernel,
            case.stride,
            case.conv.padding,
            (1, 1),
        )
        assert label(plan) == label(forced), "another kernel would run"
        check_depthwise(*case.tensors(dtype, layout), case.conv, peer=False)
        return
    if forced["op"] == "batch_norm_act":
        x, channels = case.tensors(dtype, layout)[0], torch.randn(2, 35, dtype=torch.promote_types(dtype, torch.float32))
        check_batch_norm(x, *channels, "relu")
        check_batch_norm(x, *channels, "silu")
        return
    if forced["op"] == "depthwise_conv1d_step":
        x, w, state = torch.randn(2, 35, 3).to(dtype), torch.randn(35, 1, 4).to(dtype), torch.zeros(2, 35, 3, dtype=dtype)
        steps = [dwconv_ext.depthwise_conv1d_step(sample, state, w, act="silu") for sample in x.unbind(2)]
        assert torch.equal(torch.stack(steps, 2), dwconv_ext.depthwise_conv1d(x, w, act="silu", causal=True))
        assert torch.equal(state, x)
        return
    x, dw, db = case.tensors(dtype, layout)
    pw = (torch.randn(70, 35, 1, 1) / 6).to(dtype)
    check_separable(x, dw, db, pw, None, case.conv, "relu", "relu")


def test_a_wrong_instruction_set_says_what_there_is():
    with pytest.raises(RuntimeError, match=r"DWCONV_EXT_ISA: 'sse9'.*baseline"):
        _C.select_isa("sse9")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stale_forcing_does_not_break_a_problem_it_does_not_fit(layout):
    _C.force_row("depthwise_forward_nhwc", 7, 2)
    try:
        check_depthwise(*Case("plain", 1, 16, (9, 9)).tensors(torch.float32, layout), Convolution(padding=(1, 1)), peer=False)
    finally:
        _C.force_row("")


@pytest.mark.parametrize("forced", [row for row in TABLE if row["name"].endswith("_flat")], ids=label, indirect=True)
def test_rows_of_pixels_as_lanes(forced):
    """Vectors that begin at any channel, rows shorter and longer than one; the bits of the kernel whose lanes are channels."""
    activations = itertools.cycle(["identity", "relu6", "silu"])
    for channels, size, padding in itertools.product(
        (1, 2, 5, 8, 16, 17, 24, 33), ((1, 1), (2, 5), (4, 1), (3, 7), (9, 4), (6, 30)), range(4)
    ):
        if min(size) + 2 * padding < 3:
            continue
        case = Case("", 2, channels, size, padding=(padding, padding))
        tensors = case.tensors(getattr(torch, forced["dtype"]), "channels_last")
        act = next(activations)
        flat = dwconv_ext.depthwise_conv2d(*tensors, *case.conv.args(), act)
        _C.force_row("depthwise_forward_nhwc", 3, 1)
        assert torch.equal(dwconv_ext.depthwise_conv2d(*tensors, *case.conv.args(), act), flat)
        _C.force_row(forced["name"], 3, 1)
        if channels in (5, 24):
            check_depthwise(*tensors, case.conv, peer=False)  # the input gradient's padding is negative where this one is 3


def in_columns(row: dict) -> bool:
    depthwise = row["op"] == "depthwise_conv2d"
    return depthwise and row["name"].endswith(("nchw_rows", "nchw_direct")) and row["dtype"] in ("float32", "bfloat16")


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("forced", list(filter(in_columns, TABLE)), ids=label, indirect=True)
def test_columns_as_lanes(forced, padding):
    """Every width up to three vectors of 16 and some up to nine, with rows that end in part of a vector, or none."""
    kernels = [forced["filter"]] if forced["filter"] else [3, 4, 5, 7]
    if forced["name"].endswith("direct") and not forced["filter"]:
        kernels = [4, 18]  # less and more than a vector
    for kernel in kernels:
        widths = (*range(max(1, kernel - 2 * padding), 50), 63, 64, 65, 80, 97, 129)
        # Each width with one padding, every third with the others.
        for width in widths if padding == 1 else widths[padding % 3 :: 3]:
            stride = forced["stride"] or 1 + width % 3
            height = max(1 + 7 * width % 19, kernel - 2 * padding)
            case = Case("", 2, 3, (height, width), (kernel,) * 2, (stride,) * 2, (padding,) * 2)
            check_depthwise(*case.tensors(getattr(torch, forced["dtype"]), "nchw"), case.conv, peer=False)


@pytest.mark.parametrize("forced", list(filter(in_columns, TABLE)), ids=label, indirect=True)
def test_columns_as_lanes_are_activated(forced):
    kernel, stride = forced["filter"] or 3, forced["stride"] or 1
    for width in (9, 33):
        case = Case("", 2, 3, (9, width), (kernel,) * 2, (stride,) * 2)
        tensors = case.tensors(getattr(torch, forced["dtype"]), "nchw")
        plain = dwconv_ext.depthwise_conv2d(*(t.double() for t in tensors), *case.conv.args())
        for name in ("relu", "relu6", "silu"):
            y = dwconv_ext.depthwise_conv2d(*tensors, *case.conv.args(), name)
            expected = getattr(torch.nn.functional, name)(plain)
            tolerance = 0.02 if y.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


PLANE_BLOCKS = {  # case, output channels
    "part of a vector": (Case("", 2, 5, (3, 3)), 3),
    "rows that are parts of vectors": (Case("", 2, 19, (13, 11)), 40),
    "strided": (Case("", 2, 33, (30, 26), (3, 3), (2, 2)), 24),
    "wide filter": (Case("", 1, 16, (20, 35), (5, 7)), 9),
    "uneven strides": (Case("", 2, 7, (17, 40), (3, 5), (1, 3)), 33),
    "blocks of the sums": (Case("", 1, 530, (6, 9)), 17),
    "many tiles": (Case("", 3, 64, (90, 70)), 70),
    "dilated, for another kernel": (Case("", 1, 8, (14, 14), (3, 3), (1, 1), (2, 2), (2, 2)), 8),
}


def is_plane_block(row: dict) -> bool:
    return row["name"] == "separable_forward_nchw_direct"


@pytest.mark.parametrize("case, outputs", PLANE_BLOCKS.values(), ids=PLANE_BLOCKS)
@pytest.mark.parametrize("forced", list(filter(is_plane_block, TABLE)), ids=label, indirect=True)
def test_blocks_with_pixels_as_lanes(forced, case, outputs):
    dtype = getattr(torch, forced["dtype"])
    x, dw, db = case.tensors(dtype, "nchw")
    pw = (torch.randn(outputs, case.channels, 1, 1) / case.channels**0.5).to(dtype)
    pb = torch.randn(outputs, dtype=torch.float32).to(dtype)
    check_separable(x, dw, db, pw, pb, case.conv, "relu6", "relu", peer=False)
    size = convolved(x[:, :1].float(), dw[:1].float(), None, case.conv).shape[2:]
    residual = torch.randn(x.shape[0], outputs, *size).to(dtype)
    check_separable(x, dw, None, pw, None, case.conv, "silu", "gelu", residual, peer=False)


def everything(case, dtype):
    """Output and gradients of the depthwise convolution, and a block, in channels_last; and the output in NCHW."""
    x, w, b = case.tensors(dtype, "channels_last")
    y = torch.ops.dwconv_ext.depthwise_conv2d(x, w, b, *case.conv.args())
    planes = torch.ops.dwconv_ext.depthwise_conv2d(x.contiguous(), w, b, *case.conv.args())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y).contiguous(memory_format=torch.channels_last)
    results = [y, planes, *torch.ops.dwconv_ext.depthwise_conv2d_backward(grad, x, w, *case.conv.args(), [True, True, True])]
    if case.multiplier == 1:
        pw = torch.randn(37, case.channels, 1, 1, generator=torch.Generator().manual_seed(2)).to(dtype)
        results.append(torch.ops.dwconv_ext.separable_conv2d(x, w, b, pw, None, *case.conv.args(), "relu", "relu"))
    return results


# An instruction set that has no rows of its own for a dtype runs those of the one below.
SETS = [(isa, dtype) for isa, dtype in dict.fromkeys((r["isa"], r["dtype"]) for r in TABLE) if dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("isa, dtype", SETS)
@pytest.mark.parametrize("case", CASES + CACHE_CASES, ids=str)
def test_where_the_input_lies_changes_no_bit(case, dtype, isa):
    height, width = case.size
    size = (min(height, 9) if width > 200 else height, width)  # rows are what is gone through; columns end tiles
    case = replace(case, channels=case.channels + 128, size=size)  # so many that a pixel's rows are gone through in order
    dtype = getattr(torch, dtype)
    before = _C.selected_isa()
    _C.select_isa(isa)
    try:
        _C.set_prefetch_threshold(1 << 40)
        near = everything(case, dtype)
        _C.set_prefetch_threshold(0)
        beyond_l2 = everything(case, dtype)
    finally:
        _C.set_prefetch_threshold(-1)
        _C.select_isa(before)
    assert all(torch.equal(a, b) for a, b in zip(near, beyond_l2, strict=True))


WEIGHT_ROWS = [row for row in TABLE if row["pass"] == "backward_weight"]


@pytest.mark.parametrize("forced", WEIGHT_ROWS, ids=label, indirect=True)
def test_nan_at_an_edge_reaches_only_the_taps_that_meet_it(forced):
    for width in (5, 9, 18):
        check_nan_at_an_edge(forced, channels=20, width=width)
