"""depthwise_conv2d on the CPU and on CUDA against float64: named cases in every layout and dtype, then random ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CACHE_CASES, CASES, DTYPES, LAYOUTS, Case
from implementations import CUDA, EMULATOR, ONE_SM, running
from problems import VIEWS, problems
from properties import given, settings
from reference import ACTIVATIONS, SLOPE, Convolution, check_depthwise, convolved, is_channels_last
from tolerance import UNIT

import dwconv_ext


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *CACHE_CASES], ids=str)
def test_cases(case, layout, dtype):
    # Without FMA every product is rounded too: torch's error is no measure of such a set where torch has better ones.
    peer = dwconv_ext._C.selected_isa() != "baseline" or len(dwconv_ext._C.supported_isas()) == 1
    check_depthwise(*case.tensors(dtype, layout), case.conv, peer=peer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *CACHE_CASES], ids=str)
def test_every_implementation(case, layout, kernels):
    if kernels.cuda and case in CACHE_CASES:
        pytest.skip("what only the CPU treats apart")
    for gpu in kernels.gpus(ONE_SM):
        for dtype in (torch.float32, torch.float16) if gpu else DTYPES:  # the GPU decides about tiles alone
            check_depthwise(*kernels.on_device(case.tensors(dtype, layout)), case.conv, peer=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *CACHE_CASES], ids=str)
def test_same_bits_for_any_number_of_threads(case, layout, threads):
    def run():
        x, w, b = (t.requires_grad_() for t in case.tensors(torch.float32, layout))
        y = dwconv_ext.depthwise_conv2d(x, w, b, *case.conv.args())
        return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]

    threads(1)
    one = run()
    for count in (2, 7):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True)), count


def test_same_bits_for_any_number_of_threads_on_a_large_image(threads):
    x, w = torch.randn(4, 64, 56, 56), torch.randn(64, 1, 3, 3)
    for layout in LAYOUTS.values():
        results = []
        for count in (1, 2, 7):
            threads(count)
            a = x.clone(memory_format=layout).requires_grad_()
            b = w.clone().requires_grad_()
            y = dwconv_ext.depthwise_conv2d(a, b, padding=1)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), a.grad, b.grad))
        for other in results[1:]:
            assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_follows_the_input_layout(layout, kernels):
    x, w = kernels.on_device((torch.randn(2, 8, 6, 5).contiguous(memory_format=LAYOUTS[layout]), torch.randn(16, 1, 3, 3)))
    y = dwconv_ext.depthwise_conv2d(x, w, padding=1)
    want = F.conv2d(x, w, padding=1, groups=8)
    assert y.stride() == want.stride()
    assert is_channels_last(y) == (layout == "channels_last")


@pytest.mark.isa
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(view, layout, kernels):
    base = torch.randn(3, 20, 12, 13).contiguous(memory_format=LAYOUTS[layout]).to(kernels.device)
    x = VIEWS[view](base)
    w = torch.randn(x.shape[1], 1, 3, 3, device=kernels.device)
    ours_x, theirs_x = (base.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    y = dwconv_ext.depthwise_conv2d(VIEWS[view](ours_x), w, padding=1)
    want = F.conv2d(VIEWS[view](theirs_x).double(), w.double(), padding=1, groups=x.shape[1]).float()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()  # arrives expanded, stride 0
    want.sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(activation, dtype, layout, kernels):
    """Applied to the sums, and rounded once; in every family of kernels (row_11 has few planes)."""
    cases = (Case("two_filters", 2, 10, (9, 15), multiplier=2), Case("stride2", 2, 17, (9, 30), (5, 5), (2, 2)))
    for case in (*cases, Case("row_11", 1, 3, (4, 40), (1, 11)), Case("planes", 2, 9, (16, 30))):
        x, w, b = kernels.on_device(case.tensors(dtype, layout))
        ours = dwconv_ext.depthwise_conv2d(x, w, b, *case.conv.args(), activation)
        z = convolved(x.double(), w.double(), b.double(), case.conv)
        want = ACTIVATIONS[activation](z)
        least = 1e-4 if kernels.device == "cuda" else 1e-5  # a GPU's own exponential
        limit = (2 * UNIT[dtype] + least) * want.abs() + 2 * least
        if kernels.cuda and activation in ("silu", "gelu", "gelu_tanh"):  # a pass of its own over sums that are rounded
            limit += SLOPE[activation] * UNIT[dtype] * z.abs()
        assert ((ours.double() - want).abs() <= limit).all()


def test_an_activation_is_differentiated_as_torchs(threads):
    x, w, b = Case("any", 2, 6, (7, 8)).tensors(torch.float32, "nchw")
    for activation, function in ACTIVATIONS.items():
        gradients = []
        for conv in (
            lambda *t, act=activation: dwconv_ext.depthwise_conv2d(*t, 1, 1, 1, act),
            lambda *t, f=function: f(F.conv2d(*t, 1, 1, 1, 6)),
        ):
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            y = conv(*leaves)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            gradients.append([y, *first, *torch.autograd.grad(first[1].sum(), leaves[0])])
            gradients[-1].append(torch.func.jvp(lambda x, c=conv: c(x, w, b), (x,), (x,))[1])
            gradients[-1].append(torch.func.vmap(lambda x, c=conv: c(x, w, b))(x[:, None]))
        for ours, want in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_stride", [0, 7])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 11)])
def test_a_single_rows_stride_may_be_anything(kernel, row_stride):
    x = torch.randn(2, 3, 1, 40).as_strided((2, 3, 1, 40), (120, 40, row_stride, 1))
    w, padding = torch.randn(3, 1, *kernel), [k // 2 for k in kernel]
    y = dwconv_ext.depthwise_conv2d(x, w, None, 1, padding)
    torch.testing.assert_close(y, F.conv2d(x.clone(), w, None, 1, padding, groups=3), rtol=1e-5, atol=1e-5)


def test_strange_weight_strides():
    x, w = torch.randn(2, 8, 9, 9), torch.randn(3, 3, 1, 8).permute(3, 2, 1, 0)
    torch.testing.assert_close(dwconv_ext.depthwise_conv2d(x, w), F.conv2d(x, w, groups=8))


@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 2), [2, 1], (1, 0, 2, 3), [0, 2, 0, 0]])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 2), (1, 6)])
def test_padding_forms(padding, kernel):
    x, w = torch.randn(2, 6, 11, 10), torch.randn(6, 1, *kernel)
    want = convolved(x, w, None, Convolution(padding=padding))
    torch.testing.assert_close(dwconv_ext.depthwise_conv2d(x, w, padding=padding), want)


def test_unbatched():
    x, w, b = torch.randn(6, 11, 10), torch.randn(12, 1, 3, 3), torch.randn(12)
    torch.testing.assert_close(dwconv_ext.depthwise_conv2d(x, w, b, 2), F.conv2d(x, w, b, 2, groups=6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_go_where_torch_sends_them(value, layout, kernels):
    x = torch.randn(2, 20, 9, 9)
    for at in ((0, 0, 0, 0), (1, 3, 4, 4), (0, 19, 8, 8), (1, 16, 0, 8)):
        x[at] = value
    x, w = kernels.on_device((x.contiguous(memory_format=LAYOUTS[layout]), torch.randn(20, 1, 3, 3)))
    ours, theirs = dwconv_ext.depthwise_conv2d(x, w, padding=1), F.conv2d(x, w, padding=1, groups=20)
    assert torch.equal(ours.isnan(), theirs.isnan())
    loose = {"rtol": 1e-4, "atol": 1e-4} if kernels.device == "cuda" else {}  # torch's own may use tf32
    torch.testing.assert_close(ours, theirs, equal_nan=True, **loose)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_are_rounded_to_even(layout, dtype, kernels):
    """Sums half way between two neighbours, on either side, and just beside that."""
    x = ((1 + 7 * torch.rand(2, 19, 7, 33)) * torch.randn(2, 19, 7, 33).sign()).to(dtype)
    ulp = 2 * UNIT[dtype] * torch.exp2(x.float().abs().log2().floor())
    half = torch.tensor([0.5, -0.5, 1.5, 0.5 - 2**-6, 0.5 + 2**-6])[torch.arange(33) % 5] * ulp
    rest = half.to(dtype)
    assert torch.equal(rest.float(), half)
    x, rest = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, rest))
    pair = torch.stack((x, rest), -1).flatten(3).contiguous(memory_format=LAYOUTS[layout])  # side by side
    y = dwconv_ext.depthwise_conv2d(*kernels.on_device((pair, torch.ones(19, 1, 1, 2, dtype=dtype))), stride=(1, 2))
    assert torch.equal(y.cpu(), (x.float() + rest.float()).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_of_a_slice_do_not_leak_in(layout, kernels):
    base = torch.full((2, 40, 8, 24), float("nan"), device=kernels.device).contiguous(memory_format=LAYOUTS[layout])
    x = base[:, 8:28, :, 5:17]
    x.copy_(torch.randn(x.shape))
    for kernel, stride in (((3, 3), 1), ((5, 5), 2), ((4, 3), 1)):
        v, w = x.detach().requires_grad_(), torch.randn(20, 1, *kernel, device=kernels.device, requires_grad=True)
        y = dwconv_ext.depthwise_conv2d(v, w, stride=stride, padding=1)
        y.sum().backward()
        assert not any(t.isnan().any() for t in (y, v.grad, w.grad))


@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_gradients_asked_for(mask, layout, kernels):
    mask = [bool(m) for m in mask]
    x, grad = (torch.randn(2, c, 8, 8).contiguous(memory_format=LAYOUTS[layout]) for c in (18, 36))
    x, w, grad = kernels.on_device((x, torch.randn(36, 1, 3, 3), grad))
    args = ((1, 1), (1, 1), (1, 1))
    every = torch.ops.dwconv_ext.depthwise_conv2d_backward(grad, x, w, *args, [True] * 3)
    some = torch.ops.dwconv_ext.depthwise_conv2d_backward(grad, x, w, *args, mask)
    for wanted, a, b in zip(mask, some, every, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


def check_problem(problem):
    random = torch.Generator().manual_seed(problem["seed"])
    channels = problem["shape"][1]
    x = torch.randn(problem["shape"], generator=random).to(problem["dtype"])
    w = torch.randn(channels * problem["multiplier"], 1, *problem["kernel"], generator=random).to(problem["dtype"])
    b = torch.randn(len(w), generator=random).to(problem["dtype"]) if problem["bias"] else None
    check_depthwise(x.contiguous(memory_format=LAYOUTS[problem["layout"]]), w, b, problem["conv"], peer=False)


@given(problems())
def test_random_problems(problem):
    with running(problem["isa"]):
        check_problem(problem)


@given(problems())
@settings(max_examples=60)
def test_random_problems_on_the_emulator(problem):
    with running(EMULATOR) as kernels:
        kernels.emulator.set_gpu({"sm_count": 1 + problem["seed"] % 40})
        check_problem(problem)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [dwconv_ext._C.selected_isa(), CUDA[1]], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout, kernels):
    """64-bit indices: 2.2e9 elements of bfloat16 (4.3 GB), checked where the flat index is beyond 2^31, and at the start."""
    shape = (1, 64, 5800, 5800)
    x = torch.empty(shape, dtype=torch.bfloat16, device=kernels.device, memory_format=LAYOUTS[layout])
    assert x.numel() > 2**31
    for c in range(64):
        x[:, c].fill_(0.25 * (c + 1))
    y = dwconv_ext.depthwise_conv2d(x, torch.ones(64, 1, 3, 3, dtype=x.dtype, device=x.device), padding=1)
    for c in (0, 31, 62, 63):
        for rows in (slice(0, 4), slice(2899, 2903), slice(5796, 5800)):
            piece = x[:, c : c + 1, max(rows.start - 1, 0) : rows.stop + 1].cpu().float()
            want = F.conv2d(F.pad(piece, (1, 1, int(rows.start == 0), int(rows.stop == 5800))), torch.ones(1, 1, 3, 3))
            torch.testing.assert_close(y[:, c : c + 1, rows].cpu().float(), want, rtol=2**-8, atol=0)
