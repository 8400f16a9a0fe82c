"""Trains MobileNetV1 on CIFAR-10 at 224x224, in channels_last, and keeps the best checkpoint; goes on where it stopped.

    python examples/train_cifar10.py                           # Adam 1e-4, batch 16, 10 epochs
    python examples/train_cifar10.py --data digits --size 64   # scikit-learn's digits: no download, minutes
    python examples/train_cifar10.py --data folder --root DIR  # your own pictures: DIR/train/CLASS/*, DIR/test/CLASS/*
    python examples/train_cifar10.py --resume                  # after an interruption
    torchrun --nproc-per-node=2 examples/train_cifar10.py      # several processes, DistributedDataParallel

The last epoch is in OUT/last.pt, the best in OUT/best.pt.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from common import (
    DATA,
    Problem,
    accuracy,
    add_device,
    classes_of,
    device_of,
    load_checkpoint,
    load_data,
    positive,
    run,
    save_checkpoint,
)  # fmt: skip
from synchronised import synchronise
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from dwconv_ext import unfuse
from dwconv_ext.models import MobileNetV1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DATA), default="cifar10", help="default: %(default)s")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are or go (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/mobilenet_v1"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=10, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=16, help="of a process (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="of Adam (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="pictures are scaled to it (default: %(default)s)")
    parser.add_argument("--width-multiplier", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--limit", type=positive, help="only so many pictures, for a quick look")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, where there is one")
    parser.add_argument("--sync-bn", action="store_true", help="BatchNorm over the batches of all processes")
    parser.add_argument("--compare", action="store_true", help="time an epoch against plain nn modules, and stop")
    add_device(parser)
    return parser.parse_args()


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Rank and number of processes, 0 and 1 without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def loader_of(data: torch.utils.data.Dataset, options: argparse.Namespace, epoch: int, rank: int, world: int) -> DataLoader:
    """The epoch's batches. The order depends on seed and epoch alone: a resumed run goes on as the uninterrupted one."""
    sampler, generator = None, torch.Generator().manual_seed(options.seed * 1000 + epoch)
    if world > 1:
        sampler = DistributedSampler(data, world, rank, seed=options.seed, drop_last=True)
        sampler.set_epoch(epoch)
    drop = len(data) // world >= options.batch_size  # BatchNorm wants no batch of one
    return DataLoader(
        data, options.batch_size, shuffle=sampler is None, sampler=sampler, generator=generator, drop_last=drop,
        num_workers=options.workers,
    )  # fmt: skip


def step(model: nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, amp: bool) -> float:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        loss = nn.functional.cross_entropy(model(x), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def compare(model: nn.Module, data: torch.utils.data.Dataset, options: argparse.Namespace, device: torch.device) -> None:
    """An epoch with FusedDSConv and with plain modules of the same weights, batch by batch in turn."""
    contenders = {"dwconv_ext": model, "plain nn": unfuse(copy.deepcopy(model))}
    optimisers = {name: torch.optim.Adam(m.parameters(), lr=options.lr) for name, m in contenders.items()}
    seconds = dict.fromkeys(contenders, 0.0)
    for i, (x, y) in enumerate(tqdm(loader_of(data, options, 0, 0, 1), desc="comparing", disable=None)):
        x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
        for name, contender in contenders.items():
            begin = time.perf_counter()
            step(contender.train(), optimisers[name], x, y, options.amp)
            if i > 0:  # the first is the warm-up
                seconds[name] += time.perf_counter() - begin
    for name, value in seconds.items():
        print(f"{name:10} {value:8.2f} s of training, the loading of pictures left out")
    if seconds["dwconv_ext"] > 0:
        print(f"speed-up   {seconds['plain nn'] / seconds['dwconv_ext']:8.2f}x")


def main() -> None:
    options = parse()
    device = device_of(options)
    with processes(device) as (rank, world):
        if device.type == "cuda":
            device = torch.device("cuda", rank % torch.cuda.device_count())
        train(options, device, rank, world)


def train(options: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    def say(text: str) -> None:
        if rank == 0:
            tqdm.write(text)

    training = load_data(options.data, options.root, True, options.size, options.limit)
    testing = load_data(options.data, options.root, False, options.size, options.limit)
    classes = classes_of(training)
    config = {
        "num_classes": len(classes), "width_multiplier": options.width_multiplier, "resolution": options.size,
        "data": options.data, "classes": list(classes),
    }  # fmt: skip
    torch.manual_seed(options.seed)
    try:
        model = MobileNetV1(config["num_classes"], options.width_multiplier, options.size)
    except ValueError as error:
        raise Problem(str(error).replace("resolution", "--size").replace("width_multiplier", "--width-multiplier")) from None
    model.to(device, memory_format=torch.channels_last)  # the layout in which a training step is fastest
    if options.compare:
        compare(model, training, options, device)
        return
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    first, best = 0, 0.0
    last = options.out / "last.pt"
    if options.resume and not last.exists():
        say(f"no {last} yet: beginning anew")
    elif options.resume:
        state = load_checkpoint(last)
        if state["config"] != config:
            raise Problem(f"{last} was trained with {state['config']}, which these options are not")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, best = state["epoch"] + 1, state["best"]
        say(f"resumed after epoch {first} of {options.epochs}, best test accuracy {best:.4f}")
    if options.sync_bn:
        synchronise(model, device.type)
    parallel = DistributedDataParallel(model) if world > 1 else model
    for epoch in range(first, options.epochs):
        parallel.train()
        begin, total, batches = time.perf_counter(), 0.0, 0
        bar = tqdm(loader_of(training, options, epoch, rank, world), desc=f"epoch {epoch + 1}", disable=rank > 0 or None)
        for x, y in bar:
            x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
            loss = step(parallel, optimiser, x, y, options.amp)
            total, batches = total + loss, batches + 1
            bar.set_postfix(loss=f"{loss:.3f}")
        seconds = time.perf_counter() - begin
        if rank == 0:
            right, count = accuracy(model, DataLoader(testing, 2 * options.batch_size, num_workers=options.workers), device)
            reached = right / count
            improved = reached > best or epoch == 0
            best = max(best, reached)
            state = {
                "model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch, "best": best,
                "accuracy": reached, "config": config,
            }  # fmt: skip
            if improved:  # before the last: interrupted between the two, the epoch is done again, and this with it
                save_checkpoint(options.out / "best.pt", state)
            save_checkpoint(last, state)
            say(
                f"epoch {epoch + 1}: loss {total / max(batches, 1):.4f}, test accuracy {reached:.4f}"
                f"{' (best, kept)' if improved else ''}, {seconds:.1f} s"
            )
        if world > 1:
            dist.barrier()
    say(f"best test accuracy {best:.4f}: {options.out / 'best.pt'}")


if __name__ == "__main__":
    run(main)
