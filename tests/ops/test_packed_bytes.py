"""Packed weights that are not what the call is for are refused before anything reads them.

What says so on the CPU is their header (BlockFormat, csrc/cpu/kernels/args.h), where they begin and how many there are. A changed
weight cannot be told from another weight: it is no error.
"""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch
from calls import CHOICES, PLAIN, valid
from properties import given, st
from torch import Tensor

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C
pytestmark = pytest.mark.isa
HEADER = 64
NUMBERS = "channels", "out_channels", "kernel_h", "kernel_w", "pitch"  # int64s, at the header's end
TAKEN = {  # op and argument: what makes it
    ("depthwise_conv2d_packed", "packed"): "depthwise_conv2d_pack",
    ("separable_conv2d_packed", "packed"): "separable_conv2d_pack",
    ("pointwise_conv2d", "packed"): "pointwise_conv2d_pack",
    ("patch_conv2d", "packed"): "pointwise_conv2d_pack",
    ("linear", "packed"): "pointwise_conv2d_pack",
    ("inverted_residual", "expand"): "pointwise_conv2d_pack",
    ("inverted_residual", "packed"): "separable_conv2d_pack",
}
taken = pytest.mark.parametrize("taken", TAKEN, ids=".".join)
CALLS = st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in CHOICES.items()})


def assert_refused(taken: tuple[str, str], arguments: dict, bytes: Tensor) -> None:
    op, name = taken
    message = re.escape(f"{op}: {name} must be what {TAKEN[taken]} made on this device of ")
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments | {name: bytes})


def put(bytes: Tensor, at: int, **numbers: int) -> Tensor:
    """A copy that begins `at` bytes behind an allocation's beginning, with these numbers in the header."""
    copy = bytes.new_zeros(len(bytes) + at)[at:]
    copy.copy_(bytes)
    for name, number in numbers.items():
        place = HEADER - 8 * len(NUMBERS) + 8 * NUMBERS.index(name)
        copy[place : place + 8] = bytes.new_tensor(list(struct.pack("<q", number)))
    return copy


@taken
def test_the_header_lies_where_these_tests_look(taken, isa):
    arguments = valid(taken[0], PLAIN)
    bytes = arguments[taken[1]]
    channels, _, kernel_h, kernel_w, _ = struct.unpack(f"<{len(NUMBERS)}q", bytes[HEADER - 40 : HEADER].numpy().tobytes())
    kernel = 3 if TAKEN[taken] != "pointwise_conv2d_pack" else 0
    assert (kernel_h, kernel_w) == (kernel, kernel) and channels > 0
    assert len(bytes) > HEADER and not bytes[HEADER - 1]  # a pitch below 2^56
    assert isinstance(getattr(ops, taken[0])(**arguments | {taken[1]: put(bytes, 16)}), Tensor)


@taken
@given(st.data())
def test_a_changed_header(taken, data):
    arguments = valid(taken[0], data.draw(CALLS))
    bytes = arguments[taken[1]].clone()
    for at in data.draw(st.sets(st.integers(0, HEADER - 1), min_size=1, max_size=3)):
        bytes[at] ^= data.draw(st.integers(1, 255))
    assert_refused(taken, arguments, bytes)


@taken
@given(st.data())
def test_another_number_of_bytes(taken, data):
    arguments = valid(taken[0], data.draw(CALLS))
    bytes = arguments[taken[1]]
    cut = data.draw(st.integers(1, len(bytes)))
    assert_refused(taken, arguments, bytes[: len(bytes) - cut].clone())
    assert_refused(taken, arguments, bytes[cut:].clone())
    assert_refused(taken, arguments, torch.cat((bytes, bytes[:cut])))


