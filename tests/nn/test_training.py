"""Modules in training on the CUDA kernels: gradients against float64, losses against the CPU's, and what is kept for backward.

On the emulator, which runs them on CPU tensors: there the Function that CUDA alone takes by itself is taken too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Recorded, sequential
from cases import LAYOUTS
from implementations import EMULATOR, running
from torch import nn
from torch.nn.functional import cross_entropy

import dwconv_ext
from dwconv_ext import FusedDSConv, InvertedResidual
from dwconv_ext.nn import batch_norm_act
from dwconv_ext.ops import batch_norm

BLOCKS = {
    "block": lambda **more: FusedDSConv(16, 24, stride=2, activation="relu6", **more),
    "block_5x5": lambda **more: FusedDSConv(8, 8, 5, activation="silu", **more),
    "inverted_residual": lambda **more: InvertedResidual(8, 8, 1, 4, **more),
    "inverted_residual_stride2": lambda **more: InvertedResidual(16, 8, 2, 2, **more),
}


@pytest.fixture
def on_cuda_kernels(monkeypatch):
    for name in ("LEAST_NCHW", "LEAST_CHANNELS_LAST", "LEAST_CUDA"):
        monkeypatch.setattr(batch_norm, name, 0)
    monkeypatch.setattr(batch_norm_act, "LEAST_CUDA", 0)
    monkeypatch.setattr(batch_norm_act, "DEVICES", ("cpu", "cuda"))
    with running(EMULATOR) as implementation:
        implementation.emulator.set_gpu({"sm_count": 4})
        implementation.emulator.force_fusion("always")
        yield implementation.emulator


def plain_of(block: nn.Module) -> nn.Module:
    return dwconv_ext.unfuse(copy.deepcopy(block)).double()


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def assert_same_step(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Within float32's rounding of the largest value of all: some gradients are nothing but what cancels."""
    largest = max(value.abs().max().item() for value in want.values())
    for key, value in want.items():
        assert (got[key].double() - value).abs().max() <= 4e-6 * largest, key


