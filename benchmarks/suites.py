"""The implementations of each benchmark: for a layer, the passes, what runs in each, the bytes and operations, and the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwconv_ext import FusedDSConv, depthwise_conv2d, depthwise_conv_transpose2d, unfuse
from dwconv_ext.models.mobilenet_v2 import InvertedResidual
from dwconv_ext.nn.folded_layers import (
    NO_NORM,
    ConvSettings,
    FoldedBlock,
    FoldedConv,
    FoldedInvertedResidual,
    Frozen,
    folded,
)
from dwconv_ext.nn.folded_sequence import FoldedSequence, Link
from dwconv_ext.nn.steps import Place
from dwconv_ext.ops.activations import ACTIVATIONS, SLOPE

from . import peers
from .layers import Layer

Function = Callable[[], object]
OURS = ("dwconv_ext NCHW", "dwconv_ext channels_last")
BASELINE = "nn.Conv2d NCHW"
BASELINE_CHANNELS_LAST = "nn.Conv2d channels_last"
COMPILED = "torch.compile channels_last"
TWO_OPS = ("dwconv_ext two ops NCHW", "dwconv_ext two ops channels_last")  # an inverted residual that is not fused
ONE_CHANNEL = "one channel"  # a decoding step's call
PRODUCT, PRODUCT_SIDE = "torch.mm 1024x1024", 1024  # what the machine's sgemm reaches in the same seconds
NO_PEERS = (*OURS, *TWO_OPS, ONE_CHANNEL, PRODUCT)
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


def check(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Our largest error against float64 at most four times that of torch at the same dtype, or an output ulp."""
    error, peer = ((t.detach().double() - exact).abs().max().item() for t in (ours, theirs))
    allowed = max(4 * peer, torch.finfo(ours.dtype).eps * exact.abs().max().item())
    if not error <= allowed:
        raise Mismatch(f"{name}: largest error {error:.3g} against float64, torch's own {peer:.3g}, allowed {allowed:.3g}")


def _grads(y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Function:
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Function:
    """torch.compile with constant weights folded and packed (freezing), as a deployed model would be; on CUDA autotuned."""
    mode = "max-autotune-no-cudagraphs" if x.is_cuda else None  # graphs are captured of all implementations
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(function, dynamic=False, mode=mode)
        compiled(x)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    return run


def without_grad(function: Callable[..., Tensor], *args: Tensor) -> Function:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*args)

    return run


def _by_kernel(function: Function, kernel: str) -> Function:
    """With torch's own depthwise kernel on CUDA, "native", or "cudnn"'s, where torch can be told which."""

    def run() -> object:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, depthwise_kernel=kernel):
            return function()

    return run


def _depthwise_module(layer: Layer) -> nn.Module:
    channels = layer.channels
    if layer.kind == "transposed":
        return nn.ConvTranspose2d(channels, channels, layer.kernel, layer.stride, layer.padding, groups=channels, bias=False)
    return nn.Conv2d(channels, channels, layer.kernel, layer.stride, layer.padding, groups=channels, bias=False)


def compare_depthwise(layer: Layer, options: Options) -> Iterator[Comparison]:
    """Forward without gradients, and the gradients of input and weight through autograd. Of a transposed convolution nn.Conv2d
    stands for nn.ConvTranspose2d."""
    transposed = layer.kind == "transposed"
    x, w = operands(layer, options, layer.size, layer.kernel)
    conv = _depthwise_module(layer).eval().to(options.device, options.dtype)
    conv.weight.data.copy_(w)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        if transposed:
            return F.conv_transpose2d(x, w, None, layer.stride, layer.padding, 0, layer.channels)
        return F.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.channels)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        function = depthwise_conv_transpose2d if transposed else depthwise_conv2d
        return function(x, w, None, layer.stride, layer.padding)

    layouts = {name: _in_format(memory_format) for name, memory_format in LAYOUTS.items()}
    yield from compare_passes(layer, options, x, w, ours, theirs, conv, layouts)


def _in_format(memory_format: torch.memory_format) -> Callable[[Tensor], Tensor]:
    return lambda t: t.contiguous(memory_format=memory_format)


