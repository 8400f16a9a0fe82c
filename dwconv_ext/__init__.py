"""Hand-written CPU and CUDA kernels for depthwise and depthwise-separable convolution in PyTorch.

    depthwise_conv2d(input, weight, ...)     F.conv2d(..., groups=C)
    separable_conv2d(input, ...)             depthwise, activation, pointwise, activation in one pass
    DepthwiseConv2d                          nn.Conv2d(C, C * multiplier, k, groups=C)
    FusedDSConv                              depthwise - BatchNorm - activation - pointwise - BatchNorm - activation
    convert, unfuse                          any model onto these kernels, and back
    plan                                     which kernel a layer runs, and why
    models, cost                             MobileNetV1, MobileNetV2, DWConv; parameters and multiply-adds

``python -m dwconv_ext`` prints what was built and which kernels this machine runs.
"""

from ._load import load_cpu, load_cuda, register_missing_cuda

__version__ = "0.1.0"

_C = load_cpu()
_C_cuda, cuda_status = load_cuda(_C.build_cuda)

from . import registration  # noqa: E402, F401 (the ops must exist first)
from ._when_imported import when_imported  # noqa: E402
from .autograd import DepthwiseConv2dFunction, SeparableConv2dFunction  # noqa: E402
from .convert import convert, unfuse  # noqa: E402
from .folded_weights import clear_caches  # noqa: E402
from .functional import depthwise_conv2d, separable_conv2d  # noqa: E402
from .modules import DepthwiseConv2d, FusedDSConv  # noqa: E402
from .planning import plan  # noqa: E402

from . import cost, flops, models  # noqa: E402, F401 isort: skip


def _backend(*args: object, **kwargs: object) -> object:
    from .compile import backend  # which imports Dynamo

    return backend(*args, **kwargs)


# torch.compile(model, backend="dwconv_ext"): the entry point in pyproject.toml serves those who don't import the package.
when_imported("torch._dynamo.backends.registry", lambda registry: registry.register_backend(_backend, name="dwconv_ext"))

if _C_cuda is None:
    register_missing_cuda(cuda_status)

__all__ = [
    "DepthwiseConv2d",
    "DepthwiseConv2dFunction",
    "FusedDSConv",
    "SeparableConv2dFunction",
    "clear_caches",
    "convert",
    "cost",
    "depthwise_conv2d",
    "models",
    "plan",
    "separable_conv2d",
    "unfuse",
]
