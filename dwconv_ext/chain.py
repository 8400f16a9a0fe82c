"""Chains of modules that stay where they are in another module's tree, run as one. ``convert`` makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _C
from .autograd import activation_function
from .batch_norm import batch_norm_act, takes
from .folding import Folding, has_hooks
from .modules import DepthwiseConv2d, FusedDSConv
from .onednn import PackedConv


def resolve(owner: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """owner.get_submodule, without its cost: a small block's call is some tens of microseconds."""
    for name in path:
        owner = owner._modules[name]
    return owner


def along(owner: nn.Module, paths: Sequence[tuple[str, ...]]) -> list[nn.Module]:
    """Every module on the way to these, the owner first."""
    ends = {path[:i] for path in paths for i in range(len(path) + 1)}
    return [resolve(owner, path) for path in sorted(ends)]


class Norm(NamedTuple):
    """A BatchNorm of a chain and the activation after it.

    step: the BatchNorm's place in the chain's steps.
    steps: how many from there on are the two; one where the BatchNorm's class has the activation built in.
    apart: something lies between that does nothing in eval mode.
    """

    step: int
    activation: str
    slope: float
    steps: int
    apart: bool = False


class Step(NamedTuple):
    run: Callable[[Tensor], Tensor]
    norm: Norm | None  # of a BatchNorm that batch_norm_act may compute with the activation after it


class Unfolded(NamedTuple):
    """What a chain runs where it doesn't fold: in training."""

    snapshot: tuple  # of all that decided it: csrc/snapshot.h
    steps: tuple[Step, ...]


class Chain(Folding):
    """Convolutions, their BatchNorms and activations, borrowed from ``owner``, with the BatchNorms folded in eval mode.

    It has no parameters and no children: the parts keep their places, names and identity, and are looked up at every call, so
    that one that was replaced, hooked or set to training is used as it is.

    Args:
        owner: the module in whose tree the parts are.
        steps: what the chain runs in order: paths of modules below owner ("conv.0.1"), and activations as ":relu".
        convs: which of the steps are convolutions.
        norms: the BatchNorm after each; the last one's activation is of the chain's output.
    """

    def __init__(self, owner: nn.Module, steps: Sequence[str], convs: Sequence[int], norms: Sequence[Norm]) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # not a child: owner holds this
        self.steps = tuple(steps)
        self.activation, self.slope = norms[-1].activation, norms[-1].slope
        self.norms = {norm.step: norm for norm in norms}
        parts = [part for conv, norm in zip(convs, norms, strict=True) for part in (conv, norm.step)]
        self.paths = tuple(None if step.startswith(":") else tuple(step.split(".")) for step in self.steps)
        self._part_paths = tuple(self.paths[i] for i in parts)
        self._types = tuple(None if path is None else type(resolve(owner, path)) for path in self.paths)
        self.training = owner.training
        self.enabled = True  # convert turns off one that it found to be slower
        self.clear_cache()

    def _parts(self) -> tuple[nn.Module, ...]:
        owner = self.owner
        return tuple(resolve(owner, path) for path in self._part_paths)

    def _watched(self) -> list[nn.Module]:
        return [self, *along(self.owner, [path for path in self.paths if path is not None])]

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

    def clear_cache(self) -> None:
        super().clear_cache()
        self._unfolded: Unfolded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_unfolded": None}

    def _known_steps(self) -> tuple[Step, ...] | None:
        """What runs one by one, where nothing has changed since the chain was last found not to fold."""
        if torch.compiler.is_compiling():
            return None
        unfolded = self._unfolded
        if unfolded is None:
            return None
        if _C.is_current(unfolded.snapshot):
            return unfolded.steps
        self._unfolded = None
        return None

    def _find_steps(self) -> tuple[Step, ...]:
        steps = []
        for at, path in enumerate(self.paths):
            norm = self.norms.get(at)
            if path is None:
                steps.append(Step(partial(activation_function, kind=self.steps[at][1:]), None))
            else:
                steps.append(Step(resolve(self.owner, path), norm if norm is not None and self._as_they_were(norm) else None))
        if not (torch.compiler.is_compiling() or self._can_fold()):
            self._unfolded = Unfolded(_C.snapshot(self._watched()[1:], ()), tuple(steps))
        return tuple(steps)

    def unfused(self, input: Tensor, steps: tuple[Step, ...] | None = None) -> Tensor:
        """The steps one by one, but for a BatchNorm in training mode and its activation."""
        if steps is None:
            steps = self._find_steps()
        at = 0
        while at < len(steps):
            run, norm = steps[at]
            act = "identity" if norm is None or norm.apart else norm.activation
            if norm is not None and takes(run, input, act):
                input = batch_norm_act(run, input, act, norm.slope)
                at += norm.steps
            else:
                input = run(input)
                at += 1
        return input

    def _as_they_were(self, norm: Norm) -> bool:
        """Whether the two are neither hooked nor replaced."""
        steps = range(norm.step, norm.step + norm.steps)
        modules = [(resolve(self.owner, self.paths[i]), self._types[i]) for i in steps if self.paths[i] is not None]
        return all(type(module) is kind and not has_hooks(module) for module, kind in modules)

    def forward(self, input: Tensor) -> Tensor:
        steps = self._known_steps()
        folded = self._ready() if steps is None else None
        return self._fused(folded, input) if folded is not None else self.unfused(input, steps)

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
    """The block depthwise - BatchNorm - activation - pointwise - BatchNorm - activation as one kernel."""

    def __init__(self, owner: nn.Module, steps: Sequence[str], convs: Sequence[int], norms: Sequence[Norm]) -> None:
        super().__init__(owner, steps, convs, norms)
        self.dw_activation, self.dw_slope = norms[0].activation, norms[0].slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        steps = self._known_steps()
        folded = self._ready() if steps is None else None
        if folded is not None:
            return self._fused(folded, input, residual)
        output = self.unfused(input, steps)
        return output if residual is None else output + residual


class FoldedConv(Chain):
    """Convolution - BatchNorm - activation as one convolution.

    why: what keeps a depthwise convolution from being part of a FusedChain.
    """

    def __init__(self, owner: nn.Module, steps: Sequence[str], norm: Norm, why: str) -> None:
        super().__init__(owner, steps, [0], [norm])
        self.why = why

    def _settings(self) -> tuple:
        conv = self._parts()[0]
        return conv.stride, conv.padding, conv.dilation, self.activation, self.slope

    def _pack(self, folded: tuple[Tensor, ...]) -> PackedConv | None:
        conv, (weight, bias) = self._parts()[0], folded
        return PackedConv(conv, weight, bias, self.activation, self.slope) if PackedConv.can_pack(conv, weight) else None

    def _fused(self, folded: tuple, input: Tensor) -> Tensor:
        weight, bias, packed = folded
        if packed is not None and packed.takes(input):
            return packed(input)
        conv = self._parts()[0]
        if type(conv) is DepthwiseConv2d:
            return conv._conv_forward(input, weight, bias, self.activation, self.slope)
        output = conv._conv_forward(input, weight, bias)
        return activation_function(output, self.activation, self.slope, inplace=not output.requires_grad)
