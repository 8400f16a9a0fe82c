"""plan: which kernel a layer would run on this machine's CPU, with which tile, what it moves and computes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ._extension import _C
from .nn.separable import FusedDSConv
from .ops.arguments import positive_int, shape_of
from .ops.conv1d import depthwise_conv1d, padding_of_length
from .ops.conv_transpose import depthwise_conv_transpose2d
from .ops.functional import DTYPES, depthwise_conv2d, name_of, padding_of


@dataclass(frozen=True)
class Plan:
    """One pass of one layer: a row of ``csrc/cpu/kernels.inc`` and how the work is cut. Prints as two lines.

    Attributes:
        op: ``depthwise_conv2d``, ``depthwise_conv_transpose2d`` or ``separable_conv2d``.
        pass_: ``forward``, ``backward_input`` or ``backward_weight``.
        kernel: its name.
        filter: the square filter that the kernel is compiled for; 0 for any.
        stride: the stride that the kernel is compiled for; 0 for any.
        isa: the instruction set.
        dtype: the input's.
        layout: ``NCHW`` or ``channels_last``.
        rows_per_tile: output rows of a tile.
        tiles: how many independent pieces of work.
        workers: threads that share the tiles.
        scratch_bytes: of each worker.
        bytes: compulsory: every operand once.
        flops: two for a multiplication with its addition.
        reason: why this kernel and tile.
    """

    op: str
    pass_: str
    kernel: str
    filter: int
    stride: int
    isa: str
    dtype: str
    layout: str
    rows_per_tile: int
    tiles: int
    workers: int
    scratch_bytes: int
    bytes: int
    flops: int
    reason: str

    def __str__(self) -> str:
        work = f"{self.bytes / 1e6:.2f} MB, {self.flops / 1e6:.1f} MFLOP, {self.flops / max(self.bytes, 1):.1f} FLOP/byte"
        cut = f"{self.tiles} tiles of {self.rows_per_tile} rows on {self.workers} threads"
        return f"{self.pass_}: {self.kernel} [{self.isa}, {self.dtype}, {self.layout}], {cut}\n    {work}; {self.reason}"


class Plans(tuple[Plan, ...]):
    """The passes of a layer, in order; prints as one text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def _geometry(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    """Filter, stride, padding and dilation of an image; in one dimension of one row."""
    if isinstance(conv, nn.Conv2d):
        padding = padding_of("plan", conv.padding, conv.kernel_size, conv.stride, conv.dilation)
        return conv.kernel_size, conv.stride, padding, conv.dilation
    (taps,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
    pads = padding_of_length("plan", conv.padding, taps, stride, dilation)
    if getattr(conv, "causal", False):
        pads = (taps - 1) * dilation, 0
    return (1, taps), (1, stride), (0, 0, *pads), (1, dilation)


def _plan(pass_: str, op: str, conv: nn.Conv1d | nn.Conv2d, input: Tensor, out_channels: int, threads: int) -> Plan | None:
    layout = "NCHW" if input.is_contiguous() else "channels_last"
    return _as_plan(_C.plan(
        op, pass_, name_of(input.dtype), layout, input.shape[0], conv.in_channels, input.shape[2:],
        *_geometry(conv), out_channels, conv.out_channels // conv.in_channels, threads,
        conv.bias is not None,
    ))  # fmt: skip


def _dense(input: Tensor) -> Tensor:
    """As the op makes it."""
    if input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last):
        return input
    return torch.empty_like(input, device="meta", memory_format=torch.contiguous_format)


def _as_plan(found: dict | None) -> Plan | None:
    if found is None:
        return None
    names = Plan.__dataclass_fields__
    return Plan(kernel=found["name"], pass_=found["pass"], **{n: found[n] for n in names if n not in ("kernel", "pass_")})


def _transposed_plans(conv: nn.ConvTranspose2d, input: Tensor, threads: int) -> Plans:
    """Of the passes of the convolution whose input gradient it is. None of a pass whose stride's phases run one by one."""
    weight = torch.empty(conv.weight.shape, dtype=input.dtype, device="meta")
    how = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    output = depthwise_conv_transpose2d(input.to("meta"), weight, None, *how)
    layout = "NCHW" if input.is_contiguous() else "channels_last"

    def of(pass_: str, size: Sequence[int], padding: Sequence[int]) -> Plan | None:
        return _as_plan(_C.plan(
            "depthwise_conv2d", pass_, name_of(input.dtype), layout, input.shape[0], conv.in_channels, tuple(size),
            conv.kernel_size, conv.stride, tuple(padding), conv.dilation, conv.in_channels, 1, threads, conv.bias is not None,
        ))  # fmt: skip

    mirrored = [d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel_size, conv.padding, strict=True)]
    passes = []
    if max(conv.stride) > 1:
        passes.append(("forward", of("backward_input", output.shape[2:], conv.padding)))
    elif min(mirrored) >= 0:
        passes.append(("forward", of("forward", input.shape[2:], mirrored)))
    passes += [("backward_input", of("forward", output.shape[2:], conv.padding))]
    passes += [("backward_weight", of("backward_weight", output.shape[2:], conv.padding))]
    op = "depthwise_conv_transpose2d"
    return Plans([replace(found, op=op, pass_=pass_) for pass_, found in passes if found is not None])


