"""MobileNetV2, its tree and its state_dict torchvision's, its depthwise-linear pairs fused by ``convert``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..convert import convert
from ..ops.arguments import check_probability, positive, positive_int

# expansion t, output channels c, repeats n, stride s of the first: Sandler et al., table 2.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


def divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of divisor, no less than divisor, and no less than 90 % of channels."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_bn_relu6(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expansion (1x1, ReLU6), depthwise 3x3 (ReLU6), linear bottleneck (1x1); a shortcut where stride is 1 and channels match.

    In eval mode, without derivatives, one op but for the shortcut; its keys are torchvision's.

    Args:
        in_channels: of the block.
        out_channels: of the block.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: channels of the expansion over in_channels; 1 for none.
        checkpointing: as ``FusedDSConv``'s.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: channels that are not a positive int, an expand_ratio that is not a positive number, a stride but 1 and 2, an
            unknown checkpointing.

    Examples:
        >>> InvertedResidual(16, 24, stride=2, expand_ratio=6).eval()(torch.randn(1, 16, 32, 32)).shape
        torch.Size([1, 24, 16, 16])

    Source: Sandler et al., arXiv:1801.04381, table 1 and figure 4.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expand_ratio: int, *, checkpointing: str | None = None
    ) -> None:
        super().__init__()
        own = type(self).__name__
        positive_int(own, "in_channels", in_channels)
        positive_int(own, "out_channels", out_channels)
        if stride not in (1, 2):
            raise ValueError(f"{own}: stride must be 1 or 2, but got {stride!r}")
        hidden = max(1, round(in_channels * positive(own, "expand_ratio", expand_ratio)))
        self.use_shortcut = stride == 1 and in_channels == out_channels
        expansion = [conv_bn_relu6(in_channels, hidden)] if expand_ratio != 1 else []
        self.conv = nn.Sequential(
            *expansion,
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        convert(self, inplace=True)
        self.checkpointing = checkpointing

    @property
    def checkpointing(self) -> str | None:
        return getattr(self.conv, "checkpointing", None)

    @checkpointing.setter
    def checkpointing(self, value: str | None) -> None:
        self.conv.checkpointing = value

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input) + input if self.use_shortcut else self.conv(input)


class MobileNetV2(nn.Module):
    """MobileNetV2: linear bottlenecks and inverted residuals. torchvision's ``mobilenet_v2`` weights load into it, and back.

    Args:
        num_classes: outputs of the classifier.
        width_multiplier: alpha; channels are rounded to multiples of 8, and the last convolution does not shrink below 1280.
        dropout: probability before the classifier.

    Shape:
        (N, 3, H, W) -> (N, num_classes)

    Raises:
        ValueError: an argument that is not positive; a dropout outside [0, 1].

    Examples:
        >>> sum(p.numel() for p in MobileNetV2().parameters())
        3504872

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, table 2.
    """

    def __init__(self, num_classes: int = 1000, width_multiplier: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        own = type(self).__name__
        positive_int(own, "num_classes", num_classes)
        alpha = positive(own, "width_multiplier", width_multiplier)
        check_probability(own, "dropout", dropout)
        channels = divisible(STEM_CHANNELS * alpha)
        last = divisible(LAST_CHANNELS * max(1.0, alpha))
        layers: list[nn.Module] = [conv_bn_relu6(3, channels, 3, 2)]
        for expand_ratio, width, repeats, stride in STAGES:
            for i in range(repeats):
                out_channels = divisible(width * alpha)
                layers.append(InvertedResidual(channels, out_channels, stride if i == 0 else 1, expand_ratio))
                channels = out_channels
        layers.append(conv_bn_relu6(channels, last))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier[1].weight, std=0.01)
        nn.init.zeros_(self.classifier[1].bias)
        convert(self, inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        features = self.features(input)
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1))
