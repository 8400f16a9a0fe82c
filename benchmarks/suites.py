"""The implementations of each benchmark: for a layer, the passes, what runs in each, the bytes and operations, and the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwconv_ext import FusedDSConv, depthwise_conv2d
from dwconv_ext.nn.folded_weights import fold

from . import peers
from .layers import Layer

Function = Callable[[], object]
OURS = ("dwconv_ext NCHW", "dwconv_ext channels_last")
BASELINE = "nn.Conv2d NCHW"
BASELINE_CHANNELS_LAST = "nn.Conv2d channels_last"
COMPILED = "torch.compile channels_last"
FLOAT32 = " float32"  # ends the names of implementations at float32 where the others have another dtype
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Comparison:
    """One layer's pass, ready to be timed."""

    layer: Layer
    direction: str  # "forward" or "backward"
    functions: dict[str, Function]
    bytes: float  # compulsory: every operand moved once
    flops: float
    times: dict[str, float] = field(default_factory=dict)


@dataclass
class Options:
    device: str
    dtype: torch.dtype
    threads: int
    compile: bool
    runtimes: bool


class Mismatch(Exception):
    """A result that is not what it should be; nothing is timed."""


def _check(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Our largest error against float64 at most four times that of torch at the same dtype, or an output ulp."""
    error, peer = ((t.detach().double() - exact).abs().max().item() for t in (ours, theirs))
    allowed = max(4 * peer, torch.finfo(ours.dtype).eps * exact.abs().max().item())
    if not error <= allowed:
        raise Mismatch(f"{name}: largest error {error:.3g} against float64, torch's own {peer:.3g}, allowed {allowed:.3g}")


def _grads(y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Function:
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Function:
    """torch.compile with constant weights folded and packed (freezing), as a deployed model would be."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(function, dynamic=False)
        compiled(x)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    return run


def _without_grad(function: Callable[..., Tensor], *args: Tensor) -> Function:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*args)

    return run


def _depthwise_module(layer: Layer) -> nn.Conv2d:
    channels = layer.channels
    return nn.Conv2d(channels, channels, layer.kernel, layer.stride, layer.padding, groups=channels, bias=False)


def compare_depthwise(layer: Layer, options: Options) -> Iterator[Comparison]:
    """Forward without gradients, and the gradients of input and weight through autograd."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(layer.batch, layer.channels, *layer.size, generator=random).to(options.device, options.dtype)
    w = torch.randn(layer.channels, 1, *layer.kernel, generator=random).to(options.device, options.dtype)
    conv = _depthwise_module(layer).to(options.device, options.dtype)
    conv.weight.data.copy_(w)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.channels)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return depthwise_conv2d(x, w, None, layer.stride, layer.padding)

    forward: dict[str, Function] = {}
    backward: dict[str, Function] = {}
    results: dict[str, list[Tensor]] = {}
    for layout, memory_format in LAYOUTS.items():
        for who, function in (("dwconv_ext", ours), ("nn.Conv2d", theirs)):
            a = x.clone(memory_format=memory_format).requires_grad_()
            b = w.clone().requires_grad_()
            y = function(a, b)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y).contiguous(memory_format=memory_format)
            name = f"{who} {layout}"
            forward[name] = _without_grad(function, a.detach(), b.detach())
            backward[name] = _grads(y, (a, b), grad)
            results[name] = [y, *backward[name]()]
    exact = _exact_grads(theirs, x, w, grad)
    for i, part in enumerate(("output", "grad_input", "grad_weight")):
        for layout in LAYOUTS:
            _check(
                f"{layer.name} {layout} {part}", results[f"dwconv_ext {layout}"][i], results[f"nn.Conv2d {layout}"][i], exact[i]
            )
    if options.compile:
        forward[COMPILED] = _compiled(conv.requires_grad_(False), x.contiguous(memory_format=torch.channels_last))
    if options.runtimes:
        node = {
            "weight": w.float().cpu(),
            "bias": None,
            "stride": layer.stride,
            "padding": layer.padding,
            "groups": layer.channels,
            "relu": False,
        }
        forward.update(peers.runtimes(x.float(), [node], options.threads, options.dtype))
    outputs = layer.batch * layer.channels * layer.out_size[0] * layer.out_size[1]
    taps = layer.kernel[0] * layer.kernel[1]
    unit = x.element_size()
    yield Comparison(layer, "forward", forward, unit * (x.numel() + outputs + w.numel()), 2 * outputs * taps)
    yield Comparison(layer, "backward", backward, unit * (2 * x.numel() + outputs + 2 * w.numel()), 4 * outputs * taps)


def _exact_grads(function: Callable[..., Tensor], x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    a, b = (t.detach().double().contiguous().requires_grad_() for t in (x, w))
    y = function(a, b)
    return [y.detach(), *torch.autograd.grad(y, (a, b), grad.double().contiguous())]


def _unfused(block: FusedDSConv, layer: Layer) -> nn.Sequential:
    """The block as everybody writes it, with the block's weights."""
    depthwise = _depthwise_module(layer)
    depthwise.load_state_dict(block.depthwise.state_dict())
    return nn.Sequential(depthwise, block.bn1, nn.ReLU(), block.pointwise, block.bn2, nn.ReLU())


