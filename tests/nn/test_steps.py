"""Several folded layers as one call: the bits of the single calls, and memory that nothing else sees."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import DTYPES, LAYOUTS
from torch import nn

from dwconv_ext.compile import freeze
from dwconv_ext.nn.fixed_layers import FoldedInterleave, FoldedMaxPool, FoldedNarrow, FoldedPool
from dwconv_ext.nn.folded_layers import (
    ConvSettings,
    FoldedBlock,
    FoldedConv,
    FoldedInvertedResidual,
)
from dwconv_ext.nn.folded_linear import FoldedImageLinear, FoldedLayerNorm, FoldedLinear, FoldedSqueeze
from dwconv_ext.nn.folded_sequence import FoldedSequence, Link
from dwconv_ext.nn.steps import Place, Program, Step

ops = torch.ops.dwconv_ext
DW, PW = ConvSettings(padding=1, groups=8, activation="silu"), ConvSettings(activation="relu")


def convolution(o, c, k=1):
    return torch.randn(o, c, k, k) / (c * k) ** 0.5, torch.randn(o), None, None, None, None


def layers():
    """Every kind, in an order in which each can read the one before; and where from: values, input first."""
    torch.manual_seed(0)
    squeeze = (torch.randn(2, 8, 1, 1), torch.randn(2), torch.randn(8, 2, 1, 1), None)
    expand = (*convolution(24, 8), *convolution(24, 1, 3), *convolution(8, 24))
    wide = DW._replace(groups=24)
    return [
        (FoldedConv(ConvSettings(stride=2, padding=1)), Place(0), convolution(8, 3, 3)),  # 1
        (FoldedConv(DW), Place(1), convolution(8, 1, 3)),  # 2
        (FoldedSqueeze(PW, "hardsigmoid"), Place(2), squeeze),  # 3
        (FoldedConv(PW), Place(2, 1, 3), convolution(8, 8)),  # 4, with a shortcut and a gate
        (FoldedBlock(DW, PW), Place(4, 4), (*convolution(8, 1, 3), *convolution(8, 8))),  # 5
        (FoldedInvertedResidual(PW, wide, PW), Place(5, 5), expand),  # 6
        (FoldedInterleave(), Place(6, 4), ()),  # 7
        (FoldedNarrow(3, 8), Place(7), ()),  # 8
        (FoldedNarrow(8, 8), Place(7), ()),  # 9
        (FoldedConv(PW), Place(8, 9), convolution(8, 8)),  # 10, of a view, plus another
        (FoldedLayerNorm(1e-6), Place(10), (torch.randn(8), torch.randn(8))),  # 11
        (FoldedImageLinear(ConvSettings()), Place(11, 10), (torch.randn(8, 8), None, torch.randn(8, 1, 1))),  # 12
        (FoldedMaxPool((3, 2), (2, 2), (1, 0), (1, 1)), Place(12), ()),  # 13
        (FoldedPool(keepdim=False), Place(13), ()),  # 14
        (FoldedLinear(PW), Place(14), (torch.randn(5, 8), torch.randn(5))),  # 15
    ]


def sequence(parts, outputs):
    links, tensors = [], []
    for layer, place, own in parts:
        links.append(Link(layer, place, len(tensors), len(own)))
        tensors += own
    return FoldedSequence(links, 1, outputs), tuple(tensors)


def one_by_one(parts, x, outputs):
    values = [x]
    for layer, place, own in parts:
        values.append(layer(values[place.input], own, *(None if at < 0 else values[at] for at in place[1:])))
    return [values[at] for at in outputs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@torch.no_grad()
def test_the_bits_of_the_single_calls(dtype, layout):
    parts = layers()
    for outputs in ([15], [4, 15], [1, 7, 9, 15, 2, 12, 13], [8], [9, 8]):
        run, tensors = sequence(parts[: max(outputs)], outputs)
        x = torch.randn(2, 3, 17, 12).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        want = one_by_one(parts[: max(outputs)], x, outputs)
        assert isinstance(run.kept(tensors, dtype), Program)
        first = run([x], tensors)
        for results in (first, run([x], tensors)):
            results = [results] if len(outputs) == 1 else results
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(results, want, strict=True))
        run([torch.randn_like(x)], tensors)  # which must not write into what was returned
        first = [first] if len(outputs) == 1 else first
        assert all(torch.equal(a, b) for a, b in zip(first, want, strict=True))


@torch.no_grad()
def test_sizes_may_change_from_call_to_call():
    parts = layers()
    run, tensors = sequence(parts, [15])
    for size in ((1, 9, 9), (3, 40, 41), (2, 5, 3), (1, 9, 9), (4, 64, 64), (1, 3, 3)):
        x = torch.randn(size[0], 3, *size[1:])
        assert torch.equal(run([x], tensors), one_by_one(parts, x, [15])[0])


@torch.no_grad()
def test_threads_that_call_have_memory_of_their_own():
    parts = layers()
    run, tensors = sequence(parts, [15])
    inputs = [torch.randn(2, 3, 24 + n, 24) for n in range(4)]
    want = [one_by_one(parts, x, [15])[0] for x in inputs]
    wrong = []

    def work(n):
        with torch.no_grad():
            wrong.extend(n for _ in range(50) if not torch.equal(run([inputs[n]], tensors), want[n]))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert not wrong


def test_gradients_go_through_the_layers_one_by_one():
    parts = layers()[:10]
    run, tensors = sequence(parts, [10])
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    run([x], tensors).sum().backward()
    got, x.grad = x.grad, None
    one_by_one(parts, x, [10])[0].sum().backward()
    torch.testing.assert_close(got, x.grad)


@torch.no_grad()
def test_what_no_kernel_takes_is_run_by_torch():
    parts = layers()
    run, tensors = sequence(parts[:2], [2])
    for x in (torch.randn(2, 3, 9, 8, dtype=torch.complex64), torch.randn(0, 3, 9, 8)):
        some = tuple(None if t is None else t.to(x.dtype) for t in tensors)
        first, second = parts[0][2], parts[1][2]
        want = torch.conv2d(x, first[0].to(x.dtype), first[1].to(x.dtype), 2, 1)
        if x.numel():
            with pytest.raises(RuntimeError):  # torch has no SiLU of complex numbers
                run([x], some)
        else:
            assert run([x], some).shape == torch.conv2d(want, second[0], second[1], 1, 1, 1, 8).shape


@torch.no_grad()
def test_an_error_in_the_middle_leaves_nothing_behind():
    parts = layers()
    run, tensors = sequence(parts, [15])
    program = run.kept(tensors, torch.float32)
    x = torch.randn(1, 3, 9, 9)
    want = program([x])[0]
    with pytest.raises(RuntimeError, match="patch_conv2d: packed must be what"):
        program([torch.randn(1, 4, 9, 9)])
    pool, depthwise = Step(ops.global_average_pool.default, True), run.links[1].layer.kept(run.links[1].of(tensors), x.dtype)
    with pytest.raises(RuntimeError, match="depthwise_conv2d"):
        Program([pool, depthwise], [Place(0), Place(0)], 1, [2])([x])
    assert torch.equal(program([x])[0], want)
    outside = ops.global_average_pool(x, True)
    program([x])
    torch.testing.assert_close(outside, x.mean((2, 3), keepdim=True))


@torch.no_grad()
def test_parts_of_parts():
    """A narrowed value may lie anywhere in its memory."""
    whole = torch.randn(4, 12, 3, 2)
    part = torch.ops.aten.narrow.default
    steps = [Step(part, 1, 3, 7), Step(part, 1, 2, 4), Step(ops.global_average_pool.default, True)]
    for x in (whole, whole[1:2], whole[2:, 1:]):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.clone(memory_format=layout) if x is whole else x
            got = Program(steps, [Place(0), Place(1), Place(2)], 1, [2, 3])([x])
            torch.testing.assert_close(got, [x[:, 5:9], x[:, 5:9].mean((2, 3), keepdim=True)])


@pytest.mark.parametrize(
    ("steps", "numbers", "words", "message"),
    [
        ([0, 0, -1, -1, 1, 1], [], ["global_average_pool"], "end elsewhere"),
        ([0, 0, -1, -1, 1, 1, 0], [], ["softmax"], "name an op 'softmax'"),
        ([5, 0, -1, -1, 1, 1, 0], [], ["global_average_pool"], "end elsewhere"),
        ([0, 7, -1, -1, 1, 1, 0], [], ["global_average_pool"], "end elsewhere"),
        ([0, -1, -1, -1, 1, 1, 0], [], ["global_average_pool"], "end elsewhere"),
        ([0, 0, 3, -1, 1, 1, 0], [], ["global_average_pool"], "end elsewhere"),
        ([0, 0, -1, -1, 1, 1, 1, 9], [], ["global_average_pool"], "end elsewhere"),
        ([0, 0, -1, -1, 1, 4, 8, 1, 1], [], ["linear"], "end elsewhere"),
        ([0, 0, -1, -1, 1, 1, 3, 3, 0], [], ["narrow"], "end elsewhere"),
        ([0, 0, -1, -1, 1, 0], [], ["interleave_channels"], "end elsewhere"),
    ],
)
def test_steps_that_are_none_are_refused(steps, numbers, words, message):
    steps, numbers = torch.tensor(steps), torch.tensor(numbers, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"run_steps: .*{message}"):
        ops.run_steps([torch.randn(1, 3, 4, 4)], [], steps, numbers, words, [1])
    with pytest.raises(RuntimeError, match="run_steps: steps must be a dense vector of int64"):
        ops.run_steps([torch.randn(1, 3, 4, 4)], [], steps.int(), numbers, words, [1])


def test_every_dtype_of_a_network():
    """Whole: a folded layer that has no step for a dtype makes the sequence run one by one."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    ).eval()
    for dtype in DTYPES:
        model, x = net.to(dtype), torch.randn(1, 3, 9, 9).to(dtype)
        serve = freeze(torch.export.export(model, (x,)))
        with torch.no_grad():
            torch.testing.assert_close(serve(x), model(x), rtol=0.1 if dtype.itemsize == 2 else 1e-4, atol=0.05)
