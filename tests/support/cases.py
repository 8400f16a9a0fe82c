"""Named cases: what each is there for. Sizes are tile - 1, tile, tile + 1 of some kernel, odd, degenerate or ordinary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference import Convolution
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] | None = None  # None: "same" as far as stride 1 goes
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def conv(self) -> Convolution:
        same = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel, self.dilation, strict=True))
        return Convolution(self.stride, same if self.padding is None else self.padding, self.dilation)

    def tensors(self, dtype: torch.dtype, layout: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.channels, *self.size, generator=random).to(dtype)
        w = torch.randn(self.channels * self.multiplier, 1, *self.kernel, generator=random).to(dtype)
        b = torch.randn(self.channels * self.multiplier, generator=random).to(dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]), w, b

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("mobilenet", 2, 32, (14, 14)),
    Case("mobilenet_stride2", 2, 32, (15, 15), stride=(2, 2)),
    Case("mobilenet_stride2_even", 2, 32, (16, 16), stride=(2, 2)),
    Case("last_stage", 3, 48, (7, 7)),
    Case("efficientnet", 2, 40, (13, 17), (5, 5)),
    Case("efficientnet_stride2", 2, 24, (15, 13), (5, 5), (2, 2)),
    Case("convnext", 1, 48, (14, 14), (7, 7)),
    Case("convnext_stride2", 1, 16, (17, 16), (7, 7), (2, 2)),
    Case("replknet", 1, 20, (20, 20), (31, 31)),
    Case("inception_1x11", 2, 24, (12, 19), (1, 11)),
    Case("inception_11x1", 2, 24, (19, 12), (11, 1)),
    Case("wide_1x11", 2, 17, (3, 40), (1, 11)),
    Case("taps_8_4_3", 1, 16, (5, 70), (1, 15), (2, 2), dilation=(2, 2)),
    Case("taps_8_4_2", 1, 20, (9, 64), (3, 14), (2, 2), padding=(2, 13), dilation=(2, 2)),
    Case("even_filter", 2, 17, (9, 10), (4, 2), padding=(1, 1)),
    Case("one_tap", 2, 16, (6, 5), (1, 1)),
    Case("one_tap_stride3", 2, 16, (10, 11), (1, 1), (3, 3)),
    Case("tile_minus_1", 1, 15, (6, 6)),
    Case("tile", 1, 16, (8, 7)),
    Case("tile_plus_1", 1, 17, (9, 8)),
    Case("two_tiles_plus_1", 1, 33, (5, 15)),
    Case("wide", 1, 3, (6, 70)),
    Case("wide_stride2", 1, 3, (9, 71), stride=(2, 2)),
    Case("wide_7x7", 1, 2, (20, 65), (7, 7)),
    Case("several_strips", 1, 2, (33, 1100)),
    Case("several_strips_stride2", 1, 2, (31, 259), (5, 5), (2, 2)),
    Case("strided_rows_only", 1, 1, (6, 5), stride=(3, 1), padding=(0, 0)),
    Case("tall", 2, 5, (70, 3)),
    Case("one_channel", 4, 1, (11, 12)),
    Case("one_pixel", 3, 19, (1, 1)),
    Case("one_column", 2, 20, (9, 1)),
    Case("filter_larger_than_image", 1, 18, (3, 4), (7, 7)),
    Case("filter_63", 1, 4, (10, 9), (63, 63)),
    Case("no_padding", 2, 16, (9, 9), padding=(0, 0)),
    Case("only_padding_reaches", 1, 16, (2, 2), padding=(5, 4)),
    Case("lopsided_padding", 1, 24, (7, 9), padding=(3, 0)),
    Case("causal_rows", 2, 16, (9, 8), padding=(2, 0, 1, 1)),
    Case("none_on_the_left", 2, 17, (9, 16), padding=(1, 1, 0, 2)),
    Case("tensorflow_same", 2, 24, (16, 14), stride=(2, 2), padding=(0, 1, 0, 1)),
    Case("tensorflow_same_5x5", 1, 16, (14, 12), (5, 5), (2, 2), padding=(1, 2, 1, 2)),
    Case("same_even", 2, 20, (7, 9), (4, 2), padding=(1, 2, 0, 1)),
    Case("lopsided_dilated", 1, 17, (9, 10), (3, 3), padding=(4, 1, 0, 5), dilation=(2, 2)),
    Case("lopsided_multiplier", 1, 6, (8, 9), padding=(0, 2, 2, 1), multiplier=2),
    Case("right_alone_reaches", 1, 16, (2, 3), padding=(0, 4, 0, 6)),
    Case("dilated", 2, 16, (13, 14), dilation=(2, 2)),
    Case("dilated_rows_only", 1, 17, (12, 8), (3, 5), dilation=(3, 1)),
    Case("dilated_columns_only", 2, 17, (9, 13), dilation=(1, 2)),
    Case("dilated_strided", 1, 18, (17, 16), (3, 3), (2, 2), dilation=(2, 2)),
    Case("dilation_beyond_stride", 1, 16, (19, 18), (3, 3), (2, 3), dilation=(3, 2)),
    Case("stride_beyond_filter", 1, 16, (11, 13), (2, 2), (4, 5)),
    Case("stride_1x2", 2, 20, (8, 9), stride=(1, 2)),
    Case("stride_2x1", 2, 20, (8, 9), (5, 3), (2, 1)),
    Case("multiplier_2", 2, 12, (9, 8), multiplier=2),
    Case("multiplier_3_stride2", 2, 7, (10, 9), (5, 5), (2, 2), multiplier=3),
    Case("multiplier_16_of_1", 2, 1, (9, 9), multiplier=16),
    Case("bf16_trap", 1, 48, (8, 21), (4, 13), (1, 4), padding=(1, 6), multiplier=3),
    Case("multiplier_4_photograph", 1, 3, (40, 50), (7, 7), multiplier=4),
    Case("empty_batch", 0, 16, (7, 7)),
]

# What only the CPU treats apart: in channels_last their pixels' lines fall into a few sets of the L1 cache, or there are more
# rows than a tile has.
CACHE_CASES = [
    Case("pixels_in_one_cache_set", 1, 2048, (7, 7)),
    Case("pixels_in_few_cache_sets_stride2", 1, 1024, (11, 8), (5, 5), (2, 2)),
    Case("pixels_in_few_cache_sets_tail", 1, 96, (3, 140), (5, 5)),  # channels that the staged lines' size does not divide
    Case("phases_in_tiles", 1, 16, (60, 61), (5, 5), (2, 2)),
    Case("repeated_rows_in_tiles", 1, 24, (60, 31), (3, 3), multiplier=3),  # a multiplier's, more than 256 KB
]
