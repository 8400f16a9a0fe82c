"""The modules: DepthwiseConv2d, a drop-in nn.Conv2d, and FusedDSConv, the depthwise-separable block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import EagerDepthwiseConv2dFunction, is_training_step
from .batch_norm import norm_then_activation
from .folding import Folding
from .functional import ACTIVATIONS, IntOrPair, _pair, depthwise_conv2d, separable_conv2d
from .packed_block import PackedBlock


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` on this package's kernels.

    Same arguments less ``groups``, same ``state_dict``, all padding modes. ``out_channels`` must be a multiple of
    ``in_channels`` (the channel multiplier).

    Example:
        >>> DepthwiseConv2d(32, 32, 3, padding=1)(torch.randn(1, 32, 56, 56)).shape
        torch.Size([1, 32, 56, 56])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # Python's own: numpy's are no constants to a compiler.
        kernel_size, stride, dilation = map(_pair, ("kernel_size", "stride", "dilation"), (kernel_size, stride, dilation))
        if not isinstance(padding, str):
            padding = _pair("padding", padding)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, device, dtype
        )

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, act: str = "identity", slope: float = 0.01
    ) -> Tensor:
        if self.padding_mode == "zeros":
            # In a training step every call of Python counts (EagerDepthwiseConv2dFunction), those of checks too.
            if act == "identity" and type(self.padding) is tuple and is_training_step(input, weight, bias):
                return EagerDepthwiseConv2dFunction.apply(input, weight, bias, self.stride, self.padding, self.dilation)
            return depthwise_conv2d(input, weight, bias, self.stride, self.padding, self.dilation, act, slope=slope)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return depthwise_conv2d(padded, weight, bias, self.stride, 0, self.dilation, act, slope=slope)


_MODULE_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}


def activation_of(name: str, activation: str | nn.Module) -> tuple[str, float]:
    """The op's name and negative slope of an activation given as a string or as an nn.Module."""
    if isinstance(activation, str):
        if activation in ACTIVATIONS:
            return activation, 0.01
    elif type(activation) in _MODULE_NAMES:
        kind = _MODULE_NAMES[type(activation)]
        if kind == "gelu" and activation.approximate == "tanh":
            kind = "gelu_tanh"
        return kind, float(getattr(activation, "negative_slope", 0.01))
    modules = ", ".join(f"nn.{m.__name__}" for m in _MODULE_NAMES)
    raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)} or an instance of {modules}, but got {activation!r}")


class FusedDSConv(Folding):
    """Depthwise-separable block: depthwise - BatchNorm - activation - pointwise - BatchNorm - activation.

    In eval mode the block is one kernel (:func:`separable_conv2d`) with both BatchNorms folded into the convolutions; the
    folded weights are cached until a parameter or running statistic changes (in-place edits, ``load_state_dict``, ``.to()``,
    ``train()``; edits through ``.data`` are invisible to torch's version counters: call :meth:`clear_cache` after those). In
    training mode it runs our depthwise kernels, torch's pointwise convolution and, on the CPU, BatchNorm and activation as one
    op that keeps nothing between the two.

    The parts ``depthwise``, ``bn1``, ``pointwise`` and ``bn2`` are ordinary modules: a state_dict moves to and from
    ``nn.Sequential(OrderedDict(depthwise=..., bn1=..., act1=..., pointwise=..., bn2=..., act2=...))``. Where a part has hooks or
    keeps no running statistics, the parts are run one by one.

    Args:
        in_channels, out_channels: C and the pointwise convolution's output channels.
        kernel_size, stride, dilation: of the depthwise convolution, int or pair.
        padding: int, pair, ``'same'`` or ``'valid'``; None for ``dilation * (kernel_size - 1) // 2``.
        activation: of the block's output: ``relu``, ``relu6``, ``silu``, ``hardswish``, ``gelu``, ``gelu_tanh``,
            ``leaky_relu``, ``identity``, or the matching nn.Module.
        dw_activation: after the depthwise stage; by default the same as ``activation``.
        bias: whether the convolutions have one of their own.
        eps, momentum: of both BatchNorms.

    Shape:
        (N, C, H, W) or, in eval mode, (C, H, W) -> (N, out_channels, outH, outW), in the input's layout.

    Raises:
        ValueError: an activation that is not in the list.

    Example:
        >>> block = FusedDSConv(32, 64).eval()
        >>> block(torch.randn(1, 32, 112, 112)).shape
        torch.Size([1, 64, 112, 112])

    Source: Howard et al., "MobileNets", arXiv:1704.04861, figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair = 1,
        padding: str | IntOrPair | None = None,
        dilation: IntOrPair = 1,
        *,
        activation: str | nn.Module = "relu",
        dw_activation: str | nn.Module | None = None,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.activation, self.slope = activation_of("activation", activation)
        if dw_activation is None:
            self.dw_activation, self.dw_slope = self.activation, self.slope
        else:
            self.dw_activation, self.dw_slope = activation_of("dw_activation", dw_activation)
        if padding is None:
            sizes = zip(_pair("kernel_size", kernel_size), _pair("dilation", dilation), strict=True)
            padding = tuple(d * (k - 1) // 2 for k, d in sizes)
        factory = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(in_channels, in_channels, kernel_size, stride, padding, dilation, bias, **factory)
        self.bn1 = nn.BatchNorm2d(in_channels, eps, momentum, **factory)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.clear_cache()

    # A call of a small block is some tens of microseconds: what runs in each looks its modules up directly, not through
    # nn.Module.__getattr__.
    def _parts(self) -> tuple[nn.Module, ...]:
        modules = self._modules
        return modules["depthwise"], modules["bn1"], modules["pointwise"], modules["bn2"]

    def _takes(self, conv: nn.Conv2d) -> bool:
        return conv.padding_mode == "zeros"

    def _settings(self) -> tuple:
        conv = self._parts()[0]
        return conv.stride, conv.padding, conv.dilation, (self.dw_activation, self.activation), (self.dw_slope, self.slope)

    def _pack(self, folded: tuple[Tensor, ...]) -> PackedBlock:
        return PackedBlock(folded, *self._settings())

    def _fused(self, folded: tuple, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block as one kernel, residual added to its output."""
        packed = folded[-1]
        if torch.compiler.is_compiling() and not (torch.compiler.is_exporting() or torch.is_grad_enabled()):
            packed = self._pack(folded[:-1])  # a frozen graph packs once, as it folds once
        if packed is not None and packed.takes(input, residual):
            return packed(input, residual)
        stride, padding, dilation, activations, slopes = self._settings()
        return separable_conv2d(
            input, *folded[:-1], stride, padding, dilation, *activations, residual, dw_slope=slopes[0], pw_slope=slopes[1]
        )

    def forward(self, input: Tensor) -> Tensor:
        folded = self._ready()
        if folded is not None:
            return self._fused(folded, input)
        x = norm_then_activation(self.bn1, self.depthwise(input), self.dw_activation, self.dw_slope)
        return norm_then_activation(self.bn2, self.pointwise(x), self.activation, self.slope)

    def extra_repr(self) -> str:
        slopes = f", slope={self.slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation}, dw_activation={self.dw_activation}{slopes}"
