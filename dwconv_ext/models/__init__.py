"""Networks of depthwise-separable convolutions on this package's kernels."""

from .mobilenet_v1 import MobileNetV1
from .mobilenet_v2 import InvertedResidual, MobileNetV2
from .yolox import DWConv

__all__ = ["DWConv", "InvertedResidual", "MobileNetV1", "MobileNetV2"]
