"""What the example scripts share: the data sets, checkpoints, and errors that say what to do."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from dwconv_ext.models import MobileNetV1

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Problem(Exception):
    """Something the user can mend: printed without a traceback."""


def run(main: Any) -> None:
    try:
        main()
    except Problem as problem:
        sys.exit(f"{Path(sys.argv[0]).name}: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


class Pictures(Dataset):
    """Pictures (3, h, w) as uint8 with their labels; each is scaled to size x size and normalised when asked for."""

    def __init__(self, pictures: Any, labels: Tensor, classes: tuple[str, ...], size: int, mean: Any, std: Any) -> None:
        self.pictures, self.labels, self.classes, self.size = pictures, labels, classes, size
        self.mean, self.std = (torch.tensor(v).reshape(3, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures[index].float().unsqueeze(0) / 255
        picture = F.interpolate(picture, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)[0]
        return (picture - self.mean) / self.std, int(self.labels[index])


def _cifar10(root: Path, train: bool, size: int) -> Pictures:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=train, download=not (root / CIFAR10.base_folder).is_dir())
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise Problem(
            f"CIFAR-10 in {root} is missing or corrupt, and could not be downloaded ({error}). "
            f"Delete {root / CIFAR10.base_folder} to download it again, or use --data digits, which needs no network."
        ) from None
    pictures = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Pictures(pictures, torch.tensor(data.targets), CIFAR10_CLASSES, size, CIFAR10_MEAN, CIFAR10_STD)


def _digits(root: Path, train: bool, size: int) -> Pictures:
    """scikit-learn's 1,797 handwritten digits, every fifth held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = (torch.from_numpy(data.images) * (255 / 16)).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    held_out = torch.arange(len(pictures)) % 5 == 0
    chosen = ~held_out if train else held_out
    labels = torch.from_numpy(data.target)
    return Pictures(pictures[chosen], labels[chosen], tuple("0123456789"), size, (0.3,) * 3, (0.35,) * 3)


class Files(Dataset):
    """Picture files in any format that Pillow reads, as uint8 (3, h, w)."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        try:
            with Image.open(self.paths[index]) as picture:
                return pil_to_tensor(picture.convert("RGB"))
        except OSError as error:
            raise Problem(f"{self.paths[index]} is no picture, or is corrupt: {error}") from None


def _folder(root: Path, train: bool, size: int) -> Pictures:
    """Pictures by class: root/train/CLASS/* and root/test/CLASS/*."""
    from torchvision.datasets import ImageFolder

    here = root / ("train" if train else "test")
    try:
        found = ImageFolder(here)
    except OSError as error:
        raise Problem(f"--data folder wants pictures in {here}/CLASS/: {error}") from None
    files = Files([path for path, _ in found.samples])
    return Pictures(files, torch.tensor(found.targets), tuple(found.classes), size, CIFAR10_MEAN, CIFAR10_STD)


DATA = {"cifar10": _cifar10, "digits": _digits, "folder": _folder}


def load_data(name: str, root: Path, train: bool, size: int, limit: int | None = None) -> Dataset:
    """Of what `name` says in DATA the pictures to train on or those to test on; `limit`: so many of them, from all over."""
    data = DATA[name](root, train, size)
    return data if limit is None or limit >= len(data) else Subset(data, [i * len(data) // limit for i in range(limit)])


def classes_of(data: Dataset) -> tuple[str, ...]:
    return (data.dataset if isinstance(data, Subset) else data).classes


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: an interruption leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Problem(f"there is no checkpoint {path}: train one first, python examples/train_cifar10.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "config"} - set(state)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise Problem(f"{path} is no checkpoint of train_cifar10.py, or is corrupt: {str(error).splitlines()[0]}") from None
    return state


def model_of(checkpoint: dict[str, Any], path: Path) -> MobileNetV1:
    config = checkpoint["config"]
    model = MobileNetV1(config["num_classes"], config["width_multiplier"], config["resolution"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise Problem(f"{path} does not fit the model it describes: {str(error).splitlines()[0]}") from None
    return model.eval()


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")


def device_of(options: argparse.Namespace) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda: torch sees no CUDA device")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return torch.device(name)


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, device: torch.device) -> tuple[int, int]:
    """Right and all."""
    model.eval()
    right = count = 0
    for x, y in loader:
        right += (model(x.to(device, memory_format=torch.channels_last)).argmax(1).cpu() == y).sum().item()
        count += len(y)
    return right, count


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
