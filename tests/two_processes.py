"""Run by torchrun: a step of DistributedDataParallel against one process with the whole batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwconv_ext import FusedDSConv, convert
from examples.synchronised import synchronise

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
plain = nn.Sequential(
    nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12),
    FusedDSConv(12, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
)  # fmt: skip
model = convert(plain).double().train()
assert model.conversion_report.count("FusedDSConv") == 1
x, y = torch.randn(8, 3, 17, 17, dtype=torch.float64), torch.randint(5, (8,))
whole = copy.deepcopy(model)
nn.functional.cross_entropy(whole(x), y).backward()

mine = slice(4 * rank, 4 * rank + 4)
# the statistics in float64 as everything else here
parallel = DistributedDataParallel(synchronise(copy.deepcopy(model), "cpu"))
nn.functional.cross_entropy(parallel(x[mine]), y[mine]).backward()
for (name, p), q in zip(whole.named_parameters(), parallel.module.parameters(), strict=True):
    torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
for (name, a), b in zip(whole.named_buffers(), parallel.module.buffers(), strict=True):
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
whole.eval(), parallel.eval()
with torch.no_grad():
    torch.testing.assert_close(parallel(x[mine]), whole(x)[mine], rtol=1e-6, atol=1e-9)
print("equal", flush=True)
dist.destroy_process_group()