def operands(layer: Layer, options: Options, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(layer.batch, layer.channels, *size, generator=random).to(options.device, options.dtype)
    return x, torch.randn(layer.channels, 1, *kernel, generator=random).to(options.device, options.dtype)


def compare_passes(
    layer: Layer, options: Options, x: Tensor, w: Tensor, ours: Callable[..., Tensor], theirs: Callable[..., Tensor],
    module: nn.Module, layouts: dict[str, Callable[[Tensor], Tensor]],
) -> Iterator[Comparison]:  # fmt: skip
    forward: dict[str, Function] = {}
    backward: dict[str, Function] = {}
    results: dict[str, list[Tensor]] = {}
    for layout, laid_out in layouts.items():
        for who, function in (("dwconv_ext", ours), ("nn.Conv2d", theirs)):
            a = laid_out(x).clone().requires_grad_()
            b = w.clone().requires_grad_()
            y = function(a, b)
            grad = laid_out(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
            name = f"{who} {layout}"
            forward[name] = without_grad(function, a.detach(), b.detach())
            backward[name] = _grads(y, (a, b), grad)
            results[name] = [y, *backward[name]()]
    exact = _exact_grads(theirs, x, w, grad)
    for i, part in enumerate(("output", "grad_input", "grad_weight")):
        for layout in LAYOUTS:
            check(
                f"{layer.name} {layout} {part}", results[f"dwconv_ext {layout}"][i], results[f"nn.Conv2d {layout}"][i], exact[i]
            )
    if options.device == "cuda" and hasattr(torch.backends.cudnn, "depthwise_kernel"):
        for functions in (forward, backward):
            functions |= {
                f"{name}, {kernel}": _by_kernel(function, kernel)
                for kernel in ("native", "cudnn")
                for name, function in functions.items()
                if name.startswith("nn.Conv2d")
            }
    if options.compile:
        forward[COMPILED] = _compiled(module.requires_grad_(False), layouts["channels_last"](x))
    if options.runtimes:
        forward.update(peers.runtimes(copy.deepcopy(module).float(), x.float(), options.threads, options.dtype))
    unit, inputs, outputs, weights = x.element_size(), x.numel(), layer.outputs, w.numel()
    yield Comparison(layer, "forward", forward, unit * layer.elements, layer.flops)
    yield Comparison(layer, "backward", backward, unit * (2 * inputs + outputs + 2 * weights), 2 * layer.flops)


def _exact_grads(function: Callable[..., Tensor], x: Tensor, w: Tensor, grad: Tensor) -> list[Tensor]:
    a, b = (t.detach().double().contiguous().requires_grad_() for t in (x, w))
    y = function(a, b)
    return [y.detach(), *torch.autograd.grad(y, (a, b), grad.double().contiguous())]


class Pointwise(nn.Sequential):
    """A 1x1 convolution and its activation, on the package's op with packed weights."""

    def __init__(self, layer: Layer) -> None:
        activation = ACTIVATIONS[layer.activation].module(SLOPE)
        super().__init__(nn.Conv2d(layer.channels, layer.out_channels, 1), activation)
        self.op = folded(FoldedConv, ConvSettings(activation=layer.activation))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, (self[0].weight, self[0].bias, *NO_NORM))


def module_of(layer: Layer) -> nn.Module:
    """Ours, in eval mode."""
    if layer.kind == "pointwise":
        ours = Pointwise(layer)
    elif layer.kind == "inverted" or layer.expand != 1:
        ours = InvertedResidual(layer.channels, layer.out_channels, layer.stride, layer.expand)
    else:
        ours = FusedDSConv(layer.channels, layer.out_channels, layer.kernel, layer.stride, layer.padding)
    return ours.eval().requires_grad_(False)


def _plain(ours: nn.Module) -> nn.Module:
    """The same as everybody writes it. A copy: our BatchNorms will change their dtype."""
    return copy.deepcopy(nn.Sequential(*ours) if isinstance(ours, Pointwise) else unfuse(ours)).eval()


class Steps(nn.Module):
    """An inverted residual as a frozen graph has it, in one call: as one op, or its expansion as one and the rest as another."""

    def __init__(self, block: InvertedResidual, *, apart: bool) -> None:
        super().__init__()
        layers = [m for m in block.conv.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
        settings, tensors = [], []
        for at, (conv, norm) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            last = 2 * at + 2 == len(layers)
            act = "identity" if last else "relu6"
            settings.append(ConvSettings(conv.stride, conv.padding, conv.dilation, conv.groups, act, eps=norm.eps))
            tensors += [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
        residual = 0 if block.use_shortcut else -1
        if apart:
            first, rest = folded(FoldedConv, settings[0]), folded(FoldedBlock, *settings[1:])
            links = [Link(first, Place(0), 0, 6), Link(rest, Place(1, residual), 6, 12)]
        else:
            kind = FoldedInvertedResidual if len(settings) == 3 else FoldedBlock
            links = [Link(folded(kind, *settings), Place(0, residual), 0, len(tensors))]
        self.sequence = Frozen(FoldedSequence(links, 1, [len(links)]))
        self.tensors = tuple(tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.sequence([x], self.tensors)


def _product(options: Options) -> Function:
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(options.device, options.dtype)
    return lambda: torch.mm(a, a)


def _baselines(plain: nn.Module, x: Tensor, options: Options, dtype: torch.dtype) -> dict[str, Function]:
    """Everybody else on one float32 input, at a dtype: nn.Conv2d in both layouts, torch.compile, the runtimes."""
    typed, y = copy.deepcopy(plain).to(options.device, dtype), x.to(options.device, dtype)
    functions: dict[str, Function] = {}
    for layout, memory_format in LAYOUTS.items():
        functions[f"nn.Conv2d {layout}"] = without_grad(typed, y.contiguous(memory_format=memory_format))
    if options.compile:
        functions[COMPILED] = _compiled(typed, y.contiguous(memory_format=torch.channels_last))
    if options.runtimes and options.device == "cpu":
        functions.update(peers.runtimes(plain, x, options.threads, dtype))
    return functions


def compare_inference(layer: Layer, options: Options) -> Iterator[Comparison]:
    """A block or a pointwise layer in eval mode; at a narrower dtype the others at float32 too, under names that end in it."""
    torch.manual_seed(0)
    block = module_of(layer)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            _randomize(module)
    plain = _plain(block)
    x = torch.randn(layer.batch, layer.channels, *layer.size)
    exact = copy.deepcopy(plain).to(options.device, torch.float64)(x.to(options.device, torch.float64))
    typed = x.to(options.device, options.dtype)
    ours = {"dwconv_ext": block.to(options.device, options.dtype)}
    if layer.kind == "inverted":
        ours["dwconv_ext"] = Steps(block, apart=False)
        if layer.expand != 1:
            ours["dwconv_ext two ops"] = Steps(block, apart=True)
    functions = {
        f"{who} {layout}": without_grad(module, typed.contiguous(memory_format=memory_format))
        for who, module in ours.items()
        for layout, memory_format in LAYOUTS.items()
    }
    functions.update(_baselines(plain, x, options, options.dtype))
    for who in ours:
        for layout in LAYOUTS:
            results = (functions[f"{each} {layout}"]() for each in (who, "nn.Conv2d"))
            check(f"{layer.name} {who} {layout} output", *results, exact)
    if layer.kind == "pointwise":
        functions[PRODUCT] = _product(options)
    if options.device == "cpu" and options.dtype != torch.float32:
        wide = _baselines(plain, x, options, torch.float32)
        functions.update({f"{name}{FLOAT32}": function for name, function in wide.items()})
    yield Comparison(layer, "forward", functions, typed.element_size() * layer.elements, layer.flops)


def compare_training(layer: Layer, options: Options) -> Iterator[Comparison]:
    """A block's forward and backward pass in training, at 16 bits under autocast."""
    torch.manual_seed(0)
    x, narrow = torch.randn(layer.batch, layer.channels, *layer.size, device=options.device), options.dtype != torch.float32
    ours = module_of(layer).requires_grad_(True).train().to(options.device)
    grad = torch.randn(layer.batch, layer.out_channels, *layer.out_size, device=options.device)

    def step(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Function:
        x = x.detach().requires_grad_()
        operands = (x, *module.parameters())

        def run() -> list[Tensor]:
            with torch.autocast(options.device, options.dtype, enabled=narrow and dtype != torch.float64):
                y = module(x)
            return [y, *torch.autograd.grad(y, operands, grad.to(y).contiguous(memory_format=layout_of(y)))]

        return run

    def layout_of(y: Tensor) -> torch.memory_format:
        return torch.contiguous_format if y.is_contiguous() else torch.channels_last

    exact = step(unfuse(copy.deepcopy(ours)).double().train(), x.double(), torch.float64)()
    functions = {}
    for who, module in (("dwconv_ext", ours), ("nn.Conv2d", unfuse(copy.deepcopy(ours)).train())):
        for layout, memory_format in LAYOUTS.items():
            own = copy.deepcopy(module).to(memory_format=memory_format)
            functions[f"{who} {layout}"] = step(own, x.to(memory_format=memory_format), options.dtype)
    for layout in LAYOUTS:
        results = zip(functions[f"dwconv_ext {layout}"](), functions[f"nn.Conv2d {layout}"](), exact, strict=True)
        for part, (got, peer, want) in enumerate(results):
            check(f"{layer.name} {layout} training, tensor {part}", got, peer, want)
    inputs = layer.batch * layer.channels * prod(layer.size)
    unit = torch.finfo(options.dtype).bits // 8
    yield Comparison(layer, "step", functions, unit * (3 * inputs + 2 * layer.outputs), 3 * layer.flops)


def _randomize(bn: nn.BatchNorm2d) -> None:
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
