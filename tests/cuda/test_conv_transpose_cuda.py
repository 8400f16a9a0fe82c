"""The transposed convolution on the CUDA kernels one by one, in any order of threads, and what it moves, on the emulator."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch
from cases import LAYOUTS
from implementations import EMULATOR, running
from test_cuda import TABLE, label
from transposed import Transposed, check_transposed

from benchmarks.layers import transposed_layers
from benchmarks.traffic import measure
from dwconv_ext import depthwise_conv_transpose2d

if emulator.cuda_headers() is None:
    pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch", allow_module_level=True)

E = emulator.load()
# At stride 1 it is a forward pass with the flipped filter. With an even filter one side has no whole runs in NCHW.
ROWS = [
    i
    for i, row in enumerate(TABLE)
    if row["op"] == "depthwise_conv2d"
    and (row["pass"] == "backward_input" or (row["pass"] == "forward" and row["stride"] < 2))
    and not (row["name"] == "depthwise_lines_nchw" and row["filter"] % 2 == 0)
]


@pytest.fixture
def emulated():
    with running(EMULATOR):
        yield E


@pytest.mark.parametrize("index", ROWS, ids=lambda i: label(TABLE[i]))
def test_every_kernel_adds_bias_and_activation(index, emulated):
    row = TABLE[index]
    stride = 1 if row["pass"] == "forward" else row["stride"] or 3
    kernel = (row["filter"],) * 2 if row["filter"] else (2, 11)
    kernel = (1, row["filter"] or 13) if "lines" in row["name"] else kernel
    padding = tuple(k // 2 for k in kernel)
    size = (9, 48 if row["aligned"] else 21)
    case = Transposed("", 2, 40, size, kernel, (stride, stride), padding, (stride - 1, 0))
    dtype = getattr(torch, row["dtype"])
    emulated.force_row(index)
    emulated.set_gpu({"sm_count": 4})
    emulated.launches()
    x, w, b = case.tensors(dtype, "nchw" if row["layout"] == "NCHW" else "channels_last")
    check_transposed(case, x, w, b, peer=False)
    plain = depthwise_conv_transpose2d(x, w, b, *case.conv)
    assert torch.equal(depthwise_conv_transpose2d(x, w, b, *case.conv, "relu"), plain.relu())
    ran = [label(launched) for launched in emulated.launches()]
    assert ran.count(label(row)) >= 3, ran


RACES = {
    "3x3": Transposed("", 2, 40, (7, 9)),
    "4x4": Transposed("", 2, 24, (8, 8), (4, 4)),
    "stride_1": Transposed("", 1, 24, (13, 16), stride=(1, 1)),
    "large": Transposed("", 1, 12, (9, 10), (9, 13), (1, 1), (4, 6)),
    "any": Transposed("", 2, 9, (5, 6), (3, 2), (3, 2), multiplier=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", RACES)
def test_bits_do_not_depend_on_the_order_of_threads(case, layout, emulated):
    emulated.set_gpu({"sm_count": 2})
    results = []
    for order, seed in (("forwards", 0), ("backwards", 0), ("shuffled", 1), ("shuffled", 2)):
        emulated.set_order(order, seed)
        leaves = [t.requires_grad_() for t in RACES[case].tensors(torch.float16, layout)]
        with torch.no_grad():
            activated = depthwise_conv_transpose2d(*leaves, *RACES[case].conv, "silu")
        y = depthwise_conv_transpose2d(*leaves, *RACES[case].conv)
        results.append([activated, y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert not any(t.isnan().any() for t in results[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_launches(emulated):
    """A short activation is the kernel's, a long one a pass behind it."""
    x, w, b = RACES["4x4"].tensors(torch.float16, "channels_last")
    for act, passes in (("identity", ["backward_input"]), ("relu", ["backward_input"]), ("gelu", ["backward_input", "activate"])):
        emulated.launches()
        depthwise_conv_transpose2d(x, w, b, 2, 1, act=act)
        assert [launched["pass"] for launched in emulated.launches()] == passes


MOVED = [layer for layer in transposed_layers() if layer.size[0] >= 28]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", MOVED, ids=lambda layer: layer.name)
def test_it_moves_its_input_and_output_about_once(layer, layout):
    where = "NCHW" if layout == "nchw" else layout
    moved = measure(layer._replace(batch=8 if layer.channels < 256 else 4), where, torch.float16, separable=False)
    assert 0.99 <= moved.ratio <= 1.2, moved
