"""Modules and compiled graphs on CUDA's packed ops, on the emulator, whose tensors are the CPU's: layers keep what they make."""

from __future__ import annotations

import copy

import cuda_emulator as emulator
import pytest
import torch
from cases import LAYOUTS
from implementations import EMULATOR, running
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dwconv_ext
from dwconv_ext.models.mobilenet_v2 import InvertedResidual

if emulator.cuda_headers() is None:
    pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch", allow_module_level=True)

ops = torch.ops.dwconv_ext


@pytest.fixture
def emulated():
    with running(EMULATOR) as implementation:
        yield implementation.emulator


def trained(module: nn.Module) -> nn.Module:
    """In eval mode, with statistics and parameters that are not those of a new BatchNorm."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for t in (norm.running_mean, norm.weight.data, norm.bias.data):
            t.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module.eval()


def names(module) -> list[str]:
    return [launched["name"] for launched in module.launches()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_modules(dtype, layout, emulated):
    emulated.force_fusion("always")
    last = "nhwc" if layout == "channels_last" else "nchw"
    for module, kernel in ((dwconv_ext.FusedDSConv(24, 40, stride=2), "separable"), (InvertedResidual(24, 24, 1, 6), "inverted")):
        block, x = trained(module), torch.randn(2, 24, 14, 14).contiguous(memory_format=LAYOUTS[layout])
        x = x.to(dtype)
        with torch.no_grad():
            want = copy.deepcopy(block).double()(x.double())
            emulated.launches()
            got = block.to(dtype)(x)
            launched = names(emulated)
        assert len(launched) == 1 and launched[0].startswith(kernel) and launched[0].endswith(last), launched
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2 if dtype == torch.float16 else 1e-4)


def test_a_channel_that_is_always_zero_fits_float16(emulated):
    """Its folded bias, mean * scale, does not: packed weights keep it in float32, in one kernel and in two."""
    block = trained(dwconv_ext.FusedDSConv(8, 8, activation="hardswish"))  # of -inf: NaN
    block.bn1.running_var[0], block.bn1.running_mean[0], block.bn1.weight.data[0] = 0, 300, 1
    x = torch.randn(1, 8, 6, 6)
    x[:, 0] = 0
    want = copy.deepcopy(block).double()(x.double()).detach()
    for fusion in ("always", "never"):
        emulated.force_fusion(fusion)
        with torch.no_grad():
            got = block.half()(x.half())
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_frozen_graphs_run_the_packed_ops(emulated, fresh_dynamo):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)), InvertedResidual(24, 24, 1, 4)

        def forward(self, x):
            return self.block(self.first(x)).relu()

    net, x = trained(Net()), torch.randn(1, 16, 9, 9)
    with torch.no_grad():
        want = copy.deepcopy(net)(x)
        fast = torch.compile(net, backend="dwconv_ext", options={"base": "eager", "freeze": True, "sequences": False})
        emulated.force_fusion("always")
        fast(x)
        emulated.launches()
        got = fast(x)
    assert sum(name.startswith(("inverted", "pointwise")) for name in names(emulated)) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(dwconv_ext._C_cuda is None, reason="no CUDA half")
def test_fakes_know_the_bytes_of_cudas_packed_weights(emulated):
    weights = torch.randn(7, 1, 3, 3), torch.randn(7), torch.randn(5, 7, 1, 1), None
    packed = ops.separable_conv2d_pack(*weights, dwconv_ext._C.selected_isa(), "float16")
    assert len(packed) == emulated.block_bytes("float16", 7, 5, 3, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [None if t is None else torch.empty(t.shape, device="cuda:0") for t in weights]
        assert ops.separable_conv2d_pack(*fake, "", "float16").shape == packed.shape
        x = torch.empty(1, 7, 4, 4, device="cuda:0", dtype=torch.float16)
        bytes = torch.empty(packed.shape, device="cuda:0", dtype=torch.uint8)
        block = [5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
        assert ops.separable_conv2d_packed(x, bytes, block, [0.0, 0.0]).shape == (1, 5, 4, 4)
        with pytest.raises(RuntimeError, match="packed must be what separable_conv2d_pack made on this device"):
            ops.separable_conv2d_packed(x, bytes[:-1], block, [0.0, 0.0])