@taken
@given(st.data())
def test_what_another_op_packed(taken, data):
    """Or the same one of other sizes or another dtype."""
    how = data.draw(CALLS)
    arguments, other = valid(taken[0], how), data.draw(st.sampled_from(list(TAKEN)))
    bytes = valid(other[0], data.draw(st.sampled_from((how, data.draw(CALLS)))))[other[1]]
    right = arguments[taken[1]]
    if len(bytes) == len(right) and torch.equal(bytes[:HEADER], right[:HEADER]):
        assert TAKEN[other] == TAKEN[taken] and isinstance(getattr(ops, taken[0])(**arguments | {taken[1]: bytes}), Tensor)
    else:
        assert_refused(taken, arguments, bytes)


@taken
def test_where_the_bytes_lie(taken, isa):
    """Kernels read floats there; and a storage can be taken from under its tensor."""
    arguments = valid(taken[0], PLAIN)
    bytes = arguments[taken[1]]
    for at in (1, 2, 4, 8, 15, 63):
        assert_refused(taken, arguments, put(bytes, at))
    for left in (0, 1, HEADER, len(bytes) - 1):
        cut = bytes.clone()
        cut.untyped_storage().resize_(left)
        assert_refused(taken, arguments, cut)
    cut = put(bytes, 16)
    cut.untyped_storage().resize_(len(bytes))
    assert_refused(taken, arguments, cut)


# Sizes whose product, or whose bytes, are those of small weights modulo 2^64.
SIZES = st.lists(st.integers(0, 62).map(lambda bits: 2**bits), min_size=3, max_size=3)


def small_and_empty(taken: str, arguments: dict, **numbers: int) -> Tensor:
    """Bytes whose header has these numbers, as many as C++ would count of them without a look at overflows."""
    bytes = arguments["packed"]
    header = dict(zip(NUMBERS, struct.unpack("<5q", bytes[HEADER - 40 : HEADER].numpy().tobytes()), strict=True))
    lanes = header["pitch"]  # of one channel
    header |= numbers
    count = _C.block_bytes("float32", *(header[name] for name in NUMBERS[:4]))
    made = torch.cat((bytes[:HEADER], bytes.new_zeros(min(max(count - HEADER, 0), 2**20))))
    return put(made, 0, **numbers, pitch=(header["channels"] + 2 * (lanes - 1)) // lanes * lanes)


@pytest.mark.parametrize("taken", list(TAKEN)[:3], ids=".".join)
@given(SIZES.filter(lambda sizes: max(sizes[0], sizes[1] * sizes[2]) > 2**21))
def test_a_header_that_agrees_with_numbers_no_weights_have(taken, sizes):
    """Without them this would read far beyond the bytes' end."""
    op, outputs = taken[0], sizes[0] if taken[0] != "pointwise_conv2d" else min(math.prod(sizes), 2**62)
    arguments = valid(op, PLAIN | {"channels": 1, "multiplier": 1, "optional": False})
    if op == "pointwise_conv2d":
        bytes = small_and_empty(op, arguments, out_channels=outputs)
        assert_refused(("linear", "packed"), valid("linear", PLAIN | {"channels": 1}) | {"out_features": outputs}, bytes)
        return assert_refused(taken, arguments | {"out_channels": outputs}, bytes)
    kernel = {"kernel_h": sizes[1], "kernel_w": sizes[2]}
    bytes = small_and_empty(op, arguments, **{"channels" if op.startswith("depthwise") else "out_channels": outputs}, **kernel)
    rest = "filter" if op.startswith("depthwise") else "block"
    arguments[rest] = [outputs, *kernel.values(), 2**61, 2**61, *[2**61 - 1] * 4, 1, 1, *arguments[rest][11:]]
    assert_refused(taken, arguments, bytes)


@taken
@given(st.data())
def test_a_changed_weight_is_another_weight(taken, data):
    arguments = valid(taken[0], PLAIN | {"dtype": torch.float32})
    right = getattr(ops, taken[0])(**arguments)
    bytes = arguments[taken[1]].clone()
    for at in data.draw(st.sets(st.integers(HEADER, len(bytes) - 1), max_size=8)):
        bytes[at] ^= data.draw(st.integers(1, 255))
    got = getattr(ops, taken[0])(**arguments | {taken[1]: bytes})
    assert got.shape == right.shape and got.dtype == right.dtype
