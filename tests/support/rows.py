"""The rows of the CPU's kernel table, and what is asked of one row, of the CPU's or of CUDA's."""

from __future__ import annotations

import torch
from cases import LAYOUTS, Case

import dwconv_ext

TABLE = dwconv_ext._C.kernel_table()


def label(row: dict) -> str:
    return f"{row['isa']}-{row['name']}-{row['dtype']}-f{row['filter']}-s{row['stride']}"


def layout_of(row: dict) -> str:
    return "nchw" if row["layout"] == "NCHW" else "channels_last"


def forced_case(row: dict, channels: int, width: int) -> tuple[Case, torch.dtype, str]:
    """A case that the row fits, the dtype and the layout; a row for any filter or stride is given odd ones."""
    kernel = (row["filter"],) * 2 if row["filter"] else (2, 11)
    stride = (row["stride"],) * 2 if row["stride"] else (2, 1)
    padding = None
    if "lines" in row["name"]:
        kernel = (1, row["filter"] or 13)
        padding = (0, 0, kernel[1] - 1, 0)  # causal
    return Case("forced", 2, channels, (19, width), kernel, stride, padding), getattr(torch, row["dtype"]), layout_of(row)


def check_nan_at_an_edge(row: dict, channels: int, width: int) -> None:
    """Outputs that a tile would have past the image's end give no tap of the weight gradient NaN. The row has been forced."""
    size, stride = row["filter"] or 5, row["stride"] or 1
    line = "lines" in row["name"]
    padding = size - 1 if line else size // 2  # on the left
    x = torch.randn(1, channels, 9, width).to(getattr(torch, row["dtype"])).contiguous(memory_format=LAYOUTS[layout_of(row)])
    x[..., -1] = float("nan")
    w = torch.randn(channels, 1, 1 if line else size, size).to(x.dtype).requires_grad_()
    y = dwconv_ext.depthwise_conv2d(x, w, stride=stride, padding=(0, 0, padding, 0) if line else padding)
    (grad,) = torch.autograd.grad(y, w, torch.ones_like(y))
    meets = [divmod(width - 1 + padding - tap, stride) for tap in range(size)]
    expected = [remainder == 0 and 0 <= column < y.shape[-1] for column, remainder in meets]
    assert grad.isnan().all(dim=(0, 1, 2)).tolist() == grad.isnan().any(dim=(0, 1, 2)).tolist() == expected
