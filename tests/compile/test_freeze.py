"""freeze(program): exported programs on this package's kernels, with their weights as they were."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from blocks import Recorded, randomised, sequential
from cases import LAYOUTS
from small_models import STYLES, Net, assert_same, fast, fused, picture
from torch import nn
from torch.export import Dim, export

from dwconv_ext.compile import freeze, last_report
from dwconv_ext.models import MobileNetV2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def frozen(model, *inputs, **how):
    return freeze(export(model, inputs, **how))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
def test_the_model_and_what_the_backend_fuses(style, layout):
    model = randomised(Net(style)).to(memory_format=LAYOUTS[layout])
    x = picture().contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        right = model(x)
        fast(model)(x)
    by_backend = fused()
    serve = frozen(model, x)
    assert fused() == by_backend
    assert_same(serve(x), right)
    assert not serve(x).requires_grad


@torch.no_grad()
def test_a_whole_network_is_one_call():
    model = randomised(MobileNetV2(num_classes=10))
    x = picture(1, 3, 64, 64)
    serve = frozen(model, x)
    calls: list[str] = []
    want = model(x)
    with Recorded(calls):
        got = serve(x)
    assert calls == ["run_steps"], calls
    assert_same(got, want)


def test_weights_are_those_of_the_moment():
    model, x = sequential(), picture()
    serve = frozen(model, x)
    with torch.no_grad():
        want = model(x)
        for p in model.parameters():
            p.mul_(3)
    assert_same(serve(x), want)
    assert_same(frozen(model, x)(x), model(x).detach())


class Writes(nn.Module):
    """A weight that the program itself writes, before or after it is read, directly or by a view."""

    def __init__(self, write, first):
        super().__init__()
        self.conv, self.write, self.first = nn.Conv2d(16, 8, 1), write, first
        self.register_buffer("weight", torch.randn(8, 8, 1, 1))

    def forward(self, x):
        y = self.conv(x)
        if self.first:
            self.write(self.weight)
        y = F.conv2d(y, self.weight)
        if not self.first:
            self.write(self.weight)
        return y


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("write", (lambda w: w.mul_(0.5), lambda w: w[0].zero_(), lambda w: w.view(-1).add_(1)))
@torch.no_grad()
def test_weights_that_the_program_writes(write, first):
    model, x = Writes(write, first), picture()
    plain, serve, other = copy.deepcopy(model), frozen(model, x), frozen(model, x)
    before = model.weight.clone()
    for _ in range(3):
        want = plain(x)
        assert_same(serve(x), want)
    assert torch.equal(model.weight, before)  # the writes are the function's own
    assert_same(other(x), copy.deepcopy(model)(x))  # and this one's


@torch.no_grad()
def test_what_is_not_packed_is_copied():
    model = nn.Sequential(
        nn.Conv2d(16, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 16, 2), nn.LayerNorm(7), nn.Conv2d(16, 8, 3)
    ).eval()
    x = picture()
    serve, want = frozen(model, x), model(x)
    for t in (*model.parameters(), *model.buffers()):
        t.zero_()
    assert_same(serve(x), want)


@torch.no_grad()
def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.embedding = nn.Linear(16, 10), nn.Embedding(10, 16)
            self.embedding.weight = self.linear.weight

        def forward(self, x, words):
            return self.linear(x) + self.embedding(words).sum(), self.linear.weight

    model, inputs = Tied(), (torch.randn(3, 16), torch.tensor([1, 4]))
    serve = frozen(model, *inputs)
    assert_same(serve(*inputs), model(*inputs))


@torch.no_grad()
def test_empty_batches():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip
    serve = frozen(model, picture(4, 3, 16, 16), dynamic_shapes=({0: Dim.DYNAMIC},))
    for n in (4, 0, 3):
        assert_same(serve(x := picture(n, 3, 16, 16)), model(x))
    assert_same(frozen(model, x := picture(0, 3, 16, 16))(x), model(x))
    linear = nn.Linear(8, 3)
    for size in ((0, 8), (2, 0, 8)):
        assert_same(frozen(linear, x := torch.randn(size))(x), linear(x))


@torch.no_grad()
def test_rows_that_data_chooses():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = sequential(16, 16), nn.Linear(16, 5)

        def forward(self, x):
            kept = self.body(x)[x[:, 0, 0, 0] > 0]
            return self.head(kept.mean((2, 3)))

    model, x = randomised(Chosen()), picture(5)
    serve = frozen(model, x)
    for other in (x, x.abs(), -x.abs()):
        assert_same(serve(other), model(other))


@torch.no_grad()
def test_branches_have_constants_of_their_own():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x):
            y = self.conv(x)
            return torch.cond(y.sum() > 0, lambda y: y + torch.tensor([2.0]), lambda y: y * 3, (y,))

    model, x = Branches(), picture()
    serve = frozen(model, x)
    for other in (x, -x, x.abs()):
        assert_same(serve(other), model(other))


@pytest.mark.parametrize("kernel", (2, 3, 4))
@torch.no_grad()
def test_padding_that_is_another_at_each_end(kernel):
    first = nn.Conv2d(3, 16, kernel, padding="same")
    blocks = (nn.Conv2d(16, 16, kernel, padding="same", groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1), sequential(16, 16))
    model = randomised(nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), *blocks, sequential(16, 16)))
    x = picture(c=3)
    serve = frozen(model, x)
    want = model(x)
    assert_same(serve(x), want)
    calls: list[str] = []
    with Recorded(calls):
        serve(x)
    assert "run_steps" in calls and "rsqrt" not in calls  # the rest still is one call, and nothing is folded anew


@torch.no_grad()
def test_a_filter_beyond_the_ops_limit():
    model = nn.Sequential(nn.Conv2d(1, 4, (1, 40000)), nn.ReLU()).eval()
    x = torch.randn(1, 1, 1, 40100)
    assert_same(frozen(model, x)(x), model(x))


@torch.no_grad()
def test_autocast_does_not_count():
    model = nn.Sequential(sequential(16, 16), nn.ConvTranspose2d(16, 16, 2), nn.Flatten(), nn.Linear(16 * 81, 4)).eval()
    x = picture()
    serve, want = frozen(model, x), model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(serve(x), want)


def test_two_models_of_one_structure():
    models = [randomised(Net("sequential")) for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(1.5)
    x = picture()
    serves = [frozen(model, x) for model in models]
    for model, serve in zip(models, serves, strict=True):
        assert_same(serve(x), model(x).detach())


def test_nothing_keeps_the_model():
    model, x = sequential(), picture()
    serve = frozen(model, x)
    tensors = [*model.parameters(), *model.buffers()]
    left = [*map(weakref.ref, tensors), *(weakref.ref(t.untyped_storage()) for t in tensors)]
    want = model(x).detach()
    del model, tensors
    gc.collect()
    assert not any(ref() is not None for ref in left)
    assert_same(serve(x), want)


class Several(nn.Module):
    """Nested inputs and outputs, and values that are used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = sequential(16, 16), sequential(16, 16)

    def forward(self, pair, *, scale, extra=None):
        a = self.first(pair[0])
        b = self.second(a) + pair[1]["other"] * scale
        return {"a": a, "list": [b, (a + b).mean((2, 3))]}


