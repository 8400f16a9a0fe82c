"""Hand-written CPU and CUDA kernels for depthwise and depthwise-separable convolution in PyTorch.

    depthwise_conv2d(input, weight, ...)     F.conv2d(..., groups=C)
    depthwise_conv_transpose2d, _transpose1d F.conv_transpose2d, F.conv_transpose1d(..., groups=C)
    separable_conv2d(input, ...)             depthwise, activation, pointwise, activation in one pass
    depthwise_conv1d(input, weight, ...)     F.conv1d(..., groups=C), causal too; depthwise_conv1d_step one sample at a time
    DepthwiseConv2d, DepthwiseConv1d         nn.Conv2d(C, C * multiplier, k, groups=C), nn.Conv1d
    DepthwiseConvTranspose2d, ...1d          nn.ConvTranspose2d, nn.ConvTranspose1d(..., groups=C)
    FusedDSConv                              depthwise - BatchNorm - activation - pointwise - BatchNorm - activation
    convert, unfuse                          any model onto these kernels, and back
    plan                                     which kernel a layer runs, and why
    benchmark                                times kernels and torch's convolution, and runs the fastest
    InvertedResidual                         pointwise - depthwise - pointwise, of MobileNetV2
    models, cost                             MobileNetV1, MobileNetV2, DWConv; parameters and multiply-adds

``python -m dwconv_ext`` prints what was built and which kernels this machine runs.
"""

from importlib.metadata import entry_points
from types import ModuleType

from . import _interpreter  # first: it refuses what the others would crash in  # noqa: F401
from ._extension import _C, _C_cuda, cuda_status, register_missing  # noqa: F401

__version__ = "0.1.0"

from . import cost, models
from .convert import convert, unfuse
from .models import InvertedResidual
from .nn.conv_transpose import DepthwiseConvTranspose1d, DepthwiseConvTranspose2d
from .nn.depthwise import DepthwiseConv2d
from .nn.depthwise1d import DepthwiseConv1d
from .nn.folded_weights import clear_caches
from .nn.separable import FusedDSConv
from .ops.autograd import DepthwiseConv2dFunction, SeparableConv2dFunction
from .ops.conv1d import depthwise_conv1d, depthwise_conv1d_step
from .ops.conv_transpose import depthwise_conv_transpose1d, depthwise_conv_transpose2d
from .ops.functional import depthwise_conv2d, separable_conv2d
from .plan import plan
from .tuner import benchmark, benchmark_by_environment
from .when_imported import when_imported


def _backend(*args: object, **kwargs: object) -> object:
    from .compile import backend  # which imports Dynamo

    return backend(*args, **kwargs)


def _register(registry: ModuleType) -> None:
    """For torch.compile(model, backend="dwconv_ext"). An installed package has an entry point (pyproject.toml): torch finds it
    without an import, and would refuse the name as a duplicate were it registered here too."""
    if not entry_points(group="torch_dynamo_backends", name="dwconv_ext"):
        registry.register_backend(_backend, name="dwconv_ext")


when_imported("torch._dynamo.backends.registry", _register)

register_missing()
benchmark_by_environment()

__all__ = [
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv2dFunction",
    "DepthwiseConvTranspose1d",
    "DepthwiseConvTranspose2d",
    "FusedDSConv",
    "InvertedResidual",
    "SeparableConv2dFunction",
    "benchmark",
    "clear_caches",
    "convert",
    "cost",
    "depthwise_conv1d",
    "depthwise_conv1d_step",
    "depthwise_conv2d",
    "depthwise_conv_transpose1d",
    "depthwise_conv_transpose2d",
    "models",
    "plan",
    "separable_conv2d",
    "unfuse",
]
