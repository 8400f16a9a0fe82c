"""Run by torchrun: two processes with half a batch each against one process with the whole batch.

synchronised    a converted model under DistributedDataParallel, with synchronised BatchNorm
ddp, ddp_inner  DistributedDataParallel of a model that this package's backend compiles, compiled around it or within
fsdp            FSDP2, each block compiled
sync_batch_norm torch.nn.SyncBatchNorm as CUDA runs it, on the emulator; of unequal parts of the batch, one of them empty
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from blocks import sequential
from implementations import running
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dwconv_ext import FusedDSConv, convert
from dwconv_ext.compile import last_report
from dwconv_ext.nn import batch_norm_act
from dwconv_ext.nn.batch_norm_act import norm_then_activation
from examples.synchronised import synchronise


def synchronised(mine: slice) -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12),
        FusedDSConv(12, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    model = convert(plain).double().train()
    assert model.conversion_report.count("fused block") == 1
    x, y = torch.randn(8, 3, 17, 17, dtype=torch.float64), torch.randint(5, (8,))
    whole = copy.deepcopy(model)
    cross_entropy(whole(x), y).backward()
    # the statistics in float64 as everything else here
    parallel = DistributedDataParallel(synchronise(copy.deepcopy(model), "cpu"))
    cross_entropy(parallel(x[mine]), y[mine]).backward()
    for (name, p), q in zip(whole.named_parameters(), parallel.module.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), b in zip(whole.named_buffers(), parallel.module.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    whole.eval(), parallel.eval()
    with torch.no_grad():
        torch.testing.assert_close(parallel(x[mine]), whole(x)[mine], rtol=1e-6, atol=1e-9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 3, 2, 1),
            sequential(8, 8),
            sequential(8, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(self.second(x).mean((2, 3)))


def compiled(how: str, mine: slice) -> None:
    """Answers and three steps of SGD; BatchNorms in eval mode, so that half a batch has the whole one's statistics."""
    whole = Net().eval()
    model = copy.deepcopy(whole)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for name in ("first", "second"):
            block = torch.compile(getattr(model, name), backend="dwconv_ext", fullgraph=True)
            setattr(model, name, fully_shard(block, mesh=mesh))
        parallel = fully_shard(model, mesh=mesh)
    elif how == "ddp":
        parallel = torch.compile(DistributedDataParallel(model), backend="dwconv_ext")
    else:
        parallel = DistributedDataParallel(torch.compile(model, backend="dwconv_ext"))
    x, y = torch.randn(8, 3, 17, 17), torch.randint(5, (8,))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (whole, model)]
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(parallel(x[mine]), whole(x)[mine], rtol=1e-4, atol=1e-5)
            assert step or last_report().fused["blocks"] == (1 if how == "fsdp" else 2)
        for net, optimizer, part in zip((whole, parallel), optimizers, (slice(None), mine), strict=True):
            optimizer.zero_grad()
            cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        q = q.full_tensor() if how == "fsdp" else q
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def sync_batch_norm(rank: int) -> None:
    batch_norm_act.DEVICES = ("cpu",)  # the emulator's tensors
    for sizes in ((5, 3), (8, 0)):
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], 8)
        x, grad = torch.randn(2, 8, 6, 5, 4).unbind()
        whole = nn.BatchNorm2d(6, momentum=None)
        nn.init.normal_(whole.weight), nn.init.normal_(whole.bias)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
        inputs = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        with running("emulator") as implementation:
            y = norm_then_activation(model, inputs[1], "silu", 0.0)
            y.backward(grad[mine])
            ran = {launch["pass"] for launch in implementation.emulator.launches()}
        assert bool(ran) == (len(y) > 0) and ran <= {"statistics", "forward", "grad_sums", "backward", *JOINS}, ran
        want = nn.functional.silu(whole(inputs[0]))
        want.backward(grad)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(y, want[mine], **close)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad[mine], **close)
        for got, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            dist.all_reduce(got.grad)
            torch.testing.assert_close(got.grad, wanted.grad, **close)
        for got, wanted in zip(model.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(got, wanted, **close)


JOINS = ("join_statistics", "join_grad_sums")
dist.init_process_group("gloo")
torch.manual_seed(0)
rank = dist.get_rank()
mine = slice(4 * rank, 4 * rank + 4)
if sys.argv[1] == "synchronised":
    synchronised(mine)
elif sys.argv[1] == "sync_batch_norm":
    sync_batch_norm(rank)
else:
    compiled(sys.argv[1], mine)
print("equal", flush=True)
dist.destroy_process_group()
