"""Converted and compiled models do what any torch model does: export, channels_last, autocast, forked workers, DDP, FSDP2."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from blocks import randomised, sequential
from torch import nn

from dwconv_ext import convert

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair():
    """A MobileNetV2 of five blocks, each kind among them: what compiles one of them compiles all."""
    torch.manual_seed(0)
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2], [6, 64, 1, 2]]
    plain = randomised(torchvision.models.MobileNetV2(10, inverted_residual_setting=settings))
    for module in plain.modules():  # BatchNorms near the identity keep the layers' outputs in range
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            nn.init.normal_(module.running_mean, std=0.1)
    return plain, convert(plain)


def close(a, b, limit=1e-4):
    assert (a - b).abs().max() <= limit * b.abs().max()


def test_compile_fullgraph(pair):
    plain, converted = pair
    torch._dynamo.reset()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(torch.compile(converted, fullgraph=True, backend="aot_eager")(x), plain(x))


def test_compile_fullgraph_training(pair):
    plain, converted = (copy.deepcopy(m).train() for m in pair)
    for model in (plain, converted):
        model.classifier[0].p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 64, 64)
    compiled(x).square().mean().backward()
    plain(x).square().mean().backward()
    for (name, _), q in zip(plain.named_parameters(), converted.named_parameters(), strict=True):
        assert q[1].grad is not None, name
    close(converted.classifier[1].weight.grad, plain.classifier[1].weight.grad, 1e-2)


def test_export_and_reload(pair):
    plain, converted = pair
    x = torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(converted, (x,), dynamic_shapes=dynamic), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            close(loaded(x), plain(x))


@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize("how", ("plain", "converted"))
def test_ahead_of_time_inductor(how, tmp_path):
    """The plain model as well: the package is loaded, and leaves it alone."""
    plain = sequential(16, 16).eval()
    model = convert(plain) if how == "converted" else plain
    x, batch = torch.randn(2, 16, 9, 9), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for n in (2, 5):
            x = torch.randn(n, 16, 9, 9)
            close(loaded(x), plain(x))


def test_export_of_a_compiled_model():
    """It is the model's own graph that is exported."""
    plain, x = sequential(16, 16).eval(), torch.randn(2, 16, 9, 9)
    compiled = torch.compile(plain, backend="dwconv_ext")
    with torch.no_grad():
        close(compiled(x), plain(x))
        exported = torch.export.export(compiled, (x,))
        close(exported.module()(x), plain(x))
    assert not any("dwconv_ext" in str(node.target) for node in exported.graph.nodes)


def steps(model, x, y, count, autocast=False, layout=torch.contiguous_format):
    """The losses of a few steps of SGD."""
    model = copy.deepcopy(model).train().to(memory_format=layout)
    model.classifier[0].p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=layout)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def batch(n=8, size=64):
    random = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, size, size, generator=random), torch.randint(10, (n,), generator=random)


def test_channels_last_training(pair):
    plain, converted = pair
    x, y = batch()
    ours, model = steps(converted, x, y, 4, layout=torch.channels_last)
    theirs, _ = steps(plain, x, y, 4, layout=torch.channels_last)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4) and ours == pytest.approx(theirs, rel=0.1)
    depthwise = model.features[3].conv[1][0]
    assert depthwise(torch.randn(1, 144, 8, 8).contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_autocast_training_falls_like_the_plain_models(pair):
    plain, converted = pair
    x, y = batch()
    ours, _ = steps(converted, x, y, 8, autocast=True)
    theirs, _ = steps(plain, x, y, 8, autocast=True)
    assert ours[0] == pytest.approx(theirs[0], rel=0.05)
    assert ours[-1] < 0.85 * ours[0] and theirs[-1] < 0.85 * theirs[0]
    assert ours == pytest.approx(theirs, rel=0.25)


class Evaluated(torch.utils.data.Dataset):
    """Runs the model in the worker, as a teacher's labels are made."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.x[index : index + 1])[0]


def test_forked_workers_after_use(pair):
    _, converted = pair
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        want = converted(x)  # the kernels' threads have run in this process
    loader = torch.utils.data.DataLoader(
        Evaluated(converted, x), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    close(torch.cat(list(loader)), want)


def test_sync_batchnorm_conversion(pair):
    _, converted = pair
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = converted(x)
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(converted))
        assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
        close(synced(x), want)


@pytest.mark.parametrize("how", ("synchronised", "ddp", "ddp_inner", "fsdp", "sync_batch_norm"))
def test_two_processes_are_one_with_the_whole_batch(how):
    """Gradients, steps and running statistics over gloo: see two_processes.py."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(ROOT / "tests/support/two_processes.py"), how),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / folder) for folder in ("", "tests/support", "tools"))]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2
