"""Bytes that the CUDA kernels move, counted on the emulator, over the compulsory ones."""

from __future__ import annotations

import cuda_emulator as emulator
import pytest
import torch

from benchmarks.layers import depthwise_layers, inverted_layers, separable_layers
from benchmarks.traffic import LAYOUTS, measure, measure_inverted, measure_pooled
from benchmarks.training_traffic import measure_training

if emulator.cuda_headers() is None:
    pytest.skip("no cuda_fp16.h: neither a CUDA toolkit nor a CUDA build of torch", allow_module_level=True)

# Bounds of what blocks ask of L2: neighbouring blocks read each other's halo, which memory sends once (docs/design/cuda.md).
# 31x31 at batch 1 must cut its 56x56 images small to fill a GPU; its halo is 15 pixels wide. So must 5x5 at stride 2 at batch 8:
# two rows of outputs read seven of the input's.
DEPTHWISE = [layer for layer in depthwise_layers() if layer.size in ((112, 112), (56, 56)) and layer.kernel != (31, 31)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", DEPTHWISE, ids=lambda layer: layer.name)
def test_depthwise_forward_moves_its_input_and_output_about_once(layer, layout):
    moved = measure(layer, layout, torch.float16, separable=False)
    bound = 1.9 if max(layer.kernel) >= 7 else 1.65 if layer.kernel == (5, 5) and layout == "channels_last" else 1.35
    assert 0.99 <= moved.ratio <= bound, moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", separable_layers((8,)), ids=lambda layer: layer.name)
def test_fused_blocks_move_little_more_than_input_and_output(layer, layout):
    moved = measure(layer, layout, torch.float16, separable=True)
    large = layer.size[0] >= 56
    assert not moved.fused or 0.99 <= moved.ratio <= (1.55 if large else 2.0), moved


def test_channels_last_blocks_that_halve_large_images_are_fused():
    for layer in separable_layers((8,))[1:4:2]:
        assert measure(layer, "channels_last", torch.float16, separable=True).fused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [layer for layer in DEPTHWISE if max(layer.kernel) <= 5], ids=lambda layer: layer.name)
def test_a_depthwise_layer_and_its_mean_are_one_sweep(layer, layout):
    moved = measure_pooled(layer, layout, torch.float16)
    assert "statistics" in moved.plan and 0.99 <= moved.ratio <= 1.75, moved


INVERTED = [layer for layer in inverted_layers((8,)) if layer.expand > 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [layer for layer in INVERTED if layer.size[0] >= 56], ids=lambda layer: layer.name)
def test_inverted_residuals_of_large_images_are_one_kernel_that_moves_little_more_than_input_and_output(layer, layout):
    moved = measure_inverted(layer, layout, torch.float16)
    assert moved.fused and 0.99 <= moved.ratio <= 1.6 and moved.saved > 0.8, moved


@pytest.mark.parametrize("layer", INVERTED[4::4], ids=lambda layer: layer.name)
def test_inverted_residuals_of_small_images_move_less_than_two_kernels(layer):
    moved = measure_inverted(layer, "channels_last", torch.float16)
    assert not moved.fused or moved.saved > 0.5, moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", separable_layers((2,))[:4], ids=lambda layer: layer.name)
def test_training_a_block_moves_less_than_torch_s_modules(layer, layout):
    """Few images make small tiles, hence more halo than in training; each is read from L2."""
    step = measure_training(layer, layout, torch.float16)
    assert "depthwise_norm_backward" in step.plan and 0.45 < step.without_pointwise <= 0.8, step