def plan(layer: nn.Module, input: Tensor | Sequence[int], *, threads: int | None = None) -> Plans:
    """What a depthwise convolution, transposed or not, or a FusedDSConv would run on the CPU for an input. Computes nothing.

    Args:
        layer: a depthwise ``nn.Conv2d``, ``nn.Conv1d`` or ``nn.ConvTranspose2d`` (ours or not), or a ``FusedDSConv``: its fused
            forward pass.
        input: (N, C, H, W), in one dimension (N, C, L), a tensor (on any device, ``meta`` too) or its shape (then float32, NCHW).
        threads: default ``torch.get_num_threads()``.

    Returns:
        Plans, a tuple: forward, backward_input where it is not the forward kernel (strided), backward_weight; for a
        FusedDSConv the forward pass; for a transposed convolution all passes that are a kernel's, not several ones'.

    Raises:
        TypeError: layer is neither, or input is neither a tensor nor a shape.
        ValueError: input does not fit the layer, or its dtype has no kernel; threads is not a positive int.

    Examples:
        >>> print(plan(nn.Conv2d(32, 32, 3, padding=1, groups=32), (8, 32, 7, 7))[0].kernel)
        depthwise_forward_nchw_transposed
    """
    if not isinstance(input, Tensor):
        input = torch.empty(shape_of("plan", "input", input), device="meta")
    threads = torch.get_num_threads() if threads is None else positive_int("plan", "threads", threads)
    fused = isinstance(layer, FusedDSConv)
    conv = layer._parts()[0] if fused else layer
    transposed = isinstance(conv, nn.ConvTranspose2d) and conv.groups == conv.in_channels == conv.out_channels
    if not transposed and not (isinstance(conv, (nn.Conv1d, nn.Conv2d)) and conv.groups == conv.in_channels):
        wanted = "a depthwise nn.Conv2d, nn.Conv1d or nn.ConvTranspose2d (of one filter a channel), or a FusedDSConv"
        raise TypeError(f"plan: layer must be {wanted}, but got {type(layer).__name__}")
    one = isinstance(conv, nn.Conv1d)
    if input.dim() != (3 if one else 4) or input.shape[1] != conv.in_channels:
        wanted = f"(N, {conv.in_channels}, {'L' if one else 'H, W'})"
        raise ValueError(f"plan: input must have shape {wanted}, but got {list(input.shape)}")
    if input.dtype not in DTYPES:
        raise ValueError(f"plan: input must be float32, float64, bfloat16 or float16, but got {input.dtype}")
    weight = torch.empty(conv.weight.shape, dtype=input.dtype, device="meta")
    try:
        if transposed:
            return _transposed_plans(conv, _dense(input), threads)
        if one:
            causal = getattr(conv, "causal", False)
            depthwise_conv1d(input.to("meta"), weight, None, conv.stride, conv.padding, conv.dilation, causal=causal)
        else:
            depthwise_conv2d(input.to("meta"), weight, None, conv.stride, conv.padding, conv.dilation)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    input = _dense(input.unsqueeze(2) if one else input)
    if fused:
        out_channels = layer._parts()[2].out_channels
        return Plans([_plan("forward", "separable_conv2d", conv, input, out_channels, threads)])
    passes = ["forward", *(["backward_input"] if max(conv.stride) > 1 else []), "backward_weight"]
    found = (_plan(pass_, "depthwise_conv2d", conv, input, conv.out_channels, threads) for pass_ in passes)
    return Plans([p for p in found if p is not None])
