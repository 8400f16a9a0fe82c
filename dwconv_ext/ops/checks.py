"""The checks of csrc/common/checks.h for tensors without data: the same ones, in the same order and words.

tests/ops/test_checks.py holds the two together. Sizes may be symbolic here: each comparison is a torch._check of its own, which
becomes a guard or an assertion, and a limit that no real shape comes near is checked only where the numbers are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._extension import _C, _C_cuda
from .activations import ACTIVATIONS, GATES
from .arguments import MOST_INT64, at_least, check_activation, four_paddings
from .functional import DTYPES, accumulation_dtype, name_of

MOST_BYTES = 2**48  # more than a process can address
FILTER_NUMBERS = 11


def block_bytes(t: Tensor, dtype: str, channels: int, out_channels: int, kernel_h: int, kernel_w: int) -> int:
    """Of packed weights on the tensor's device."""
    module = _C_cuda if t.is_cuda and _C_cuda is not None else _C
    return module.block_bytes(dtype, channels, out_channels, kernel_h, kernel_w)


def _may_be_packed_for(packed: Tensor, x: Tensor, channels: int, out_channels: int | None, kernel: Sequence[int]) -> bool:
    if packed.device != x.device or packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        return False
    sizes, bytes = [channels, *([] if out_channels is None else [out_channels]), *kernel], packed.shape[0]
    if not all(isinstance(size, int) for size in (*sizes, bytes)):
        return True
    outputs = out_channels or 0
    # Sizes whose bytes 64 bits cannot count (csrc/common/countable.h).
    if min(sizes) <= 0 or channels * max(1, outputs, math.prod(kernel)) >= MOST_BYTES:
        return False
    return bytes == block_bytes(x, name_of(x.dtype), channels, outputs, *(kernel or (0, 0)))


NORM_NAMES = ("input", "weight", "bias")  # what an op calls BatchNorm's arguments


