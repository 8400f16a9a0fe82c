"""What the tests of convert share: blocks as people write them, and a record of the ops that run."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def sequential(channels=16, out_channels=24, act=nn.ReLU, last=True):
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels), act(),
        nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), *([act()] if last else []),
    ]  # fmt: skip
    return randomised(nn.Sequential(*layers))


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))
