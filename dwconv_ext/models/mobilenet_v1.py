"""MobileNetV1, every block after the first convolution a FusedDSConv."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.separable import FusedDSConv
from ..ops.arguments import check_probability, positive, positive_int

# (output channels, stride) of the 13 blocks: Howard et al., table 1.
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1),
)  # fmt: skip
STEM_CHANNELS = 32
STRIDE = 32  # of the whole network


class MobileNetV1(nn.Module):
    """MobileNetV1: a 3x3 convolution, 13 depthwise-separable blocks, average pooling and a linear classifier.

    Table 1 gives the last block's depthwise convolution stride 2 at 7x7; its output there is 7x7 too, so that the stride is 1
    here, as in every published implementation.

    Args:
        num_classes: outputs of the classifier.
        width_multiplier: alpha; every layer has ``int(alpha * channels)`` channels.
        resolution: rho * 224, the height and width of the images it is meant for, a multiple of 32. No parameter depends on
            it, and other sizes are accepted; ``dwconv_ext.cost.table`` counts for it.
        dropout: probability before the classifier.

    Shape:
        (N, 3, H, W) -> (N, num_classes)

    Raises:
        ValueError: an argument that is not positive; a resolution that is no multiple of 32; a dropout outside [0, 1].

    Examples:
        >>> sum(p.numel() for p in MobileNetV1().parameters())
        4231976

    Source: Howard et al., "MobileNets", arXiv:1704.04861, table 1.
    """

    def __init__(
        self, num_classes: int = 1000, width_multiplier: float = 1.0, resolution: int = 224, dropout: float = 0.0
    ) -> None:
        super().__init__()
        own = type(self).__name__
        positive_int(own, "num_classes", num_classes)
        alpha = positive(own, "width_multiplier", width_multiplier)
        if positive_int(own, "resolution", resolution) % STRIDE:
            raise ValueError(f"{own}: resolution must be a multiple of {STRIDE}, but got {resolution}")
        check_probability(own, "dropout", dropout)
        self.resolution = resolution
        channels = self._width(STEM_CHANNELS, alpha)
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        ]
        for out_channels, stride in BLOCKS:
            out_channels = self._width(out_channels, alpha)
            layers.append(FusedDSConv(channels, out_channels, 3, stride))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier[1].weight, std=0.01)
        nn.init.zeros_(self.classifier[1].bias)

    @staticmethod
    def _width(channels: int, alpha: float) -> int:
        return max(1, int(channels * alpha))

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(input)), 1))
