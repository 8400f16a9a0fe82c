"""A depthwise filter bank over a sound, whole and streamed in blocks, which give the same bits; and the spectrograms.

Each channel of a WAV is split into bands by causal band-pass filters: one depthwise convolution with a channel multiplier.
Without --sound the script makes one: a sweep on the left, a chord with clicks on the right. It writes the band of --band as a
WAV too, to be heard.
"""

from __future__ import annotations

import argparse
import math
import wave
from pathlib import Path

import numpy as np
import torch
from common import Problem, positive, run
from torch import Tensor
from tqdm import tqdm

from dwconv_ext import DepthwiseConv1d

TAPS = 255


def synthesised(rate: int, seconds: float) -> Tensor:
    """(2, samples): a sweep from 50 Hz to 7 kHz, and a chord that fades, with clicks."""
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate  # phases are thousands of turns
    growth = math.log(7000 / 50) / seconds
    sweep = torch.sin(2 * math.pi * 50 / growth * (torch.exp(growth * t) - 1))
    chord = sum(torch.sin(2 * math.pi * note * t) for note in (261.63, 329.63, 392.0)) / 3 * torch.exp(-t)
    chord[:: rate // 2] += 1
    return 0.5 * torch.stack((sweep, chord)).float()


def read(path: Path) -> tuple[Tensor, int]:
    """(channels, samples) between -1 and 1, and the rate."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise Problem(f"{path} must have 16-bit samples, but has {8 * file.getsampwidth()} bits")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            rate = file.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise Problem(f"{path} is no WAV file that can be read ({error})") from None
    if len(samples) <= TAPS:
        raise Problem(f"{path} must have more than {TAPS} samples, but has {len(samples)}")
    return torch.from_numpy(samples.T.astype(np.float32)) / 32768, rate


def write(path: Path, sound: Tensor, rate: int) -> None:
    samples = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).t().contiguous().numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def edges_of(bands: int, rate: int) -> Tensor:
    """Of bands of the same width in octaves, from 60 Hz to 0.45 of the rate."""
    return torch.logspace(math.log10(60), math.log10(0.45 * rate), bands + 1)


def band_passes(edges: Tensor, rate: int) -> Tensor:
    """(bands, 1, TAPS): windowed differences of two ideal low-passes (Oppenheim and Schafer, chapter 7)."""
    n = torch.arange(TAPS) - (TAPS - 1) / 2
    window = torch.hamming_window(TAPS, periodic=False)
    low_passes = 2 * edges[:, None] / rate * torch.sinc(2 * edges[:, None] / rate * n) * window
    return (low_passes[1:] - low_passes[:-1]).unsqueeze(1)


def filter_bank(channels: int, edges: Tensor, rate: int) -> DepthwiseConv1d:
    """Band b of channel c is its output c * bands + b."""
    bands = len(edges) - 1
    bank = DepthwiseConv1d(channels, channels * bands, TAPS, bias=False, causal=True)
    with torch.no_grad():
        bank.weight.copy_(band_passes(edges, rate).repeat(channels, 1, 1))
    return bank.requires_grad_(False)


def streamed(bank: DepthwiseConv1d, sound: Tensor, block: int) -> Tensor:
    """As it would come from a microphone: a block after the other, with the samples before it as the state."""
    state, outputs = torch.zeros(1, len(sound), TAPS - 1), []
    for piece in tqdm(sound.unsqueeze(0).split(block, dim=2), desc="streaming", disable=None):
        output, state = bank(piece, state)
        outputs.append(output)
    return torch.cat(outputs, 2)[0]


def draw(path: Path, sound: Tensor, filtered: Tensor, edges: Tensor, band: int, rate: int) -> None:
    """A column a channel: the sound, one band of it, and the energy of all bands over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    channels, bands = len(sound), len(edges) - 1
    figure, axes = pyplot.subplots(3, channels, figsize=(6 * channels, 8), squeeze=False, layout="constrained")
    by_band = filtered.unflatten(0, (channels, bands))
    limits = {"vmin": -120, "vmax": -20}
    for c in range(channels):
        for axis, signal, title in (
            (axes[0, c], sound[c], f"channel {c}"),
            (axes[1, c], by_band[c, band], f"band {band}: {edges[band]:.0f} to {edges[band + 1]:.0f} Hz"),
        ):
            noise = 1e-7 * np.random.default_rng(0).standard_normal(len(signal))  # silence has no logarithm
            axis.specgram(signal.numpy() + noise, NFFT=512, Fs=rate, noverlap=384, cmap="magma", **limits)
            axis.set(title=title, xlabel="s", ylabel="Hz")
        step = max(len(sound[c]) // 200, 1)
        energy = by_band[c, :, : len(sound[c]) // step * step].unflatten(1, (-1, step)).square().mean(2)
        seconds = len(sound[c]) / rate
        decibels, extent = 10 * torch.log10(energy + 1e-10), (0, seconds, -0.5, bands - 0.5)
        picture = axes[2, c].imshow(decibels.numpy(), "magma", aspect="auto", origin="lower", vmin=-80, extent=extent)
        axes[2, c].set(title="energy of each band", xlabel="s", ylabel="band")
        figure.colorbar(picture, ax=axes[2, c], label="dB")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sound", type=Path, help="a WAV file with 16-bit samples (default: one that is made here)")
    parser.add_argument("--bands", type=positive, default=16, help="of each channel (default: %(default)s)")
    parser.add_argument("--band", type=int, default=9, help="that is drawn and written (default: %(default)s)")
    parser.add_argument("--block", type=positive, default=480, help="samples that come at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("filter_bank"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if not 0 <= options.band < options.bands:
        raise Problem(f"--band must be one of 0 to {options.bands - 1}, but got {options.band}")
    sound, rate = read(options.sound) if options.sound else (synthesised(16000, 3), 16000)
    edges = edges_of(options.bands, rate)
    bank = filter_bank(len(sound), edges, rate)
    whole = bank(sound.unsqueeze(0))[0]
    same = torch.equal(streamed(bank, sound, options.block), whole)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.sound is None:
        write(options.output / "sound.wav", sound, rate)
    write(options.output / "band.wav", whole.unflatten(0, (len(sound), -1))[:, options.band], rate)
    draw(options.output / "spectrograms.png", sound, whole, edges, options.band, rate)
    print(f"{len(sound)} channels, {sound.shape[1]} samples, {options.bands} bands: {options.output}")
    print(f"streamed in blocks of {options.block}: {'the same bits' if same else 'NOT the same bits'} as the whole")
    if not same:
        raise Problem("the stream differs from the whole")


if __name__ == "__main__":
    run(main)
