"""What the ops should compute: torch's own functions in float64, on the very inputs, and the scale S of each element."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tolerance import TINY, UNIT, assert_close
from torch import Tensor

import dwconv_ext


@dataclass
class Convolution:
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)  # or of four ends
    dilation: tuple[int, int] = (1, 1)

    def args(self) -> tuple:
        return self.stride, self.padding, self.dilation


def convolved(x: Tensor, w: Tensor, b: Tensor | None, conv: Convolution) -> Tensor:
    """By torch's grouped convolution."""
    if isinstance(conv.padding, (tuple, list)) and len(conv.padding) == 4:
        top, bottom, left, right = conv.padding
        x, conv = F.pad(x, (left, right, top, bottom)), replace(conv, padding=(0, 0))
    return F.conv2d(x, w, b, *conv.args(), x.shape[1])


def conv_and_grads(x: Tensor, w: Tensor, b: Tensor | None, conv: Convolution, grad: Tensor | None) -> list[Tensor | None]:
    """[y, grad_x, grad_w, grad_b] of torch's grouped convolution, in the dtype of x."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    b = None if b is None else b.detach().clone().requires_grad_()
    y = convolved(x, w, b, conv)
    if grad is None:
        return [y.detach(), None, None, None]
    y.backward(grad.to(y.dtype))
    return [y.detach(), x.grad, w.grad, None if b is None else b.grad]


def check_depthwise(
    x: Tensor, w: Tensor, b: Tensor | None, conv: Convolution, *, backward: bool = True, peer: bool = True, seed: int = 0
) -> None:
    """Forward and every gradient of depthwise_conv2d against float64, element by element, and against torch's own error."""
    ours_x, ours_w = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_(backward) for t in (x, w))
    ours_b = None if b is None else b.detach().clone().requires_grad_(backward)
    y = dwconv_ext.depthwise_conv2d(ours_x, ours_w, ours_b, *conv.args())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1)).to(y) if backward else None
    if grad is not None:
        grad = grad.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else grad
        y.backward(grad)
    double = [None if t is None else t.detach().double().contiguous() for t in (x, w, b, grad)]
    exact = conv_and_grads(*double[:3], conv, double[3])
    scale = conv_and_grads(*(None if t is None else t.abs() for t in double[:3]), conv, None if grad is None else double[3].abs())
    theirs = conv_and_grads(x, w, b, conv, grad) if peer else [None] * 4
    kernel = w.shape[2] * w.shape[3]
    per_weight = y.shape[0] * y.shape[2] * y.shape[3]
    terms = [kernel, kernel * w.shape[0] // x.shape[1], per_weight, per_weight]
    results = [y.detach(), ours_x.grad, ours_w.grad, None if ours_b is None else ours_b.grad]
    for name, ours, want, s, their, n in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), results, exact, scale, theirs, terms, strict=True
    ):
        assert (ours is None) == (want is None), name
        if ours is not None:
            assert ours.dtype == x.dtype
            assert_close(ours, want, s, n, name=name, peer=their)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,  # torch's own on CUDA multiplies float64 by a float32 sixth
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
}
# The largest slope of each activation: how much it can stretch an error that reaches it.
SLOPE = {"silu": 1.1, "hardswish": 1.5, "gelu": 1.13, "gelu_tanh": 1.13}


def check_separable(
    x: Tensor, dw: Tensor, db: Tensor | None, pw: Tensor, pb: Tensor | None, conv: Convolution, dw_act: str, pw_act: str,
    residual: Tensor | None = None, *, peer: bool = True, narrow: bool = False, tf32: bool = False,
) -> None:  # fmt: skip
    """separable_conv2d against float64, element by element. narrow: the intermediate is rounded to the input's
    type (CUDA; on the CPU where it multiplies bfloat16)."""
    y = torch.ops.dwconv_ext.separable_conv2d(
        x, dw, db, pw, pb, *conv.args(), dw_act, pw_act, residual, allow_tf32=tf32
    )  # fmt: skip

    def chain(x, dw, db, pw, pb, residual, first, second):
        middle = first(convolved(x, dw, db, conv))
        out = second(F.conv2d(middle, pw, pb))
        return middle, out if residual is None else out + residual

    def double(t):
        return None if t is None else t.double()

    def magnitude(t):
        return None if t is None else t.double().abs()

    tensors = (x, dw, db, pw, pb, residual)
    between, exact = chain(*map(double, tensors), ACTIVATIONS[dw_act], ACTIVATIONS[pw_act])
    stretch = SLOPE.get(dw_act, 1.0) * SLOPE.get(pw_act, 1.0)
    _, scale = chain(*map(magnitude, tensors), ACTIVATIONS["identity"], ACTIVATIONS["identity"])
    terms = dw.shape[2] * dw.shape[3] + x.shape[1]
    # A few units more for the activations' own polynomials (erfc: 1.2e-7 relative).
    own = {"gelu": 16, "silu": 8, "gelu_tanh": 8, "hardswish": 4}
    extra = own.get(dw_act, 0) + own.get(pw_act, 0)
    theirs = chain(*tensors, ACTIVATIONS[dw_act], ACTIVATIONS[pw_act])[1] if peer else None
    assert y.dtype == x.dtype
    middle = None
    dtype = str(x.dtype).removeprefix("torch.")
    narrow = narrow or (x.dtype == torch.bfloat16 and dwconv_ext._C.pointwise_format(dtype)[2] == dtype)
    if narrow:  # the intermediate rounded once before or after its activation; tf32 rounds both operands
        unit = 2 * 2.0**-11 if tf32 else UNIT[x.dtype]
        middle = stretch * (unit * F.conv2d(between.abs(), pw.double().abs()) + TINY[x.dtype] * pw.double().abs().sum())
    assert_close(y, exact, stretch * scale, terms + extra, peer=theirs, middle=middle)


KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}


def batch_norm_and_grads(x: Tensor, w: Tensor | None, b: Tensor | None, act: str, grad: Tensor) -> list[Tensor | None]:
    """[y, grad_x, grad_w, grad_b] of torch's BatchNorm by the batch's statistics and its activation."""
    given = [None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    y = ACTIVATIONS[act](F.batch_norm(given[0], None, None, *given[1:], True, 0.0, 1e-5))
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in given)]


def check_batch_norm(
    x: Tensor, w: Tensor | None, b: Tensor | None, act: str, grad_output: Tensor | None = None, *, peer: bool = True
) -> None:
    """batch_norm_act and its backward against float64 and against torch's own error; eps is 1e-5, leaky_relu's slope 0.01."""
    ops = torch.ops.dwconv_ext
    double = [None if t is None else t.detach().double() for t in (x, w, b)]
    dims, per_channel = (0, 2, 3), (1, -1, 1, 1)
    mean, variance = double[0].mean(dims), double[0].var(dims, correction=0)
    inv_std = (variance + 1e-5).rsqrt()
    scale = inv_std if w is None else inv_std * double[1]
    bias = torch.zeros_like(mean) if b is None else double[2]
    apart = (double[0] - mean.reshape(per_channel)).abs()
    z = (double[0] - mean.reshape(per_channel)) * scale.reshape(per_channel) + bias.reshape(per_channel)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) if grad_output is None else grad_output
    for kink in KINKS.get(act, ()):  # which side of it an element falls on is a matter of rounding
        grad = grad.masked_fill((z - kink).abs() < 1e-3, 0)
    y, got_mean, got_variance = ops.batch_norm_act(x, w, b, 1e-5, act)
    grads = ops.batch_norm_act_backward(grad, x, w, b, got_mean, got_variance, 1e-5, act)
    exact = batch_norm_and_grads(*double, act, grad.double())
    theirs = batch_norm_and_grads(x, w, b, act, grad) if peer else [None] * 4

    def per(values: Tensor) -> Tensor:
        return values.reshape(per_channel)

    n = x.numel() // x.shape[1]
    terms = min(n, 512) + 16  # the longest chain of additions, and what an exponential and a root add
    spread = double[0].abs() + per(double[0].abs().mean(dims))
    normalised = per(inv_std) * (spread + apart)
    # Where the slope depends on z, so do z's errors, which its terms bring and not their sum.
    z_terms = per(scale.abs()) * (spread + apart) + per(bias.abs())
    g = grad.double().abs() * SLOPE.get(act, 1.0) * (1 + z_terms if act in SLOPE else 1)
    sums = g.sum(dims), (g * normalised).sum(dims)
    absolute = [
        SLOPE.get(act, 1.0) * z_terms,
        per(scale.abs()) * (g + per(sums[0] / n) + normalised * per(sums[1] / n)),
        sums[1],
        sums[0],
    ]
    assert y.dtype == x.dtype and grads[0].dtype == x.dtype
    if x.is_contiguous() or is_channels_last(x):
        assert is_channels_last(y) == is_channels_last(grads[0]) == is_channels_last(x)
    for name, ours, want, s, their in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), (y, *grads), exact, absolute, theirs, strict=True
    ):
        if want is not None:
            assert_close(ours, want, s, terms, name=name, peer=their)
    assert_close(got_mean, mean, double[0].abs().mean(dims), terms, name="mean")
    assert_close(got_variance, variance, (spread**2).mean(dims), terms, name="variance")


