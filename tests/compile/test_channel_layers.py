"""LayerNorm and linear layers over an image's channels under torch.compile(model, backend="dwconv_ext"): ConvNeXt's blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from small_models import assert_same, check, fast, fused, picture
from test_sequences import calls_of
from torch import nn

from dwconv_ext.compile import freeze

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """ConvNeXt's, as torchvision writes it, or timm."""

    def __init__(self, style="torchvision", channels=16, bias=True, scaled=True, act="none"):
        super().__init__()
        self.style, self.act = style, act
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.one, self.two = nn.Linear(channels, 4 * channels, bias), nn.Linear(4 * channels, channels, bias)
        shape = (channels, 1, 1) if style == "torchvision" else (channels,)
        self.scale = nn.Parameter(torch.randn(shape)) if scaled else None
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        pixels = self.depthwise(x).permute(0, 2, 3, 1)
        pixels = self.two(F.gelu(self.one(self.norm(pixels)), approximate=self.act))
        y = pixels.permute(0, 3, 1, 2)
        if self.style == "torchvision":
            y = y if self.scale is None else self.scale * y
            y += x
            return y
        y = F.dropout(y, 0.1, training=False)
        y = y if self.scale is None else y.mul(self.scale.reshape(1, -1, 1, 1))
        return y + x


