"""BatchNorm over the batches of all processes: torch's SyncBatchNorm on CUDA, and on the CPU, where torch has none, this."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNormCPU(nn.BatchNorm2d):
    """The statistics of all processes by all_reduce, whose gradient is an all_reduce too."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        total = all_reduce(sums)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean.reshape(1, -1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count  # in two passes: no cancellation
        y = centred * torch.rsqrt(variance + self.eps).reshape(1, -1, 1, 1)
        if self.weight is not None:
            y = y * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean += momentum * (mean - self.running_mean)
                self.running_var += momentum * (variance * count / (count - 1) - self.running_var)
        return y.to(input.dtype)


def synchronise(model: nn.Module, device_type: str) -> nn.Module:
    """Every BatchNorm2d of the model over all processes."""
    if device_type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNormCPU
    return model
