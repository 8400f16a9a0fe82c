"""The models written in plain torch, one line after another as the papers' tables are."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def conv_bn(i, o, k=3, s=1, groups=1, act=nn.ReLU):
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return [*layers, act()] if act else layers


def separable(i, o, s):
    names = ("depthwise", "bn1", "act1", "pointwise", "bn2", "act2")
    return nn.Sequential(OrderedDict(zip(names, [*conv_bn(i, i, 3, s, i), *conv_bn(i, o, 1)], strict=True)))


class MobileNetV1(nn.Module):
    def __init__(self, num_classes=1000, width_multiplier=1.0):
        super().__init__()

        def w(channels):
            return int(channels * width_multiplier)

        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(3, w(32), 3, 2)),
            separable(w(32), w(64), 1),
            separable(w(64), w(128), 2),
            separable(w(128), w(128), 1),
            separable(w(128), w(256), 2),
            separable(w(256), w(256), 1),
            separable(w(256), w(512), 2),
            separable(w(512), w(512), 1),
            separable(w(512), w(512), 1),
            separable(w(512), w(512), 1),
            separable(w(512), w(512), 1),
            separable(w(512), w(512), 1),
            separable(w(512), w(1024), 2),
            separable(w(1024), w(1024), 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(w(1024), num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, i, o, s, t):
        super().__init__()
        h = i * t
        self.shortcut = s == 1 and i == o
        expansion = [nn.Sequential(*conv_bn(i, h, 1, act=nn.ReLU6))] if t > 1 else []
        depthwise = nn.Sequential(*conv_bn(h, h, 3, s, h, nn.ReLU6))
        self.conv = nn.Sequential(*expansion, depthwise, *conv_bn(h, o, 1, act=None))

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes=1000):
        super().__init__()
        i, layers = 32, [nn.Sequential(*conv_bn(3, 32, 3, 2, act=nn.ReLU6))]
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        for t, c, n, s in table:
            for k in range(n):
                layers.append(Inverted(i, c, s if k == 0 else 1, t))
                i = c
        self.features = nn.Sequential(*layers, nn.Sequential(*conv_bn(320, 1280, 1, act=nn.ReLU6)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x):
        return self.classifier(torch.mean(self.features(x), (2, 3)))


class BaseConv(nn.Module):
    def __init__(self, i, o, k, s, groups, act):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, (k - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.act = {"silu": nn.SiLU(), "relu": nn.ReLU(), "lrelu": nn.LeakyReLU(0.1)}[act]

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class DWConv(nn.Module):
    def __init__(self, i, o, k, s=1, act="silu"):
        super().__init__()
        self.dconv = BaseConv(i, i, k, s, i, act)
        self.pconv = BaseConv(i, o, 1, 1, 1, act)

    def forward(self, x):
        return self.pconv(self.dconv(x))