def test_nested_arguments_and_results():
    model, x = randomised(Several()), picture()
    arguments = ([x, {"other": picture()}],)
    keywords = {"scale": torch.tensor(2.0)}
    serve = freeze(export(model, arguments, keywords))
    assert_same(serve(*arguments, **keywords), copy.deepcopy(model)(*arguments, **keywords))


@torch.no_grad()
def test_sizes_that_were_left_open():
    model = sequential()
    batch, height = Dim("batch", min=2, max=64), Dim("height", min=4, max=64)
    serve = frozen(model, picture(4), dynamic_shapes=({0: batch, 2: height},))
    for n, h in ((4, 8), (2, 30), (9, 5)):
        x = picture(n, h=h)
        assert_same(serve(x), model(x))
    with pytest.raises(AssertionError):  # torch.export's own
        serve(picture(4, w=9))
    with pytest.raises(RuntimeError, match=r"freeze: input must be torch.float32 on cpu, but got torch.float64 on cpu"):
        serve(picture(4).double())


NO_TENSORS = {"list": [1, 2], "none": None, "numpy": picture().numpy(), "sparse": picture().to_sparse()}


@pytest.mark.parametrize("wrong", NO_TENSORS)
def test_inputs_that_are_no_dense_tensors(wrong):
    with pytest.raises(RuntimeError, match="freeze: input must be a dense tensor, but got"):
        frozen(sequential(), picture())(NO_TENSORS[wrong])