@pytest.mark.parametrize("checkpointing", [None, "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_equal_float64_s(name, layout, checkpointing, on_cuda_kernels):
    block = BLOCKS[name](checkpointing=checkpointing).train()
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(3, channels, 10, 12).contiguous(memory_format=LAYOUTS[layout])
    want = step(plain_of(block), x.double())
    on_cuda_kernels.launches()
    got = step(block, x)
    ran = {launch["op"] for launch in on_cuda_kernels.launches()}
    assert {"depthwise_conv2d", "batch_norm_act", "depthwise_norm_act"} <= ran
    assert_same_step(got, want)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Elements of the activations that wait for backward, each tensor once."""
    sizes = {}

    def pack(t):
        if t.dim() == 4 and not isinstance(t, nn.Parameter):
            sizes[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointing_keeps_one_depthwise_output_less(name, on_cuda_kernels):
    plain, saving = BLOCKS[name]().train(), BLOCKS[name](checkpointing="depthwise").train()
    conv = next(m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    shapes = []
    conv.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.numel()))
    channels = next(m for m in plain.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, 8, 8)
    plain(x)
    conv._forward_hooks.clear()
    assert kept(plain, x) - kept(saving, x) == shapes[0]


def test_checkpointing_on_the_cpu_s_kernels():
    block = FusedDSConv(16, 24, checkpointing="depthwise").train()
    x = torch.randn(3, 16, 9, 9)
    want = step(plain_of(block), x.double())
    assert_same_step(step(block, x), want)


def test_checkpointing_is_a_word_that_is_known():
    for make in (lambda: FusedDSConv(8, 8, checkpointing="all"), lambda: InvertedResidual(8, 8, 1, 2, checkpointing="all")):
        with pytest.raises(ValueError, match=r"checkpointing must be None or 'depthwise', but got 'all'"):
            make()


def test_a_second_derivative(on_cuda_kernels):
    block, x = FusedDSConv(8, 8, activation="silu").double().train(), torch.randn(2, 8, 5, 6, dtype=torch.float64)

    def penalty(model):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (inputs, *model.parameters()), allow_unused=True)

    for got, want in zip(penalty(block), penalty(plain_of(block)), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_what_is_hooked_frozen_or_biased_runs_by_itself(on_cuda_kernels):
    x = torch.randn(2, 8, 6, 6)

    def one_pass(change=lambda block: None, **more):
        block = FusedDSConv(8, 8, **more).train()
        change(block)
        calls = []
        with Recorded(calls):
            block(x.clone().requires_grad_()).sum().backward()
        return "depthwise_norm_act_backward" in calls

    assert one_pass()
    assert not one_pass(lambda block: block.bn1.eval())
    assert not one_pass(lambda block: block.bn1.register_forward_hook(lambda *_: None))
    assert not one_pass(lambda block: block.depthwise.register_forward_hook(lambda *_: None))
    assert not one_pass(bias=True)
    with torch.no_grad():
        assert FusedDSConv(8, 8).train()(x).shape == x.shape


def test_a_network_trains_as_on_the_cpu(on_cuda_kernels):
    """The losses of some steps of SGD with momentum, and in bfloat16 by autocast about the same."""

    def losses(model, autocast):
        torch.manual_seed(1)
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
        x, y = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.randint(5, (8,))
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), FusedDSConv(16, 24), InvertedResidual(24, 24, 1, 2), FusedDSConv(24, 32, 5, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).train()  # fmt: skip
    plain = dwconv_ext.unfuse(copy.deepcopy(network))
    for autocast, tolerance in ((False, 1e-4), (True, 0.05)):
        got, want = (losses(copy.deepcopy(model), autocast) for model in (network, plain))
        assert want[-1] < want[0]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU])
def test_a_compiled_graph_takes_batch_norm_into_the_convolution_s_gradients(act, on_cuda_kernels, fresh_dynamo):
    model = sequential(16, 24, act).train()
    x = torch.randn(3, 16, 10, 12)
    want = step(copy.deepcopy(model).double(), x.double())
    compiled = copy.deepcopy(model)
    compiled.compile(backend="dwconv_ext")
    on_cuda_kernels.launches()
    got = step(compiled, x)
    passes = [launch["pass"] for launch in on_cuda_kernels.launches() if launch["op"] == "depthwise_norm_act"]
    assert passes == ["forward", "backward"]
    assert_same_step(got, want)


def test_where_checkpointing_is_set():
    block = InvertedResidual(8, 8, 1, 4)
    for module in (block, FusedDSConv(8, 8), dwconv_ext.convert(sequential(8, 8))):
        assert module.checkpointing is None
        module.checkpointing = "depthwise"
        assert module.checkpointing == copy.deepcopy(module).checkpointing == "depthwise"
        with pytest.raises(ValueError, match="checkpointing must be None or 'depthwise', but got 'all'"):
            module.checkpointing = "all"
    assert "checkpointing=depthwise" in repr(FusedDSConv(8, 8, checkpointing="depthwise"))


@pytest.mark.parametrize("setting", ["inner", "outer"])
def test_checkpointing_of_a_container_within_another(setting, on_cuda_kernels):
    model = dwconv_ext.convert(nn.Sequential(sequential(8, 8), nn.Conv2d(8, 4, 1))).train()
    x = torch.randn(2, 8, 9, 9)
    plain = kept(model, x)
    (model[0] if setting == "inner" else model).checkpointing = "depthwise"
    assert plain - kept(model, x) == x.numel()


class WrittenBetween(nn.Module):
    """BatchNorm's statistics change between the convolution and it."""

    def __init__(self):
        super().__init__()
        self.layers = sequential(16, 24, nn.ReLU6)

    def forward(self, x):
        x = self.layers[0](x)
        self.layers[1].running_mean.add_(1)
        return self.layers[1:](x)


def test_a_compiled_graph_leaves_batch_norm_alone_where_something_is_written_before_it(on_cuda_kernels, fresh_dynamo):
    model, x = WrittenBetween().train(), torch.randn(3, 16, 10, 12)
    want = step(copy.deepcopy(model).double(), x.double())
    model.compile(backend="dwconv_ext")
    assert_same_step(step(model, x), want)
