"""A look at dwconv_ext on real data: photographs through a filter bank, handwritten digits through FusedDSConv.

Three things, in well under three minutes on two cores:

1. scikit-learn's two sample photographs through a bank of depthwise filters, equal to nn.Conv2d's result and how much faster;
2. a small network of FusedDSConv blocks trained on scikit-learn's handwritten digits, and its accuracy on unseen ones;
3. the trained network's inference time, as it stands, against the same modules unfused.

The pictures go to one PNG.
"""

from __future__ import annotations

import argparse
import timeit
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from tqdm import tqdm

from dwconv_ext import FusedDSConv, depthwise_conv2d, unfuse

FILTERS = ("blur", "sharpen", "edges", "emboss")


def filter_bank(size: int = 7) -> Tensor:
    """Four classic filters, (4, size, size): Gaussian blur, unsharp mask, Laplacian of Gaussian, emboss (a directional slope)."""
    axis = torch.arange(size) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    square = (x**2 + y**2) / (2 * (size / 5) ** 2)
    blur = torch.exp(-square)
    blur = blur / blur.sum()
    impulse = torch.zeros(size, size)
    impulse[size // 2, size // 2] = 1
    edges = (square - 1) * torch.exp(-square)
    edges = edges - edges.mean()
    emboss = (x + y) * torch.exp(-square)
    return torch.stack([blur, 3 * impulse - 2 * blur, -edges, emboss])


def in_turn(functions: dict[str, callable], rounds: int = 9) -> dict[str, float]:
    """Median milliseconds a call, the functions timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()  # what the one before left in the caches does not count
            times[name].append(timeit.timeit(function, number=5) / 5 * 1e3)
    return {name: median(values) for name, values in times.items()}


def filter_photographs() -> tuple[Tensor, Tensor, dict[str, float]]:
    """The photographs (2, 3, H, W) in [0, 1], the filtered ones (2, 12, H, W), and the times."""
    photos = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float().contiguous() / 255
    weight = filter_bank().repeat(3, 1, 1).unsqueeze(1)  # every colour through every filter: channel multiplier 4
    padding = weight.shape[-1] // 2

    def ours(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, padding=padding)

    def theirs(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=padding, groups=3)

    filtered = ours(photos)
    torch.testing.assert_close(filtered, theirs(photos), rtol=1e-4, atol=1e-5)
    print(f"photographs: {tuple(photos.shape)} through {len(FILTERS)} 7x7 filters a colour: equal to nn.Conv2d's result")
    channels_last = photos.contiguous(memory_format=torch.channels_last)
    times = in_turn(
        {
            "nn.Conv2d NCHW": lambda: theirs(photos),
            "nn.Conv2d channels_last": lambda: theirs(channels_last),
            "dwconv_ext NCHW": lambda: ours(photos),
            "dwconv_ext channels_last": lambda: ours(channels_last),
        }
    )
    return photos, filtered, times


class DigitNet(nn.Module):
    """A MobileNet in miniature for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(FusedDSConv(32, 64), FusedDSConv(64, 128, stride=2), FusedDSConv(128, 128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def train_digits(epochs: int, seed: int = 0) -> tuple[DigitNet, float, Tensor, Tensor]:
    """The trained network, its accuracy on the fifth of the digits it never saw, those digits and what it takes them for."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    model = DigitNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    batches = (len(training) + 63) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=epochs * batches)
    with tqdm(total=epochs * batches, desc="training on digits", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for batch in training[torch.randperm(len(training))].split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        guesses = model(images[held_out]).argmax(1)
    accuracy = (guesses == labels[held_out]).float().mean().item()
    print(f"digits: {len(training)} to learn from, {epochs} epochs; {accuracy:.1%} of {len(held_out)} unseen ones right")
    return model, accuracy, images[held_out], guesses


@torch.no_grad()
def time_network(model: DigitNet) -> dict[str, float]:
    plain = unfuse(model)  # plain torch modules in the blocks' places, and the same weights
    x = torch.rand(64, 1, 32, 32)  # larger pictures, so that the convolutions weigh
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    print("digits: the network gives the same with its blocks unfused into torch modules")
    return in_turn({"torch modules": lambda: plain(x), "FusedDSConv": lambda: model(x)})


def print_times(title: str, times: dict[str, float]) -> None:
    slowest = next(iter(times.values()))
    for name, value in times.items():
        print(f"  {title}: {name:26} {value:8.3f} ms  {slowest / value:5.2f}x")


def as_picture(filtered: Tensor, name: str) -> Tensor:
    """(3, H, W) to (H, W, 3) in [0, 1]; filters that sum to zero give results around zero, shown around grey."""
    if name in ("edges", "emboss"):
        filtered = 0.5 + filtered / (4 * filtered.std())
    return filtered.clamp(0, 1).permute(1, 2, 0)


def draw(
    path: Path, photos: Tensor, filtered: Tensor, groups: dict[str, dict[str, float]], digits: Tensor, guesses: Tensor
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(15, 9.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    axes = top.subplots(len(photos), 1 + len(FILTERS))
    for row, photo in enumerate(photos):
        pictures = [
            photo.permute(1, 2, 0),
            *(as_picture(filtered[row, i :: len(FILTERS)], name) for i, name in enumerate(FILTERS)),
        ]
        for axis, picture, name in zip(axes[row], pictures, ("photograph", *FILTERS), strict=True):
            axis.imshow(picture.numpy())
            axis.set_title(name)
            axis.axis("off")
    *charts, pictured = bottom.subfigures(1, 3, width_ratios=(2, 2, 1))
    for chart, (title, times) in zip(charts, groups.items(), strict=True):
        axis = chart.subplots()
        names = list(times)
        colours = ["#c1440e" if "dwconv" in n or "Fused" in n else "#8a8a8a" for n in names]
        bars = axis.barh(names, [times[n] for n in names], color=colours)
        axis.bar_label(bars, [f"{times[n]:.2f} ms" for n in names], padding=4)
        axis.set_xlim(0, 1.25 * max(times.values()))
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel("milliseconds a call (shorter is faster)")
    for i, axis in enumerate(pictured.subplots(4, 4).flat):
        axis.imshow(digits[i, 0].numpy(), cmap="gray_r")
        axis.set_title(str(int(guesses[i])), fontsize=9, pad=1)
        axis.axis("off")
    figure.suptitle(
        "dwconv_ext: two photographs through a 7x7 depthwise filter bank; digits never seen, with the network's guesses"
    )
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits (default: %(default)s)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs: must be at least 1, got {options.epochs}")
    photos, filtered, photo_times = filter_photographs()
    print_times("photographs", photo_times)
    model, _, digits, guesses = train_digits(options.epochs)
    network_times = time_network(model)
    print_times("network", network_times)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    groups = {"filter bank over both photographs": photo_times, "the digits' network, 64 pictures of 32x32": network_times}
    draw(options.output, photos, filtered, groups, digits, guesses)
    print(f"pictures: {options.output}")


if __name__ == "__main__":
    main()
