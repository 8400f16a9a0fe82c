"""Each op of the CPU once in a few dtypes and layouts, against torch in float64: a quick look at a CPU, or an emulator of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import dwconv_ext

ops = torch.ops.dwconv_ext
_C = dwconv_ext._C

# Of the largest value: float32's sums have up to a few hundred terms, the narrow types round at most three times.
ROUNDINGS = {torch.float32: 64 * 2.0**-24, torch.float64: 64 * 2.0**-53, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
KINDS = [
    (torch.float32, torch.contiguous_format),
    (torch.float32, torch.channels_last),
    (torch.float64, torch.channels_last),
    (torch.bfloat16, torch.channels_last),
    (torch.float16, torch.contiguous_format),
]
N, C, K, H, W, S = 2, 35, 20, 11, 13, 6
ONE = (1, 1)
Make = Callable[..., Tensor]  # of a shape


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.double().clone().requires_grad_() for t in tensors]


def _gradients(y: Tensor, inputs: list[Tensor], of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, of))


def _depthwise(image: Make, vector: Make) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    x, w, b = image(N, C, H, W), vector(C, 1, 3, 3), vector(C)
    y = F.conv2d(x.double(), w.double(), b.double(), 2, 1, groups=C)
    yield "depthwise_conv2d", [ops.depthwise_conv2d(x, w, b, (2, 2), ONE, ONE, "relu")], [y.relu()]
    yield "depthwise_conv2d_pooled", [*ops.depthwise_conv2d_pooled(x, w, b, (2, 2), ONE, ONE)], [y, y.mean((2, 3), True)]
    packed = ops.depthwise_conv2d_pack(w, b, _C.selected_isa())
    number = _C.activations["relu"]
    yield "depthwise_conv2d_packed", [ops.depthwise_conv2d_packed(x, packed, [C, 3, 3, 2, 2, *[1] * 4, 1, 1], number)], [y.relu()]
    wide = _leaves(x, w, b)
    grad = image(*y.shape)
    got = ops.depthwise_conv2d_backward(grad, x, w, (2, 2), ONE, ONE, [True] * 3)
    yield "depthwise_conv2d_backward", [*got], _gradients(F.conv2d(*wide, 2, 1, groups=C), wide, grad.double())
    y = F.conv_transpose2d(x.double(), w.double(), b.double(), 2, 1, 1, groups=C)
    yield "depthwise_conv_transpose2d", [ops.depthwise_conv_transpose2d(x, w, b, (2, 2), ONE, ONE, ONE)], [y]
    sample, state, taps = vector(N, C), vector(N, C, 3), vector(C, 1, 4)
    y = F.conv1d(torch.cat((state, sample[..., None]), -1).double(), taps.double(), b.double(), groups=C)
    yield "depthwise_conv1d_step", [ops.depthwise_conv1d_step(sample, state, taps, b)], [y[..., 0]]


def _blocks(image: Make, vector: Make) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    x = image(N, C, H, W)
    isa, name = _C.selected_isa(), str(x.dtype).removeprefix("torch.")
    dw, db, pw, pb = vector(C, 1, 3, 3), vector(C), vector(K, C, 1, 1) / 6, vector(K)
    residual, gate, relu = image(N, K, H, W), vector(N, C, 1, 1).sigmoid(), _C.activations["relu"]
    identity = _C.activations["identity"]
    dw64, db64, pw64, pb64 = (t.double() for t in (dw, db, pw, pb))

    def block(of: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(of, dw64, db64, 1, 1, groups=C).relu(), pw64, pb64) + residual.double()

    numbers = [K, 3, 3, 1, 1, *[1] * 4, 1, 1, relu, identity]
    got = ops.separable_conv2d(x, dw, db, pw, pb, ONE, ONE, ONE, "relu", "identity", residual)
    yield "separable_conv2d", [got], [block(x.double())]
    packed = ops.separable_conv2d_pack(dw, db, pw, pb, isa)
    yield "separable_conv2d_packed", [ops.separable_conv2d_packed(x, packed, numbers, [0.0, 0.0], residual)], [block(x.double())]
    thin, expand, eb = image(N, S, H, W), vector(C, S, 1, 1) / 2, vector(C)
    wide = F.conv2d(thin.double(), expand.double(), eb.double()).relu()
    first = ops.pointwise_conv2d_pack(expand, eb, isa)
    got = ops.inverted_residual(thin, first, C, relu, 0.0, packed, numbers, [0.0, 0.0], residual)
    yield "inverted_residual", [got], [block(wide)]
    packed = ops.pointwise_conv2d_pack(pw, pb, isa)
    y = F.conv2d(x.double() * gate.double(), pw64, pb64).relu() + residual.double()
    yield "pointwise_conv2d", [ops.pointwise_conv2d(x, packed, K, 1, relu, 0.0, residual, gate)], [y]
    rows = vector(N, 7, C)
    yield "linear", [ops.linear(rows, packed, K, identity)], [F.linear(rows.double(), pw64.flatten(1), pb64)]
    few, dense = image(N, 3, H, W), vector(K, 3, 3, 3) / 3
    packed = ops.pointwise_conv2d_pack(dense.permute(0, 2, 3, 1).reshape(K, -1, 1, 1), pb, isa, name)
    got = ops.patch_conv2d(few, packed, [K, 3, 3, 2, 2, *[1] * 4, 1, 1], identity)
    yield "patch_conv2d", [got], [F.conv2d(few.double(), dense.double(), pb64, 2, 1)]


def _others(image: Make, vector: Make) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    x, other = image(N, C, H, W), image(N, C, H, W)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = vector(C).to(wide), vector(C).to(wide)
    normal = F.layer_norm(x.double().permute(0, 2, 3, 1), (C,), weight.double(), bias.double()).permute(0, 3, 1, 2)
    yield "layer_norm2d", [ops.layer_norm2d(x, weight, bias)], [normal]
    yield "max_pool2d", [ops.max_pool2d(x, (3, 3), (2, 2), ONE, ONE)], [F.max_pool2d(x.double(), 3, 2, 1)]
    yield "interleave_channels", [ops.interleave_channels(x, other)], [torch.stack((x, other), 2).flatten(1, 2)]
    yield "global_average_pool", [ops.global_average_pool(x, True)], [x.double().mean((2, 3), True)]
    down, up = vector(S, C) / 6, vector(S, C) / 2
    mean = x.double().mean((2, 3))
    gate = (F.linear(mean, down.double()).relu() @ up.double()).sigmoid()[..., None, None]
    yield "squeeze_excitation", [ops.squeeze_excitation(x, down, None, up, None, "relu", "sigmoid")], [gate]
    operands = _leaves(x, weight, bias)
    y = F.batch_norm(operands[0], None, None, *operands[1:], training=True).relu()
    got, mean, variance = ops.batch_norm_act(x, weight, bias, 1e-5, "relu")
    yield "batch_norm_act", [got], [y.detach()]
    got = ops.batch_norm_act_backward(other, x, weight, bias, mean, variance, 1e-5, "relu")
    yield "batch_norm_act_backward", [*got], _gradients(y, operands, other.double())
    filters = vector(C, 1, 3, 3)
    operands = _leaves(x, filters, weight, bias)
    y = F.batch_norm(F.conv2d(*operands[:2], None, 1, 1, groups=C), None, None, *operands[2:], training=True)
    got, middle, mean, variance = ops.depthwise_norm_act(x, filters, weight, bias, ONE, ONE, ONE, 1e-5, "identity", 0.0)
    yield "depthwise_norm_act", [got], [y.detach()]
    call = (other, middle, x, filters, weight, bias, mean, variance, ONE, ONE, ONE, 1e-5, "identity", 0.0, [True, True])
    yield "depthwise_norm_act_backward", [*ops.depthwise_norm_act_backward(*call)], _gradients(y, operands, other.double())


def check() -> set[str]:
    """The names of the ops that agree in all kinds; raises AssertionError for the first that does not."""
    agreed = set()
    for dtype, layout in KINDS:
        made = torch.Generator().manual_seed(0)

        def vector(*shape: int, dtype=dtype, made=made) -> Tensor:
            return torch.randn(shape, generator=made).to(dtype)

        def image(*shape: int, vector=vector, layout=layout) -> Tensor:
            return vector(*shape).contiguous(memory_format=layout)

        for group in (_depthwise, _blocks, _others):
            for name, got, want in group(image, vector):
                for place, (a, b) in enumerate(zip(got, want, strict=True)):
                    error, size = (a.double() - b.double()).abs().max(), b.abs().max()
                    assert a.shape == b.shape and error <= ROUNDINGS[dtype] * size, (
                        f"{name}[{place}], {dtype}, {layout}: error {error:.3g} of {size:.3g}"
                    )
                agreed.add(name)
    return agreed
