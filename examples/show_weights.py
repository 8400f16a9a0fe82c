"""The depthwise filters of a trained network as pictures: a row a layer, red positive, blue negative, each scaled by itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import add_device, device_of, load_checkpoint, model_of, positive, run
from tqdm import tqdm

from dwconv_ext import DepthwiseConv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mobilenet_v1/best.pt"), help="default: %(default)s")
    parser.add_argument("--filters", type=positive, default=24, help="of each layer, the first so many (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("weights.png"), help="default: %(default)s")
    add_device(parser)
    options = parser.parse_args()
    device_of(options)
    model = model_of(load_checkpoint(options.checkpoint), options.checkpoint)
    layers = {name: m.weight.detach()[:, 0] for name, m in model.named_modules() if isinstance(m, DepthwiseConv2d)}

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(layers), options.filters, figsize=(2.2 + 0.42 * options.filters, 0.5 * len(layers) + 0.6), squeeze=False
    )
    for row, (name, filters) in zip(axes, tqdm(layers.items(), desc="drawing", disable=None), strict=True):
        for axis in row:
            axis.axis("off")
        for axis, weights in zip(row, filters, strict=False):
            limit = max(weights.abs().max().item(), torch.finfo(weights.dtype).tiny)
            axis.imshow(weights.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        row[0].text(-0.4, 0.5, f"{name}  {len(filters)} ch.", transform=row[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(f"the first {options.filters} filters of each depthwise layer")
    figure.subplots_adjust(left=2.1 / figure.get_figwidth(), right=0.99, top=1 - 0.5 / figure.get_figheight(), bottom=0.01)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=100)
    print(f"{len(layers)} layers: {options.output}")


if __name__ == "__main__":
    run(main)
