"""Loads the compiled halves, and says what to do where that fails.

``_C`` registers the ops and the CPU kernels; ``_C_cuda`` the CUDA kernels, loaded only under a CUDA build of torch, so that
one wheel serves both kinds.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)
REBUILD = "rebuild it against the torch you have: pip install --no-build-isolation --no-deps --force-reinstall ."


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def load_cpu() -> ModuleType:
    """The module ``_C``.

    Raises:
        ImportError: torch is too old, nothing was built, or what was built does not load; the message says what to do.
    """
    if _version(torch.__version__) < OLDEST_TORCH:
        raise ImportError(f"dwconv_ext needs torch >= 2.10, but torch {torch.__version__} is installed: pip install -U torch")
    if importlib.util.find_spec("dwconv_ext._C") is None:
        raise ImportError(
            "dwconv_ext's compiled part dwconv_ext._C is not built for this Python. In the repository: pip install . "
            "(and start Python outside the repository's folder, or build in place: pip install --no-build-isolation -e .)"
        )
    try:
        return importlib.import_module("dwconv_ext._C")
    except ImportError as error:
        if str(error).startswith("DWCONV_EXT_ISA"):
            raise
        raise ImportError(
            f"dwconv_ext's compiled part does not load under torch {torch.__version__} ({error}); {REBUILD}"
        ) from error


def load_cuda(built: str) -> tuple[ModuleType | None, str]:
    """The module ``_C_cuda`` or None, and why it is not there. built: ``_C.build_cuda``, a CUDA version or why there is none."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU-only build"
    if not built[0].isdigit() or importlib.util.find_spec("dwconv_ext._C_cuda") is None:
        return None, f"the CUDA half was not built ({built})"
    # Before it is loaded, which would register its kernels.
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"the CUDA half was built for CUDA {built}, torch {torch.__version__} for {torch.version.cuda}; {REBUILD}"
    try:
        return importlib.import_module("dwconv_ext._C_cuda"), "loaded"
    except ImportError as error:
        return None, f"the CUDA half does not load under torch {torch.__version__} ({error}); {REBUILD}"


_C = load_cpu()
_C_cuda, cuda_status = load_cuda(_C.build_cuda)


STAGES = (
    "batch_norm_statistics", "batch_norm_act_apply", "batch_norm_act_backward_sums", "batch_norm_act_backward_apply",
)  # fmt: skip
ON_CUDA = (
    "depthwise_conv2d", "depthwise_conv2d_backward", "depthwise_conv2d_pooled", "depthwise_conv_transpose2d",
    "depthwise_conv1d_step", "separable_conv2d", "separable_conv2d_pack",
    "separable_conv2d_packed", "pointwise_conv2d_pack", "pointwise_conv2d", "inverted_residual", "batch_norm_act",
    "batch_norm_act_backward", "depthwise_norm_act", "depthwise_norm_act_backward", *STAGES,
)  # fmt: skip
ON_CPU_ALONE = (
    "depthwise_conv2d_pack", "depthwise_conv2d_packed", "patch_conv2d", "linear", "global_average_pool", "max_pool2d",
    "interleave_channels", "layer_norm2d", "run_steps", "squeeze_excitation",
)  # fmt: skip


def _refuse(names: tuple[str, ...], key: str, message: str) -> None:
    for name in names:

        def missing(*args: object, message: str = f"{name}: {message}") -> None:
            raise RuntimeError(message)

        _missing.impl(name, missing, key)


def register_missing() -> None:
    """Ops without a kernel for a device say so; under a CPU-only torch there are no CUDA tensors."""
    _refuse(STAGES, "CPU", "tensors must be on a GPU, for which alone it has a kernel, but got CPU tensors")
    if torch.version.cuda is None:
        return
    _refuse(ON_CPU_ALONE, "CUDA", "tensors must be on the CPU, for which alone it has a kernel, but got CUDA tensors")
    if _C_cuda is None:
        _refuse(ON_CUDA, "CUDA", f"CUDA tensors need the CUDA half, but {cuda_status}")


_missing = torch.library.Library("dwconv_ext", "IMPL")
