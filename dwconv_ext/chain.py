"""Chains of modules that stay where they are in another module's tree, run as one. ``convert`` makes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .autograd import activation_function
from .folding import Folding, has_hooks
from .modules import FusedDSConv


def resolve(owner: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """owner.get_submodule, without its cost: a small block's call is some tens of microseconds."""
    for name in path:
        owner = owner._modules[name]
    return owner


class Chain(Folding):
    """Convolutions, their BatchNorms and activations, borrowed from ``owner``, with the BatchNorms folded in eval mode.

    It has no parameters and no children: the parts keep their places, names and identity, and are looked up at every call, so
    that one that was replaced, hooked or set to training is used as it is.

    Args:
        owner: the module in whose tree the parts are.
        steps: what the chain runs in order: paths of modules below owner ("conv.0.1"), and activations as ":relu".
        parts: which of the steps are convolutions and their BatchNorms, in turn.
        activation, slope: of the chain's output.
    """

    def __init__(self, owner: nn.Module, steps: Sequence[str], parts: Sequence[int], activation: str, slope: float) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # not a child: owner holds this
        self.steps = tuple(steps)
        self.activation, self.slope = activation, slope
        self.paths = tuple(None if step.startswith(":") else tuple(step.split(".")) for step in self.steps)
        self._part_paths = tuple(self.paths[i] for i in parts)
        self._types = tuple(None if path is None else type(resolve(owner, path)) for path in self.paths)
        self.training = owner.training
        self.enabled = True  # convert turns off one that it found to be slower
        self.clear_cache()

    def _parts(self) -> tuple[nn.Module, ...]:
        owner = self.owner
        return tuple(resolve(owner, path) for path in self._part_paths)

    def _undisturbed(self, parts: tuple[nn.Module, ...]) -> bool:
        """No step in training, hooked or replaced by one of another class."""
        if not self.enabled:
            return False
        for path, kind in zip(self.paths, self._types, strict=True):
            if path is None:
                continue
            module = resolve(self.owner, path)
            if module.training or has_hooks(module) or (type(module) is not kind and type(module) is not nn.SyncBatchNorm):
                return False
        return True

    def unfused(self, input: Tensor) -> Tensor:
        """The steps one by one."""
        for step, path in zip(self.steps, self.paths, strict=True):
            input = activation_function(input, step[1:], 0.01) if path is None else resolve(self.owner, path)(input)
        return input

    def forward(self, input: Tensor) -> Tensor:
        return self._fused(input) if self._can_fold() else self.unfused(input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        """A copy in the copied owner. Where a part is copied without its owner, the chain stays with the original's."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        owner = memo.get(id(self.owner), self.owner)
        for name, value in self.__getstate__().items():
            new.__dict__[name] = owner if name == "owner" else copy.deepcopy(value, memo)
        return new

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", turned off: slower than its parts"
        return f"{' -> '.join(self.steps)}{off}"


class FusedChain(Chain, FusedDSConv):
    """The block depthwise - BatchNorm - activation - pointwise - BatchNorm - activation as one kernel.

    dw_activation, dw_slope: as in :func:`separable_conv2d`.
    """

    def __init__(
        self, owner: nn.Module, steps: Sequence[str], parts: Sequence[int], dw_activation: str, dw_slope: float,
        activation: str, slope: float,
    ) -> None:  # fmt: skip
        super().__init__(owner, steps, parts, activation, slope)
        self.dw_activation, self.dw_slope = dw_activation, dw_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._can_fold():
            return self._fused(input, residual)
        output = self.unfused(input)
        return output if residual is None else output + residual


class FoldedConv(Chain):
    """Convolution - BatchNorm - activation as a convolution whose output is activated in place.

    why: what keeps a depthwise convolution from being part of a FusedChain.
    """

    def __init__(
        self, owner: nn.Module, steps: Sequence[str], parts: Sequence[int], activation: str, slope: float, why: str
    ) -> None:
        super().__init__(owner, steps, parts, activation, slope)
        self.why = why

    def _fused(self, input: Tensor) -> Tensor:
        weight, bias, _ = self._folded_weights()
        output = self._parts()[0]._conv_forward(input, weight, bias)
        return activation_function(output, self.activation, self.slope, inplace=not output.requires_grad)
