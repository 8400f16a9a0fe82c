"""Views of tensors, random depthwise problems, and the named blocks."""

from __future__ import annotations

import torch
from cases import DTYPES, LAYOUTS
from properties import st
from reference import Convolution

import dwconv_ext
from dwconv_ext.ops.arguments import four_paddings

VIEWS = {
    "every_second_row": lambda x: x[:, :, ::2],
    "every_second_column": lambda x: x[:, :, :, ::2],
    "middle_columns": lambda x: x[:, :, 1:-1, 2:-2],
    "some_channels": lambda x: x[:, 3:11],
    "every_second_channel": lambda x: x[:, ::2],
    "some_images": lambda x: x[1:],
    "transposed": lambda x: x.transpose(2, 3),
    "flipped_axes": lambda x: x.permute(1, 0, 2, 3),
    "expanded_batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded_columns": lambda x: x[:, :, :, :1].expand(-1, -1, -1, 9),
}


@st.composite
def problems(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = draw(
        st.sampled_from([(3, 3), (3, 3), (5, 5), (7, 7), (1, 1)])
        | st.builds(lambda a, b: (a, b), st.integers(1, 9), st.integers(1, 12))
    )
    stride = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1), (4, 3)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (2, 1)]))
    padding = (*pair(0, 8), *(pair(0, 8) if draw(st.booleans()) else ()))
    pads = four_paddings(padding)
    ends = sum(pads[:2]), sum(pads[2:])
    least = [max(1, d * (k - 1) + 1 - p) for k, d, p in zip(kernel, dilation, ends, strict=True)]
    size = tuple(draw(st.integers(m, m + 22)) for m in least)
    return {
        "shape": (draw(st.integers(0, 3)), draw(st.integers(1, 36)), *size),
        "kernel": kernel,
        "conv": Convolution(stride, padding, dilation),
        "multiplier": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(list(LAYOUTS))),
        "isa": draw(st.sampled_from(dwconv_ext._C.supported_isas())),
        "seed": draw(st.integers(0, 2**31)),
    }


SAME = Convolution(padding=(1, 1))
# name: batch, in, out, size, kernel, convolution
BLOCKS = {
    "mobilenet_first": (2, 32, 64, (14, 14), (3, 3), SAME),
    "mobilenet_stride2": (2, 64, 128, (15, 15), (3, 3), Convolution((2, 2), (1, 1))),
    "mobilenet_last": (3, 128, 128, (7, 7), (3, 3), SAME),
    "one_of_each": (1, 1, 1, (1, 1), (3, 3), SAME),
    "panel_minus_1": (1, 17, 63, (5, 6), (3, 3), SAME),
    "panel": (1, 16, 64, (7, 8), (3, 3), SAME),
    "panel_plus_1": (1, 15, 65, (8, 9), (3, 3), SAME),
    "wide": (1, 8, 24, (4, 130), (5, 5), Convolution(padding=(2, 2))),
    "convnext_like": (1, 24, 96, (9, 9), (7, 7), Convolution(padding=(3, 3))),
    "dilated": (2, 20, 36, (11, 12), (3, 3), Convolution((1, 1), (2, 2), (2, 2))),
    "one_by_eleven": (1, 12, 20, (6, 19), (1, 11), Convolution(padding=(0, 5))),
    "filter_larger_than_image": (1, 18, 20, (3, 2), (5, 5), Convolution(padding=(2, 2))),
    "tensorflow_same": (1, 24, 40, (12, 10), (3, 3), Convolution((2, 2), (0, 1, 0, 1))),
    "same_even": (1, 16, 20, (7, 8), (4, 4), Convolution(padding=(1, 2, 1, 2))),
    "deep": (1, 1031, 20, (7, 7), (3, 3), SAME),  # several blocks of channels, the last a short one
    "empty_batch": (0, 8, 8, (5, 5), (3, 3), SAME),
}


def operands(block, dtype, layout, seed=0):
    batch, channels, out_channels, size, kernel, conv = block
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    x = randn(batch, channels, *size).contiguous(memory_format=LAYOUTS[layout])
    return (
        x,
        randn(channels, 1, *kernel),
        randn(channels),
        randn(out_channels, channels, 1, 1) * channels**-0.5,
        randn(out_channels),
    ), conv