WHOLE = {"depthwise convolutions": 1, "LayerNorms of images": 1, "linear layers of images": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", ("torchvision", "timm"))
def test_styles(style, layout):
    x = picture().contiguous(memory_format=LAYOUTS[layout])
    for bias, scaled, act in ((True, True, "none"), (False, True, "tanh"), (True, False, "none")):
        torch._dynamo.reset()
        model = nn.Sequential(Block(style, 16, bias, scaled, act), Block(style, 16, bias, scaled, act))
        compiled = check(model, x, wanted={name: 2 * count for name, count in WHOLE.items()})
        with torch.no_grad():
            assert compiled(x).stride() == model(x).stride()
            if layout == "channels_last":
                assert calls_of(compiled, x) == ["run_steps"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_dtypes(dtype):
    check(Block().to(dtype), picture().to(dtype), wanted=WHOLE)


def test_autocast():
    model, x = Block(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, x, tolerance=0.06)


def test_freeze():
    model, x = Block().eval(), picture().contiguous(memory_format=torch.channels_last)
    frozen = freeze(torch.export.export(model, (x,)))
    assert fused() == WHOLE
    with torch.no_grad():
        assert_same(frozen(x), model(x))
        assert calls_of(frozen, x) == ["run_steps"]


def test_weights_may_change():
    model, x = Block(), picture()
    compiled = check(model, x)
    with torch.no_grad():
        for edit in (
            lambda: model.scale.mul_(3),
            lambda: model.norm.weight.data.add_(1),
            lambda: model.norm.bias.zero_(),
            lambda: model.two.bias.fill_(5),
            lambda: setattr(model, "one", nn.Linear(16, 64)),
        ):
            edit()
            assert_same(compiled(x), model(x))


def test_gradients():
    model, x = Block(), picture(requires_grad=True)
    assert_same(*(torch.autograd.grad(f(x).sum(), (x, *model.parameters())) for f in (fast(model), model)))
    model.requires_grad_(False)
    with torch.no_grad():
        compiled = fast(model)
        compiled(x)
    assert_same(compiled(x), model(x))


def test_layer_norm_alone():
    """LayerNorm2d; its input is read as it is, and its result is in channels_last as torch's."""
    norm = nn.LayerNorm(16)

    def model(x):
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    for x in (picture(), picture().contiguous(memory_format=torch.channels_last), picture(2, 32)[:, ::2]):
        torch._dynamo.reset()
        compiled = check(model, x, wanted={"LayerNorms of images": 1})
        with torch.no_grad():
            assert compiled(x).stride() == model(x).stride()
    for other in (nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm((8, 16))):
        torch._dynamo.reset()
        check(lambda x, other=other: other(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), picture(), wanted={})
    torch._dynamo.reset()
    check(lambda x: norm(x.permute(0, 3, 2, 1)), picture(c=8, w=16, h=4).permute(0, 3, 2, 1), wanted={})


def test_pixels_that_are_read_by_others():
    block = Block()

    def model(x):
        normed = block.norm(x.permute(0, 2, 3, 1))
        wide = block.one(normed)
        back = block.two(wide).permute(0, 3, 1, 2)
        return normed * 2, wide.sum(), back, back * block.scale, wide.permute(0, 3, 1, 2)

    for layout in LAYOUTS.values():
        torch._dynamo.reset()
        x = picture().contiguous(memory_format=layout)
        check(model, x, wanted={"LayerNorms of images": 1, "linear layers of images": 2})


def test_what_is_written_in_between():
    block = Block()

    def into_the_pixels(x):
        pixels = x.permute(0, 2, 3, 1)
        x.mul_(2)
        return block.norm(pixels).permute(0, 3, 1, 2) + x

    def into_the_image(x):
        y = block.one(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        z = y.permute(0, 2, 3, 1)
        y.add_(1)
        return block.two(z)

    def before_the_scale(x):
        y = block.two(block.one(block.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        x.add_(1)
        return y * block.scale + x

    def into_the_shortcut(x):
        y = block.two(block.one(block.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        x += y
        return x

    for model in (into_the_pixels, into_the_image, before_the_scale, into_the_shortcut):
        torch._dynamo.reset()
        x = picture().contiguous(memory_format=torch.channels_last)
        check(lambda x, model=model: (model(x), x), x)


def test_permutations_of_other_tensors_stay():
    """A view is a tensor of its own, with the mode's gradients."""

    def stops_the_gradient(x):
        z = x * 1
        with torch.no_grad():
            y = z.permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return y * 2 + z

    x = picture(requires_grad=True)
    assert_same(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (fast(stops_the_gradient), stops_the_gradient)))

    def is_transposed(x):
        z = x * 1
        y = z.permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        y.transpose_(1, 2)
        return y.shape[1] + z, y

    check(is_transposed, picture())
    block = Block()

    def is_transposed_once(x):
        pixels = block.norm(x.permute(0, 2, 3, 1))
        y, z = pixels.permute(0, 3, 1, 2), pixels.permute(0, 3, 1, 2)
        y.transpose_(1, 2)
        return y, z, pixels

    check(is_transposed_once, picture())


def test_views_that_are_transposed_in_place():
    block = Block()

    def the_pixels(x):
        pixels = x.permute(0, 2, 3, 1)
        pixels.transpose_(1, 2)
        return block.norm(pixels)

    def the_image(x):
        image = x * 1
        pixels = image.permute(0, 2, 3, 1)
        image.transpose_(2, 3)
        return block.norm(pixels), image

    def the_result(x):
        pixels = block.norm(x.permute(0, 2, 3, 1))
        pixels.transpose_(1, 2)
        return pixels.permute(0, 3, 1, 2)

    def what_is_multiplied(x):
        pixels = block.norm(x.permute(0, 2, 3, 1))
        pixels.transpose_(1, 2)
        return block.one(pixels).permute(0, 3, 1, 2)

    for model in (the_pixels, the_image, the_result, what_is_multiplied):
        torch._dynamo.reset()
        check(model, torch.randn(2, 16, 8, 5))


def test_what_no_kernel_takes():
    block, norm = Block(), nn.LayerNorm(16, eps=-0.01)
    check(lambda x: norm(10 * x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), picture(), wanted={})
    torch._dynamo.reset()
    block.one.weight = nn.Parameter(torch.randn(16, 64).t())
    check(block, picture(), wanted={"depthwise convolutions": 1, "LayerNorms of images": 1, "linear layers": 1})
    bits = torch.randn(16).view(torch.int32)

    def scaled(x):
        y = block.two(block.one(block.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return y * bits.view(torch.float32).reshape(16, 1, 1)

    check(scaled, picture())


def test_factors_that_are_no_scale():
    block = Block()
    factors = (torch.randn(2, 16, 1, 1), torch.randn(16, 8, 8), torch.randn(1), torch.randn(1, 1, 8, 8), torch.randn(2, 16, 8, 8))
    for factor in factors:
        torch._dynamo.reset()

        def model(x, f):
            return block.two(block.one(block.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) * f

        check(model, picture(), factor, wanted={"LayerNorms of images": 1, "linear layers of images": 2})


def test_sizes_that_change():
    model = Block()
    compiled = fast(model, dynamic=True)
    with torch.no_grad():
        for size in ((2, 8, 8), (1, 9, 5), (3, 1, 1), (2, 30, 31)):
            x = torch.randn(size[0], 16, *size[1:])
            assert_same(compiled(x), model(x))
