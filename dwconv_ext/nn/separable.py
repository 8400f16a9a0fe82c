"""FusedDSConv: the depthwise-separable block of MobileNet."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activations import ACTIVATIONS, SLOPE, activation_of
from ..ops.arguments import IntOrPair, check_kind, check_number, to_pair
from ..ops.functional import as_autocast, as_weights_layout
from .batch_norm_act import Checkpointing, depthwise_norm_activation, norm_then_activation
from .depthwise import DepthwiseConv2d
from .foldable import fits, is_conv, is_fixed_norm, settings_of, starts_a_block, tensors_of
from .folded_layers import ConvSettings, FoldedBlock, folded
from .folded_weights import Tensors, forget
from .scriptable import stand_in


class FusedDSConv(Checkpointing, nn.Module):
    """Depthwise-separable block: depthwise - BatchNorm - activation - pointwise - BatchNorm - activation.

    In eval mode the block is one kernel (``separable_conv2d``) with both BatchNorms folded into the convolutions; the
    folded weights are kept until a parameter or running statistic changes (folded_weights.py says what is seen). In training
    mode it runs our depthwise kernels, torch's pointwise convolution, and BatchNorm and activation as one op that keeps
    nothing between the two; on CUDA the depthwise convolution's backward takes BatchNorm's gradient as it reads.

    The parts ``depthwise``, ``bn1``, ``pointwise`` and ``bn2`` are ordinary modules: a state_dict moves to and from
    ``nn.Sequential(OrderedDict(depthwise=..., bn1=..., act1=..., pointwise=..., bn2=..., act2=...))``. Where a part has hooks or
    keeps no running statistics, the parts are run one by one.

    Args:
        in_channels: C.
        out_channels: of the pointwise convolution.
        kernel_size: of the depthwise convolution, int or pair.
        stride: of the depthwise convolution, int or pair.
        padding: of the depthwise convolution: int, pair, ``'same'`` or ``'valid'``; None for
            ``dilation * (kernel_size - 1) // 2``.
        dilation: of the depthwise convolution, int or pair.
        activation: of the block's output: one of ``depthwise_conv2d``'s ``act``, or the matching nn.Module.
        dw_activation: after the depthwise stage; by default the same as ``activation``.
        bias: whether the convolutions have one of their own.
        checkpointing: ``'depthwise'`` for the depthwise convolution's output to be computed again in backward, not kept;
            None to keep it.
        eps: of both BatchNorms.
        momentum: of both BatchNorms.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C, H, W) or, in eval mode, (C, H, W) -> (N, out_channels, outH, outW), in the input's layout.

    Raises:
        ValueError: an activation that is not in the list, in_channels that is not a positive int, another padding or
            checkpointing.
        TypeError: kernel_size, stride, padding or dilation that is neither an int nor a pair of ints.
        RuntimeError: in the forward pass, an input that does not fit, as in ``depthwise_conv2d``.

    Examples:
        >>> import torch
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
        checkpointing: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        own = type(self).__name__
        self.activation, self.slope = activation_of(own, "activation", activation)
        if dw_activation is None:
            self.dw_activation, self.dw_slope = self.activation, self.slope
        else:
            self.dw_activation, self.dw_slope = activation_of(own, "dw_activation", dw_activation)
        self.checkpointing = checkpointing
        if padding is None:
            sizes = zip(to_pair(own, "kernel_size", kernel_size), to_pair(own, "dilation", dilation), strict=True)
            padding = tuple(d * (k - 1) // 2 for k, d in sizes)
        factory = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(in_channels, in_channels, kernel_size, stride, padding, dilation, bias, **factory)
        self.bn1 = nn.BatchNorm2d(in_channels, eps, momentum, **factory)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, eps, momentum, **factory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What no constructor would have made of an activation is refused here, not in the middle of a forward pass."""
        super().__setstate__(state)
        own = type(self).__name__
        for name, slope in (("activation", "slope"), ("dw_activation", "dw_slope")):
            check_kind(own, name, state.get(name, "relu"), str, "an activation's name")
            activation_of(own, name, state.get(name, "relu"))
            check_number(own, slope, state.get(slope, SLOPE))

    def clear_cache(self) -> None:
        """Forgets the folded weights; the next forward in eval mode folds anew."""
        forget(self._tensors())

    def _parts(self) -> tuple[nn.Module, ...]:
        modules = self._modules
        return modules["depthwise"], modules["bn1"], modules["pointwise"], modules["bn2"]

    def _folds(self, input: Tensor) -> bool:
        """Whether the block is one kernel now: both BatchNorms fixed, and nothing waits for what lies between."""
        conv, bn1, pointwise, bn2 = self._parts()
        if not (is_conv(conv) and starts_a_block(conv) and is_conv(pointwise) and is_fixed_norm(bn1) and is_fixed_norm(bn2)):
            return False
        if not self._settings()[1].is_pointwise(pointwise.weight) or pointwise.weight.dtype is not conv.weight.dtype:
            return False
        return isinstance(input, Tensor) and pointwise.weight.shape[1] == len(conv.weight) and fits(input, conv)

    def _tensors(self) -> Tensors:
        conv, bn1, pointwise, bn2 = self._parts()
        return (*tensors_of(conv, bn1), *tensors_of(pointwise, bn2))

    def _settings(self) -> tuple[ConvSettings, ConvSettings]:
        conv, bn1, pointwise, bn2 = self._parts()
        first = settings_of(conv, bn1, self.dw_activation, self.dw_slope)
        return first, settings_of(pointwise, bn2, self.activation, self.slope)

    def forward(self, input: Tensor) -> Tensor:
        # For torch.compile the parts: this package's backend finds the block among them, and keeps its weights packed.
        compiling = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if not (compiling or torch.jit.is_tracing()) and self._folds(input):
            x = as_weights_layout(as_autocast(input), self.depthwise.weight)
            return folded(FoldedBlock, *self._settings())(x, self._tensors())
        first = (self.dw_activation, self.dw_slope, self.checkpointing)
        x = depthwise_norm_activation(self.depthwise, self.bn1, input, *first)
        return norm_then_activation(self.bn2, self.pointwise(x), self.activation, self.slope)

    def _as_sequential(self) -> nn.Sequential:
        """The same parts, with modules for the activations: same keys, hooks and mode."""
        conv, bn1, pointwise, bn2 = self._parts()
        act1 = ACTIVATIONS[self.dw_activation].module(self.dw_slope)
        act2 = ACTIVATIONS[self.activation].module(self.slope)
        plain = nn.Sequential(OrderedDict(depthwise=conv, bn1=bn1, act1=act1, pointwise=pointwise, bn2=bn2, act2=act2))
        plain.__dict__.update((name, value) for name, value in self.__dict__.items() if "hooks" in name)
        for part in (plain, act1, act2):
            part.training = self.training
        return plain

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script, which reads a class's source, is given torch's modules."""
        return stand_in(self._as_sequential(), self)

    def extra_repr(self) -> str:
        slopes = f", slope={self.slope}" if self.activation == "leaky_relu" else ""
        again = f", checkpointing={self.checkpointing}" if self.checkpointing else ""
        return f"activation={self.activation}, dw_activation={self.dw_activation}{slopes}{again}"
