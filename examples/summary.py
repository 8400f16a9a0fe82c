"""The layer table of a network: output shape, parameters, multiply-adds, and the kernel of ours that runs it."""

from __future__ import annotations

import argparse

import torch
from common import Problem, add_device, device_of, positive, run
from tqdm import tqdm

from dwconv_ext import convert, cost
from dwconv_ext.models import MobileNetV1, MobileNetV2


def build(name: str, width_multiplier: float, resolution: int) -> torch.nn.Module:
    if name == "mobilenet_v1":
        return MobileNetV1(width_multiplier=width_multiplier, resolution=resolution)
    if name == "mobilenet_v2":
        return MobileNetV2(width_multiplier=width_multiplier)
    import torchvision

    try:
        return convert(torchvision.models.get_model(name, weights=None))
    except ValueError as error:
        raise Problem(f"--model {name}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenet_v1", help="mobilenet_v1, mobilenet_v2, or one of torchvision's, converted")
    parser.add_argument("--width-multiplier", type=float, default=1.0, help="of the first two (default: %(default)s)")
    parser.add_argument("--resolution", type=positive, default=224, help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    add_device(parser)
    options = parser.parse_args()
    device = device_of(options)
    with tqdm(total=2, desc="building", disable=None, leave=False) as bar:
        try:
            model = build(options.model, options.width_multiplier, options.resolution).to(device).eval()
        except ValueError as error:
            raise Problem(str(error)) from None
        bar.update()
        table = cost.table(model, (options.batch, 3, options.resolution, options.resolution))
        bar.update()
    print(table)


if __name__ == "__main__":
    run(main)