class Checks:
    """Of one op's arguments; every message names the op and the argument."""

    def __init__(self, op: str) -> None:
        self.op = op

    def that(self, condition: Any, message: str) -> None:
        torch._check(condition, lambda: f"{self.op}: {message}")

    def sizes(self, t: Tensor, sizes: Sequence[Any], message: str) -> None:
        """`sizes` with None where any positive one will do."""
        self.that(t.dim() == len(sizes), message)
        for found, size in zip(t.shape, sizes, strict=True):
            self.that(found > 0 if size is None else found == size, message)

    def shape(self, name: str, t: Tensor, sizes: Sequence[Any], wanted: str) -> None:
        """The shape follows what is `wanted`."""
        self.sizes(t, sizes, f"{name} must {wanted} {list(t.shape)}")

    def rank(self, x: Tensor) -> None:
        self.that(x.dim() == 4, f"input must be 4-dimensional (N, C, H, W), but got shape {list(x.shape)}")

    def dtype(self, name: str, t: Tensor) -> None:
        self.that(t.dtype in DTYPES, f"{name} must be float32, float64, bfloat16 or float16, but got {t.dtype}")

    def device(self, name: str, t: Tensor, x: Tensor) -> None:
        self.that(t.device == x.device, f"{name} must be on the others' device, {x.device}, but got {t.device}")

    def like_input(self, name: str, t: Tensor, x: Tensor) -> None:
        self.device(name, t, x)
        self.that(t.dtype == x.dtype, f"{name}'s dtype and the others' should be the same, but got {t.dtype} and {x.dtype}")

    def vector(self, name: str, t: Tensor | None, size: Any, x: Tensor) -> None:
        if t is not None:
            self.like_input(name, t, x)
            self.shape(name, t, (size,), f"be 1-dimensional with {size} elements, but got shape")

    def activation(self, name: str, value: str) -> None:
        check_activation(self.op, name, value)

    def output_size(
        self, weight_name: str, dimension: int, size: Any, kernel: Any, stride: Any, pads: Sequence[Any], dilation: Any
    ) -> Any:
        for pad in pads:
            if isinstance(pad, int) and pad >= 2**61:  # else in range whatever the size
                most = (MOST_INT64 - size) // 2
                self.that(pad <= most, f"Given padding={pad} at dimension {dimension}, expected padding to be at most {most}")
        side, padded, reach = ("height", "width")[dimension], size + sum(pads), dilation * (kernel - 1) + 1
        endless = isinstance(reach, int) and reach > MOST_INT64
        self.that(
            reach <= padded,
            f"{weight_name}'s filter is larger than the padded input along {side}: dilation * (kernel - 1) + 1 = "
            f"{'more than 2^63' if endless else reach}, but padded input {side} is {padded}",
        )
        return (padded - reach) // stride + 1

    def pair(self, name: str, pair: Sequence[Any], least: int) -> None:
        self.that(len(pair) == 2, f"{name} must be a pair, but got {len(pair)} values")
        for value in pair:
            self.that(value >= least, f"{name} {at_least(least)}, but got {tuple(pair)}")

    def padding(self, padding: Sequence[Any]) -> list[Sequence[Any]]:
        """Of two values, each for both ends of an axis, or of four: those of the height's ends and of the width's."""
        self.that(len(padding) in (2, 4), f"padding must be a pair or four values, but got {len(padding)} values")
        for value in padding:
            self.that(value >= 0, f"padding must be non-negative, but got {tuple(padding)}")
        ends = four_paddings(padding)
        return [ends[:2], ends[2:]]

    def filter(self, x: Tensor, weight_name: str, kernel: Sequence[Any], stride: Any, padding: Any, dilation: Any) -> list[Any]:
        """Of a filter on an image with at least one pixel; the output's height and width."""
        for size in x.shape[2:]:
            self.that(size > 0, f"input must have a non-empty height and width, but got shape {list(x.shape)}")
        self.pair("stride", stride, 1)
        pads = self.padding(padding)
        self.pair("dilation", dilation, 1)
        axes = zip(x.shape[2:], kernel, stride, pads, dilation, strict=True)
        return [self.output_size(weight_name, i, *axis) for i, axis in enumerate(axes)]

    def convolution(self, x: Tensor, weight_name: str, w: Tensor, stride: Any, padding: Any, dilation: Any) -> list[Any]:
        """The output's height and width."""
        self.rank(x)
        wanted = "4-dimensional (C * multiplier, 1, kH, kW)"
        self.that(w.dim() == 4, f"{weight_name} must be {wanted}, but got shape {list(w.shape)}")
        self.dtype("input", x)
        self.like_input(weight_name, w, x)
        channels = x.shape[1]
        self.that(channels > 0, f"input must have at least one channel, but got shape {list(x.shape)}")
        filters = w.shape[1] == 1 and w.shape[0] > 0
        self.that(filters, f"{weight_name} must have shape (C * multiplier, 1, kH, kW), but got {list(w.shape)}")
        wanted = f"the {w.shape[0]} channels of {weight_name}, or a divisor of them"
        self.that(w.shape[0] % channels == 0, f"input must have {wanted}, but got shape {list(x.shape)}")
        for size in w.shape[2:]:
            self.that(size > 0, f"{weight_name} must have a non-empty filter, but got shape {list(w.shape)}")
        return self.filter(x, weight_name, w.shape[2:], stride, padding, dilation)

    def output(self, x: Tensor, shape: Sequence[Any], padding: Any) -> None:
        if all(isinstance(size, int) for size in shape):
            bytes = math.prod(max(size, 1) for size in shape) * x.element_size()  # no images: the strides have to fit too
            message = f"the output's shape {list(shape)} is too large to allocate: padding is {tuple(padding)}"
            self.that(bytes < MOST_BYTES, message)

    def transposed_size(self, dimension: int, size: Any, kernel: Any, stride: Any, pad: Any, more: Any, dilation: Any) -> Any:
        side = ("height", "width")[dimension]
        wanted = f"output_padding must be smaller than either stride or dilation along {side}"
        smaller = torch.sym_max(stride, dilation) > more
        self.that(smaller, f"{wanted}, but got output_padding {more}, stride {stride} and dilation {dilation}")
        out = (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + more + 1
        formula = "(input - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1"
        self.that(out > 0, f"the output is too small: {formula} must be positive along {side}, but is {out}")
        if isinstance(out, int):
            self.that(out < MOST_BYTES, f"the output is too large to allocate: its {side} is {out}")
            most = (MOST_INT64 - out) // 2
            self.that(pad <= most, f"Given padding={pad} at dimension {dimension}, expected padding to be at most {most}")
        return out

    def transposed(
        self, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, output_padding: Any, dilation: Any
    ) -> tuple[Any, ...]:  # fmt: skip
        """Of depthwise_conv_transpose2d; the output's shape."""
        self.rank(x)
        wanted = "(C, multiplier, kH, kW)"
        self.that(w.dim() == 4, f"weight must be 4-dimensional {wanted}, but got shape {list(w.shape)}")
        self.dtype("input", x)
        self.like_input("weight", w, x)
        channels, multiplier = x.shape[1], w.shape[1]
        self.that(channels > 0, f"input must have at least one channel, but got shape {list(x.shape)}")
        message = f"weight must have shape {wanted} with C = {channels}, input's channels, but got {list(w.shape)}"
        self.that(w.shape[0] == channels, message)
        self.that(multiplier > 0, message)
        for size in w.shape[2:]:
            self.that(size > 0, f"weight must have a non-empty filter, but got shape {list(w.shape)}")
        for size in x.shape[2:]:
            self.that(size > 0, f"input must have a non-empty height and width, but got shape {list(x.shape)}")
        pairs = (("stride", stride, 1), ("padding", padding, 0), ("output_padding", output_padding, 0), ("dilation", dilation, 1))
        for pair in pairs:
            self.pair(*pair)
        axes = zip(x.shape[2:], w.shape[2:], stride, padding, output_padding, dilation, strict=True)
        shape = (x.shape[0], channels * multiplier, *(self.transposed_size(i, *axis) for i, axis in enumerate(axes)))
        self.output(x, shape, padding)
        self.vector("bias", b, channels * multiplier, x)
        return shape

    def of_output_shape(self, name: str, t: Tensor, x: Tensor, shape: Sequence[Any]) -> None:
        self.like_input(name, t, x)
        self.shape(name, t, shape, f"have the output's shape {list(shape)}, but got")

    def pointwise(self, db: Tensor | None, pw: Tensor, pb: Tensor | None, channels: Any, like: Tensor) -> None:
        self.like_input("pw_weight", pw, like)
        self.shape("pw_weight", pw, (None, channels, 1, 1), f"have shape (out_channels, {channels}, 1, 1), but got")
        self.vector("dw_bias", db, channels, like)
        self.vector("pw_bias", pb, pw.shape[0], like)

    def isa(self, isa: str, weight: Tensor) -> None:
        """On CUDA all kernels read the same."""
        selected = _C.selected_isa()
        self.that(weight.is_cuda or isa == selected, f"isa must be the selected instruction set, {selected}, but got '{isa}'")

    def input_dtype(self, input_dtype: str, weight: Tensor) -> str:
        """Of the inputs that the weights are packed for."""
        dtype = name_of(weight.dtype)
        wanted = "input_dtype must be the weights', or bfloat16 or float16 where these are float32"
        others = ("bfloat16", "float16") if dtype == "float32" else ()
        self.that(input_dtype in ("", dtype, *others), f"{wanted}, but got '{input_dtype}'")
        return input_dtype or dtype

    def activation_number(self, name: str, value: int) -> None:
        self.that(value in range(len(ACTIVATIONS)), f"{name} must be an activation's number, but got {value}")

    def packed(
        self, name: str, op: str, packed: Tensor, x: Tensor, channels: int, out_channels: int | None, kernel: Sequence[int] = ()
    ) -> None:
        """What `op`_pack makes: all of C++'s check but for where the bytes lie and what they say they were made of.

        out_channels: None for a depthwise convolution alone.
        """
        weights = f"{channels} filters of this size, for inputs of this dtype"
        if out_channels is not None:
            filter = f"the block's filter and {out_channels} output channels"
            weights = f"weights for {channels} channels of input, of its dtype, and of {filter}"
        possible = _may_be_packed_for(packed, x, channels, out_channels, kernel)
        self.that(possible, f"{name} must be what {op}_pack made on this device of {weights}")

    def filter_numbers(self, x: Tensor, name: str, numbers: Sequence[int]) -> tuple[Any, ...]:
        """Of out_channels, the filter's height and width, stride, the four paddings, dilation, and what may follow; the output's
        shape."""
        shape = (x.shape[0], numbers[0], *self.filter(x, name, numbers[1:3], numbers[3:5], numbers[5:9], numbers[9:11]))
        self.output(x, shape, numbers[5:9])
        return shape

    def block(
        self, x: Tensor, channels: int, packed: Tensor, block: Sequence[int], slopes: Sequence[float], residual: Tensor | None
    ) -> tuple[Any, ...]:
        """Of packed weights, over an image of `channels` and input's other sizes; the output's shape."""
        acts = range(len(ACTIVATIONS))
        whole = len(block) == FILTER_NUMBERS + 2 and len(slopes) == 2 and all(act in acts for act in block[FILTER_NUMBERS:])
        self.that(whole, "block must be 13 integers that end in two activations' numbers, and slopes two numbers")
        self.packed("packed", "separable_conv2d", packed, x, channels, block[0], block[1:3])
        shape = self.filter_numbers(x, "block", block)
        if residual is not None:
            self.of_output_shape("residual", residual, x, shape)
        return shape

    def depthwise(self, x: Tensor, packed: Tensor, filter: Sequence[int]) -> tuple[Any, ...]:
        """Of packed weights; the output's shape."""
        self.that(len(filter) == FILTER_NUMBERS, f"filter must be 11 integers, but got {len(filter)}")
        filters, channels = filter[0], x.shape[1]
        message = f"filter's out_channels must be a multiple of input's channels, {channels}, but got {filters}"
        self.that(channels > 0, message)
        self.that(filters > 0 and filters % channels == 0, message)
        self.packed("packed", "depthwise_conv2d", packed, x, filters, None, filter[1:3])
        return self.filter_numbers(x, "packed", filter)

    def patches(self, x: Tensor, packed: Tensor, filter: Sequence[int]) -> tuple[Any, ...]:
        """The output's shape."""
        most = 2**15
        self.that(len(filter) == FILTER_NUMBERS, f"filter must be 11 integers, but got {len(filter)}")
        outputs, kernel, channels = filter[0], tuple(filter[1:3]), x.shape[1]
        sides = all(0 < side <= most for side in kernel) and channels <= most
        self.that(sides, f"filter's height and width, and input's channels, must be between 1 and {most}")
        self.packed("packed", "pointwise_conv2d", packed, x, channels * math.prod(kernel), outputs)
        return self.filter_numbers(x, "packed", filter)

    def shaped(self, name: str, t: Tensor | None, shape: Sequence[Any], x: Tensor) -> None:
        """Of this shape, and of input's dtype and device."""
        if t is not None:
            self.like_input(name, t, x)
            self.shape(name, t, shape, f"have shape {list(shape)}, but got")

    def wide(self, name: str, t: Tensor | None, shape: Sequence[Any], x: Tensor) -> None:
        """Of this shape, in the accumulation type."""
        if t is not None:
            self.device(name, t, x)
            wide = accumulation_dtype(x.dtype)
            self.that(t.dtype == wide, f"{name} must be {wide} for this input, but got {t.dtype}")
            self.shape(name, t, shape, f"have shape {list(shape)}, but got")

    def pixels(self, x: Tensor) -> None:
        self.rank(x)
        self.dtype("input", x)
        self.that(x.numel() > 0, f"input must not be empty, but got shape {list(x.shape)}")

    def batch_norm(self, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, act: str, names: tuple = NORM_NAMES) -> None:
        self.pixels(x)
        self.that(eps >= 0, f"eps must be non-negative, but got {eps:g}")
        self.activation("act", act)
        self.wide(names[1], w, x.shape[1:2], x)
        self.wide(names[2], b, x.shape[1:2], x)

    def pool(self, x: Tensor, kernel: Sequence[Any], stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
        """The output's shape."""
        self.pixels(x)
        self.pair("kernel_size", kernel, 1)
        self.pair("padding", padding, 0)
        size = self.filter(x, "kernel_size", kernel, stride, padding, dilation)
        for pad, side in zip(padding, kernel, strict=True):
            self.that(pad <= side // 2, f"padding must be at most half of kernel_size, {side}, but got {pad}")
        self.output(x, (*x.shape[:2], *size), padding)
        return (*x.shape[:2], *size)

    def layer_norm(self, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> None:
        self.pixels(x)
        self.that(eps >= 0, f"eps must be non-negative, but got {eps:g}")
        self.wide("weight", w, x.shape[1:2], x)
        self.wide("bias", b, x.shape[1:2], x)

    def statistics(self, mean: Tensor, variance: Tensor, x: Tensor) -> None:
        self.wide("mean", mean, x.shape[1:2], x)
        self.wide("variance", variance, x.shape[1:2], x)

    def batch_norm_backward(
        self, grad: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, variance: Tensor, eps: float, act: str,
        names: tuple = NORM_NAMES,
    ) -> None:  # fmt: skip
        self.batch_norm(x, w, b, eps, act, names)
        self.like_input("grad_output", grad, x)
        self.shape("grad_output", grad, x.shape, f"have {names[0]}'s shape {list(x.shape)}, but got")
        self.statistics(mean, variance, x)

    def squeeze_excitation(
        self, x: Tensor, reduce: Tensor, first: Tensor | None, expand: Tensor, second: Tensor | None, act: str, gate: str
    ) -> None:
        self.pixels(x)
        self.that(gate in GATES, f"gate must be {' or '.join(GATES)}, but got '{gate}'")
        channels = x.shape[1]
        message = f"reduce_weight must have shape (S, {channels}), but got {list(reduce.shape)}"
        self.that(reduce.dim() == 2, message)
        squeezed = reduce.shape[0]
        self.that(squeezed > 0, message)
        self.shaped("reduce_weight", reduce, (squeezed, channels), x)
        self.shaped("reduce_bias", first, (squeezed,), x)
        self.shaped("expand_weight", expand, (squeezed, channels), x)
        self.shaped("expand_bias", second, (channels,), x)
        self.activation("act", act)


def check_depthwise(op, x, w, b, stride, padding, dilation, act) -> tuple:
    """depthwise_conv2d's operands, in its order but for the slope; the output's shape."""
    check = Checks(op)
    size = check.convolution(x, "weight", w, stride, padding, dilation)
    shape = (x.shape[0], w.shape[0], *size)
    check.output(x, shape, padding)
    check.vector("bias", b, w.shape[0], x)
    check.activation("act", act)
    return shape


def check_depthwise_norm_forward(x, w, norm_w, norm_b, stride, padding, dilation, eps, act) -> tuple:
    """depthwise_norm_act's operands, in its order but for the slope; the output's shape."""
    check = Checks("depthwise_norm_act")
    size = check.convolution(x, "weight", w, stride, padding, dilation)
    shape = (x.shape[0], w.shape[0], *size)
    check.output(x, shape, padding)
    check.that(math.prod(shape) > 0, f"input must not be empty, but got shape {list(shape)}")
    check.that(eps >= 0, f"eps must be non-negative, but got {eps:g}")
    check.activation("act", act)
    check.wide("norm_weight", norm_w, (w.shape[0],), x)
    check.wide("norm_bias", norm_b, (w.shape[0],), x)
    return shape


def check_depthwise_norm(grad, middle, x, w, norm_w, norm_b, mean, variance, stride, padding, dilation, eps, act, mask) -> None:
    """depthwise_norm_act_backward's operands, in its order but for the slope."""
    check = Checks("depthwise_norm_act_backward")
    size = check.convolution(x, "weight", w, stride, padding, dilation)
    check.of_output_shape("middle", middle, x, (x.shape[0], w.shape[0], *size))
    check.that(len(mask) == 2, f"output_mask must have 2 values, but got {len(mask)}")
    names = ("middle", "norm_weight", "norm_bias")
    check.batch_norm_backward(grad, middle, norm_w, norm_b, mean, variance, eps, act, names)