def _depthwise_norm_and_grads(
    x: Tensor, w: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, conv: Convolution, act: str, grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """z as it is rounded, the gradients of what there is of x, w, norm_w and norm_b, in float64; and the gradient of y that they
    are of."""
    x, w, norm_w, norm_b = (None if t is None else t.detach().double().requires_grad_() for t in (x, w, norm_w, norm_b))
    exact = convolved(x, w, None, conv)
    middle = exact.detach().to(grad)
    z = middle.double().requires_grad_()
    y = ACTIVATIONS[act](F.batch_norm(z, None, None, norm_w, norm_b, True, 0.0, 1e-5))
    for kink in KINKS.get(act, ()):  # on which side an element falls is a matter of rounding
        grad = grad.masked_fill((y.detach() - kink).abs() < 1e-3, 0)
    to_z, *to_norm = torch.autograd.grad(y, [t for t in (z, norm_w, norm_b) if t is not None], grad.double())
    return middle, (*torch.autograd.grad(exact, (x, w), to_z), *to_norm), grad


def check_depthwise_norm(x: Tensor, w: Tensor, conv: Convolution, act: str, *, affine: bool = True, device: str = "cpu") -> None:
    """depthwise_norm_act_backward against float64; eps is 1e-5, leaky_relu's slope 0.01."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm_w, norm_b = torch.randn(2, len(w), dtype=wide) if affine else (None, None)
    grad = torch.randn_like(convolved(x, w, None, conv))
    middle, exact, grad = _depthwise_norm_and_grads(x, w, norm_w, norm_b, conv, act, grad)
    variance, mean = (t.to(wide) for t in torch.var_mean(middle.double(), (0, 2, 3), correction=0))
    tensors = [None if t is None else t.to(device) for t in (grad, middle, x, w, norm_w, norm_b, mean, variance)]
    ours = torch.ops.dwconv_ext.depthwise_norm_act_backward(*tensors, *conv.args(), 1e-5, act, 0.01, (True, True))
    assert ours[0].dtype == ours[1].dtype == x.dtype and ours[2].dtype == ours[3].dtype == wide
    assert is_channels_last(ours[0]) == is_channels_last(x)
    for name, got, want in zip(("input", "weight", "norm_weight", "norm_bias"), ours, exact, strict=affine):
        error = (got.double().cpu() - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error <= 64 * UNIT[x.dtype], f"{name}: {error:.3g} of the largest"


def check_depthwise_norm_forward(
    x: Tensor, w: Tensor, conv: Convolution, act: str, *, affine: bool = True, device: str = "cpu"
) -> None:
    """depthwise_norm_act is the convolution, and BatchNorm of what that has rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm_w, norm_b = torch.randn(2, len(w), dtype=wide) if affine else (None, None)
    tensors = [None if t is None else t.to(device) for t in (x, w, norm_w, norm_b)]
    y, middle, mean, variance = torch.ops.dwconv_ext.depthwise_norm_act(*tensors, *conv.args(), 1e-5, act, 0.01)
    assert torch.equal(middle, torch.ops.dwconv_ext.depthwise_conv2d(*tensors[:2], None, *conv.args()))
    want = torch.ops.dwconv_ext.batch_norm_act(middle, *tensors[2:], 1e-5, act, 0.01)
    exact, dims = middle.double(), (0, 2, 3)
    unit = 16 * UNIT[wide]
    scale = exact.abs().amax(dims) + 1e-30
    assert ((mean.double() - exact.mean(dims)).abs() <= unit * scale).all()
    assert ((variance.double() - exact.var(dims, correction=0)).abs() <= unit * scale**2).all()
    close = {torch.float64: 1e-10, torch.float32: 1e-4}.get(x.dtype, 4 * UNIT[x.dtype])
    torch.testing.assert_close(y, want[0], rtol=close, atol=close)
    assert is_channels_last(y) == is_channels_last(middle) == is_channels_last(x)


def check_pooled(tensors: Iterable[Tensor | None], conv: Convolution, act: str, device: str = "cpu") -> None:
    """depthwise_conv2d_pooled is the convolution, and the mean over the pixels of what that has rounded."""
    x, w, b = (None if t is None else t.to(device) for t in tensors)
    y, mean = torch.ops.dwconv_ext.depthwise_conv2d_pooled(x, w, b, *conv.args(), act, 0.1)
    want = torch.ops.dwconv_ext.depthwise_conv2d(x, w, b, *conv.args(), act, 0.1)
    assert is_channels_last(y) == is_channels_last(x) and mean.dtype == x.dtype and mean.shape == (*y.shape[:2], 1, 1)
    # A long activation is applied to sums of full precision, not to what a kernel before it has rounded.
    close = 4 * UNIT[x.dtype] if x.dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(y, want, rtol=close, atol=close)
    exact, pixels = y.double(), (2, 3)
    right = exact.mean(pixels, keepdim=True)
    bound = 2 * UNIT[x.dtype] * right.abs() + 1e-6 * exact.abs().amax(pixels, keepdim=True)
    assert ((mean.double() - right).abs() <= bound + 1e-30).all()
