"""What a trained network takes pictures for: a grid of them, each titled with the truth and the prediction, as a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import add_device, device_of, load_checkpoint, load_data, model_of, positive, run
from torch.utils.data import DataLoader
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mobilenet_v1/best.pt"), help="default: %(default)s")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are or go (default: %(default)s)")
    parser.add_argument("--count", type=positive, default=25, help="pictures in the grid (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("predictions.png"), help="default: %(default)s")
    add_device(parser)
    options = parser.parse_args()
    device = device_of(options)
    checkpoint = load_checkpoint(options.checkpoint)
    model = model_of(checkpoint, options.checkpoint).to(device)
    config = checkpoint["config"]
    data = load_data(config["data"], options.root, False, config["resolution"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))[: options.count].tolist()
    chosen = torch.utils.data.Subset(data, order)
    truths, guesses, sure = [], [], []
    with torch.no_grad():
        for x, y in tqdm(DataLoader(chosen, 16), desc="predicting", disable=None):
            probabilities = model(x.to(device)).softmax(1).cpu()
            truths += y.tolist()
            guesses += probabilities.argmax(1).tolist()
            sure += probabilities.amax(1).tolist()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(1, round(len(order) ** 0.5))
    rows = -(-len(order) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.9 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    names = config["classes"]
    for axis in axes.flat:
        axis.axis("off")
    for axis, index, truth, guess, share in zip(axes.flat, order, truths, guesses, sure, strict=False):
        axis.imshow(data.pictures[index].permute(1, 2, 0).numpy())
        colour = "black" if truth == guess else "#c1440e"
        axis.set_title(f"{names[truth]}\n{names[guess]} {share:.0%}", fontsize=9, color=colour)
    right = sum(t == g for t, g in zip(truths, guesses, strict=True))
    figure.suptitle(f"truth above, prediction below; {right} of {len(order)} right")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=90)
    print(f"{right} of {len(order)} right: {options.output}")


if __name__ == "__main__":
    run(main)