def _baselines(plain: nn.Module, x: Tensor, options: Options, dtype: torch.dtype, nodes: list[dict]) -> dict[str, Function]:
    """Everybody else on one float32 input, at a dtype: nn.Conv2d in both layouts, torch.compile, the runtimes."""
    plain = copy.deepcopy(plain).to(options.device, dtype)
    typed = x.to(options.device, dtype)
    functions: dict[str, Function] = {}
    for layout, memory_format in LAYOUTS.items():
        functions[f"nn.Conv2d {layout}"] = _without_grad(plain, typed.contiguous(memory_format=memory_format))
    if options.compile:
        functions[COMPILED] = _compiled(plain, typed.contiguous(memory_format=torch.channels_last))
    if options.runtimes and options.device == "cpu":
        functions.update(peers.runtimes(x, nodes, options.threads, dtype))
    return functions


def _compare_inference(
    layer: Layer,
    options: Options,
    ours: nn.Module,
    plain: nn.Module,
    work: tuple[float, float],
    nodes: list[dict],
) -> Comparison:
    """Two models in eval mode, float32 on the CPU, with the same weights; work: elements moved at least, and operations.

    At a narrower dtype the others run at float32 too, under names that end in it.
    """
    x = torch.randn(layer.batch, layer.channels, *layer.size)
    exact = copy.deepcopy(plain).to(options.device, torch.float64)(x.to(options.device, torch.float64))
    functions: dict[str, Function] = {}
    ours = ours.to(options.device, options.dtype)
    typed = x.to(options.device, options.dtype)
    for layout, memory_format in LAYOUTS.items():
        functions[f"dwconv_ext {layout}"] = _without_grad(ours, typed.contiguous(memory_format=memory_format))
    functions.update(_baselines(plain, x, options, options.dtype, nodes))
    for layout in LAYOUTS:
        results = (functions[f"{who} {layout}"]() for who in ("dwconv_ext", "nn.Conv2d"))
        _check(f"{layer.name} {layout} output", *results, exact)
    if options.device == "cpu" and options.dtype != torch.float32:
        wide = _baselines(plain, x, options, torch.float32, nodes)
        functions.update({f"{name}{FLOAT32}": function for name, function in wide.items()})
    elements, operations = work
    return Comparison(layer, "forward", functions, typed.element_size() * elements, operations)


def _randomize(bn: nn.BatchNorm2d) -> None:
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)


def _block_nodes(block: FusedDSConv, stride: int, padding: tuple[int, int]) -> list[dict]:
    (first, second), tensors = block._settings(), block._tensors()
    (dw, db), (pw, pb) = fold(*tensors[:6], first.eps), fold(*tensors[6:], second.eps)
    return [
        {"weight": dw, "bias": db, "stride": stride, "padding": padding, "groups": len(dw), "relu": True},
        {"weight": pw, "bias": pb, "stride": 1, "padding": (0, 0), "groups": 1, "relu": True},
    ]


def compare_separable(layer: Layer, options: Options) -> Iterator[Comparison]:
    """The block in eval mode: depthwise, BatchNorm, ReLU, pointwise, BatchNorm, ReLU."""
    torch.manual_seed(0)
    block = FusedDSConv(layer.channels, layer.out_channels, layer.kernel, layer.stride, layer.padding)
    _randomize(block.bn1)
    _randomize(block.bn2)
    block.eval().requires_grad_(False)
    pixels = layer.batch * layer.out_size[0] * layer.out_size[1]
    inputs = layer.batch * layer.channels * layer.size[0] * layer.size[1]
    moved = inputs + pixels * layer.out_channels + layer.channels * layer.out_channels
    flops = 2 * pixels * layer.channels * (layer.kernel[0] * layer.kernel[1] + layer.out_channels)
    # A copy: the block's BatchNorms will change their dtype with it.
    plain = copy.deepcopy(_unfused(block, layer)).eval().requires_grad_(False)
    nodes = _block_nodes(block, layer.stride, layer.padding)
    yield _compare_inference(layer, options, block, plain, (moved, flops), nodes)
