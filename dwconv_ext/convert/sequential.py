"""nn.Sequential that fuses neighbours as it runs: what ``convert`` makes of the sequential containers of a model.

At each call it looks at its present children, nested sequential containers looked through, and runs

    depthwise [- BN] [- act] - pointwise [- BN] [- act]     as one kernel, in eval mode without derivatives (FoldedBlock)
    pointwise [- BN] [- act] - such a block                  the same (FoldedInvertedResidual)
    convolution - BN [- act]                                 as one convolution, the same (FoldedConv)
    BN - act                                                 as one operation, in training (batch_norm.py)
    depthwise - BN [- act]                                   as one, in training on CUDA or to save memory (depthwise_norm.py)

and everything else as nn.Sequential does: children that were appended, replaced, hooked, patched or parametrized since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..nn import batch_norm_act
from ..nn.batch_norm_act import Checkpointing, depthwise_norm_activation, norm_then_activation, trains_by_its_batch
from ..nn.foldable import NORMS, fits, is_conv, is_fixed_norm, is_plain_module, settings_of, starts_a_block, tensors_of
from ..nn.folded_layers import ConvSettings, FoldedBlock, FoldedConv, FoldedInvertedResidual, folded, wants_derivative
from ..nn.folded_weights import Tensors
from ..ops.activations import IDENTITIES, SLOPE, activation_of_module
from ..ops.autograd import has_function_override, is_traced_or_transformed
from ..ops.functional import as_autocast, as_weights_layout


def is_sequential(module: nn.Module) -> bool:
    """Whether a call of it is a call of its children in turn, and no more."""
    kind = type(module)
    if not isinstance(module, nn.Sequential) or kind.forward not in (nn.Sequential.forward, SequentialMixin.forward):
        return False
    return kind.__iter__ is nn.Sequential.__iter__ and kind.__call__ is nn.Module.__call__


def flattened(container: nn.Module) -> list[nn.Module]:
    """The children in the order of their calls."""
    layers: list[nn.Module] = []
    for child in container._modules.values():
        own = getattr(child, "checkpointing", None)
        if is_sequential(child) and is_plain_module(child) and own in (None, getattr(container, "checkpointing", None)):
            layers += flattened(child)
        else:
            layers.append(child)
    return layers


def _globally_hooked() -> bool:
    hooks = module_hooks
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


class _Layer:
    """A convolution with the BatchNorm and the activation that follow it: layers[begin:end]."""

    __slots__ = ("activation", "conv", "end", "norm", "slope")

    def __init__(self, layers: list[nn.Module], begin: int) -> None:
        self.conv, self.norm, self.end = layers[begin], None, begin + 1
        self.activation, self.slope = "identity", SLOPE
        count = len(layers)
        if self.end < count and is_fixed_norm(layers[self.end]):
            self.norm = layers[self.end]
            self.end += 1
        while self.end < count and is_plain_module(layers[self.end]):
            module = layers[self.end]
            if type(module) in IDENTITIES and not (module.training and type(module) is not nn.Identity):
                self.end += 1
                continue
            found = activation_of_module(module)
            if found is None:
                return
            self.activation, self.slope = found
            self.end += 1
            return

    def tensors(self) -> Tensors:
        return tensors_of(self.conv, self.norm)

    @property
    def settings(self) -> ConvSettings:
        return settings_of(self.conv, self.norm, self.activation, self.slope)

    @property
    def is_pointwise(self) -> bool:
        return self.settings.is_pointwise(self.conv._parameters["weight"])


def _pointwise_after(layers: list[nn.Module], first: _Layer) -> _Layer | None:
    """The pointwise layer that makes a depthwise-separable block with this one."""
    if not starts_a_block(first.conv) or first.end == len(layers) or not is_conv(layers[first.end]):
        return None
    second = _Layer(layers, first.end)
    return second if second.is_pointwise and second.conv.weight.dtype is first.conv.weight.dtype else None


def _block_after(layers: list[nn.Module], first: _Layer) -> tuple[_Layer, _Layer] | None:
    """The depthwise and the pointwise layer of a block that follows this pointwise one."""
    if not first.is_pointwise or first.end == len(layers) or not is_conv(layers[first.end]):
        return None
    depthwise = _Layer(layers, first.end)
    pointwise = _pointwise_after(layers, depthwise)
    if pointwise is None or depthwise.conv.weight.dtype is not first.conv.weight.dtype:
        return None
    return depthwise, pointwise


def _keeps_layout(x: Tensor, weight: Tensor) -> bool:
    """Whether an expanded image, laid out as x, would go into this depthwise convolution as it is; unknown where x fits both."""
    one = x.is_contiguous() != x.is_contiguous(memory_format=torch.channels_last)
    return one and as_weights_layout(x, weight) is x and weight.is_cpu


def blocks_of(container: nn.Module) -> Iterator[list[nn.Module]]:
    """The parts of each block that the container would run as one kernel now, where no derivative is wanted."""
    layers = flattened(container)
    for at, layer in enumerate(layers):
        if is_conv(layer):
            second = _pointwise_after(layers, _Layer(layers, at))
            if second is not None:
                yield layers[at : second.end]


class SequentialMixin(Checkpointing):
    """Mixed into nn.Sequential, or a subclass of it with the same forward. checkpointing: as FusedDSConv's, of all its depthwise
    convolutions but those of containers in it with one of their own."""

    def forward(self, input: Any) -> Any:
        layers = flattened(self)
        seen = has_function_override(input) or is_traced_or_transformed() or torch.jit.is_tracing() or _globally_hooked()
        if seen or type(input) is not Tensor or input.dim() != 4:
            return nn.Sequential.forward(self, input)
        at = 0
        while at < len(layers):
            input, at = self._step(layers, at, input)
        return input

    def _step(self, layers: list[nn.Module], at: int, input: Any) -> tuple[Any, int]:
        """What the layers from `at` on give, and from where to go on."""
        layer = layers[at]
        if type(input) is not Tensor:
            return layer(input), at + 1
        if type(layer) in NORMS and layer.training and at + 1 < len(layers) and is_plain_module(layers[at + 1]):
            found = activation_of_module(layers[at + 1])
            if found is not None:
                return norm_then_activation(layer, input, *found), at + 2
        # First: in training nothing is looked for, and no input prepared, in vain.
        if not is_conv(layer) or wants_derivative(input, None, (layer._parameters["weight"],)):
            return self._train(layers, at, input)
        x = as_weights_layout(as_autocast(input), layer._parameters["weight"])
        if x.dim() != 4 or not x.is_cpu or not fits(x, layer):
            return layer(input), at + 1
        first = _Layer(layers, at)
        second = _pointwise_after(layers, first)
        parts, kind = (), FoldedBlock
        if second is not None:
            parts = (first, second)
        elif (block := _block_after(layers, first)) is not None and _keeps_layout(x, block[0].conv.weight):
            parts, kind = (first, *block), FoldedInvertedResidual
        tensors = tuple(t for part in parts for t in part.tensors())
        if parts and not wants_derivative(x, None, tensors):
            return folded(kind, *(part.settings for part in parts))(x, tensors), parts[-1].end
        tensors = first.tensors()
        if (first.norm is None and not first.is_pointwise) or wants_derivative(x, None, tensors):
            return layer(input), at + 1
        return folded(FoldedConv, first.settings)(x, tensors), first.end

    def _train(self, layers: list[nn.Module], at: int, input: Tensor) -> tuple[Any, int]:
        """The layer, with the BatchNorm and the activation after a depthwise convolution where these are one Function."""
        layer, norm = layers[at], at + 1
        wanted = self.checkpointing is not None or input.device.type in batch_norm_act.DEVICES
        if not wanted or norm >= len(layers) or not trains_by_its_batch(layers[norm]) or not is_conv(layer):
            return layer(input), at + 1
        found, end = None, norm + 1
        if end < len(layers) and is_plain_module(layers[end]):
            found = activation_of_module(layers[end])
        act, slope = found or ("identity", SLOPE)
        end += found is not None
        return depthwise_norm_activation(layer, layers[norm], input, act, slope, self.checkpointing), end
