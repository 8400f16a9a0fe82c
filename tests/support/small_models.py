"""Small models in the styles that people write, with parts of their forward under another mode; and how two are compared."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from blocks import randomised, sequential
from torch import nn
from torch.utils.checkpoint import checkpoint

from dwconv_ext.compile import last_report

CHANNELS = 16


def picture(n=2, c=CHANNELS, h=8, w=8, **how):
    return torch.randn(n, c, h, w, **how)


class Named(nn.Module):
    """The layers of a block by name, for a test to put together."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn1, self.act, self.pw, self.bn2, _ = sequential(16, 16)


class Loop(nn.Module):
    """A ModuleList, gone through by hand."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.layers = nn.ModuleList(sequential(channels, channels))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Functional(nn.Module):
    """BatchNorm and activation as functions."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.dw, self.bn1, _, self.pw, self.bn2, _ = sequential(channels, channels)

    def norm(self, x, bn):
        training = bn.training
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps)

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.dw.weight, None, 1, 1, groups=x.shape[1]), self.bn1))
        return F.relu6(self.norm(F.conv2d(x, self.pw.weight), self.bn2))


class Shortcut(nn.Module):
    """An inverted residual: expansion, depthwise, projection, sum."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        wide = 2 * channels
        expand = [nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.body = randomised(nn.Sequential(*expand, *sequential(wide, channels, nn.ReLU6, last=False)))

    def forward(self, x):
        return x + self.body(x)


class InPlace(nn.Module):
    """Activations and the sum write into their operands."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.body = sequential(channels, channels, lambda: nn.ReLU(inplace=True), last=False)

    def forward(self, x):
        y = self.body(x)
        y += x
        return F.relu_(y)


class ConvBnAct(nn.Module):
    """YOLO's."""

    def __init__(self, i, o, k, groups):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Yolo(nn.Module):
    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.dconv, self.pconv = ConvBnAct(channels, channels, 5, channels), ConvBnAct(channels, channels, 1, 1)
        randomised(self)

    def forward(self, x):
        return self.pconv(self.dconv(x))


STYLES = {
    "sequential": lambda channels=CHANNELS: sequential(channels, channels),
    "loop": Loop,
    "functional": Functional,
    "shortcut": Shortcut,
    "in_place": InPlace,
    "yolo": Yolo,
}
REGIONS = ("plain", "no_grad", "autocast", "checkpoint", "inference_mode")


class Net(nn.Module):
    """A body in one of the styles, run in one of the regions, and a head."""

    def __init__(self, style="sequential", region="plain"):
        super().__init__()
        self.region = region
        self.body = nn.Sequential(STYLES[style]())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 8))

    def forward(self, x):
        if self.region == "checkpoint":
            y = checkpoint(self.body, x, use_reentrant=False)
        elif self.region == "no_grad":
            with torch.no_grad():
                y = self.body(x)
        elif self.region == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = self.body(x).to(x.dtype)
        elif self.region == "inference_mode":
            with torch.inference_mode():
                y = self.body(x)
            y = y.clone()  # an inference tensor can't be kept for the head's backward
        else:
            y = self.body(x)
        return self.head(y)


# Of the largest value. The fused kernels round less often than plain layers, which shows in the narrow types.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def assert_same(got, right, name="output", tolerance=None, scale=None):
    """Tensors of the same shape and dtype, and of the same values up to rounding; or dictionaries, sequences of these."""
    if isinstance(right, dict):
        assert got.keys() == right.keys(), f"{name}: {sorted(got)} instead of {sorted(right)}"
        for key in right:
            assert_same(got[key], right[key], f"{name}.{key}", tolerance, scale)
    elif isinstance(right, (tuple, list)):
        assert len(got) == len(right), name
        for at, (g, r) in enumerate(zip(got, right, strict=True)):
            assert_same(g, r, f"{name}[{at}]", tolerance, scale)
    elif isinstance(right, torch.Tensor):
        assert isinstance(got, torch.Tensor), f"{name}: {got} instead of a tensor"
        found, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (got, right))
        assert found == wanted, f"{name}: {found} instead of {wanted}"
        wide, exact = got.detach().double(), right.detach().double()
        assert torch.equal(wide.isfinite(), exact.isfinite()), f"{name}: not finite in other places"
        finite = exact.isfinite()
        error = (wide - exact)[finite].abs().amax().item() if finite.any() else 0.0
        largest = max(exact[finite].abs().amax().item() if finite.any() else 0.0, scale or 0.0, 1e-30)
        assert error <= (tolerance or TOLERANCE.get(right.dtype, 0)) * largest, f"{name}: {error / largest:.2g} of the largest"
    else:
        assert got == right, f"{name}: {got} instead of {right}"


def step_of(model, run, x):
    """A training step's output, and the gradients of the model that `run` makes use of, by name."""
    for p in model.parameters():
        p.grad = None
    y = run(x.clone())
    if y.requires_grad:
        y.square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_step(model, plain, run, x, tolerance=None, buffers=True):
    """One training step of `run`, which makes use of `model`, and of the plain model: outputs, gradients and statistics."""
    (y, grads), (y_plain, grads_plain) = step_of(model, run, x), step_of(plain, plain, x)
    assert_same(y, y_plain, tolerance=tolerance)
    # A gradient that is zero but for rounding (a weight's before BatchNorm, along itself) is measured by the others.
    scale = max((g.abs().max().item() for g in grads_plain.values() if g is not None), default=0.0)
    assert_same(grads, grads_plain, "grad", tolerance, scale)
    if buffers:
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()), "buffer", tolerance)


# --- compiled models ---------------------------------------------------------------------------------------------------


def fast(f, **how):
    return torch.compile(f, backend="dwconv_ext", **how)


def fused():
    """What the last compiled graph has fused, by kind."""
    return dict(last_report().fused)


def check(f, *inputs, wanted=None, tolerance=None, options=None):
    """The compiled function, called without gradients, against the plain one; `wanted`: what must have been fused."""
    compiled = fast(f, options=options) if options else fast(f)
    with torch.no_grad():
        right = f(*copy.deepcopy(inputs))
        assert_same(compiled(*copy.deepcopy(inputs)), right, tolerance=tolerance)
        if wanted is not None:
            assert fused() == wanted, str(last_report())
        assert_same(compiled(*copy.deepcopy(inputs)), right, tolerance=tolerance)  # now with the weights that were kept
    return compiled