WRONG = {
    "shape": (picture(3), r"of shape \[3, 16, 8, 8\]"),
    "rank": (picture()[0], r"of shape \[16, 8, 8\]"),
    "dtype": (picture().double(), "torch.float64 on cpu"),
    "device": (picture(device="meta"), "torch.float32 on meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs(wrong):
    x, message = WRONG[wrong]
    serve = frozen(sequential(), picture())
    wanted = r"freeze: input must be torch.float32 on cpu and of shape \[2, 16, 8, 8\], but got .*"
    with pytest.raises(RuntimeError, match=wanted + message):
        serve(x)


@torch.no_grad()
def test_autocast_within_the_model():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = sequential(16, 16), nn.ConvTranspose2d(16, 4, 2)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.last(self.body(x))
            return y.float()

    model, x = randomised(Inside()), picture()
    assert_same(frozen(model, x)(x), model(x), tolerance=6e-2)


def test_wrong_programs():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = export(sequential(), (picture(),))
    with pytest.raises(ValueError, match="freeze: program must be exported outside of autocast"):
        freeze(program)
    with pytest.raises(
        TypeError, match=r"freeze: program must be a torch\.export\.ExportedProgram, as .* returns, but got Sequential"
    ):
        freeze(sequential())


def test_training_layers_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU())
    x = picture()
    want = copy.deepcopy(model)(x).detach()
    serve = freeze(export(model, (x,), strict=False))
    torch.testing.assert_close(serve(x), want)


class Activations(nn.Module):
    """Each as a function, in place and not, before and after a convolution."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(9))

    def forward(self, x):
        functions = [
            F.relu, lambda x: F.relu(x, inplace=True), F.relu6, lambda x: F.silu(x, inplace=True), F.hardswish,
            lambda x: F.leaky_relu(x, 0.2), lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True), lambda x: F.hardtanh(x, -1.0, 2.0),
            lambda x: F.gelu(x, approximate="tanh"),
        ]  # fmt: skip
        for conv, function in zip(self.convs, functions, strict=True):
            x = function(conv(x)) + x
        return F.dropout(x, 0.3, self.training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_of_exported_graphs(layout):
    model, x = Activations().eval(), picture().contiguous(memory_format=LAYOUTS[layout])
    serve = frozen(model, x)
    assert_same(serve(x), model(x).detach())
    assert last_report().fused["pointwise convolutions"] == 9
    with torch.no_grad():  # and the same graph under torch.compile
        compiled = fast(export(model, (x,)).module())
        assert_same(compiled(x), model(x))
    assert fused()["pointwise convolutions"] == 9


def test_results_are_the_callers_own():
    model, x = sequential(), picture()
    serve = frozen(model, x)
    first = serve(x)
    kept = first.clone()
    first.mul_(0)
    assert_same(serve(x), kept)
    second = serve(picture())
    assert second.data_ptr() != first.data_ptr()
