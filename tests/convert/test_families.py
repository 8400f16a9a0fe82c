"""convert and unfuse on whole models: every family of torchvision with depthwise convolutions, and a choice of timm's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from cases import LAYOUTS
from torch import nn

from dwconv_ext import convert, unfuse
from dwconv_ext.compile import last_report
from dwconv_ext.convert.replace import is_depthwise

# One of each family that has depthwise convolutions; test_every_torchvision_family (slow) looks whether one is missing.
TORCHVISION = {
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "convnext_tiny": 64,
    "maxvit_t": 224,
    "lraspp_mobilenet_v3_large": 64,
    "deeplabv3_mobilenet_v3_large": 64,
}
TIMM = [
    "mobilenetv1_100", "mobilenetv2_050", "tf_mobilenetv3_small_minimal_100", "mobilenetv4_conv_small", "efficientnet_lite0",
    "tf_efficientnet_lite0", "mnasnet_small", "fbnetc_100", "lcnet_050", "mixnet_s", "rexnet_100", "ghostnet_050",
    "convnext_atto", "inception_next_atto", "edgenext_xx_small", "repvit_m0_9", "mobileone_s0", "efficientvit_b0", "xception41",
]  # fmt: skip
# With all of them this file takes some ten minutes where the processor has no bfloat16.
BFLOAT16 = ("mobilenet_v2", "mobilenet_v3_small", "mobilenetv1_100", "repvit_m0_9", "mobilenetv4_conv_small")


def torchvision_model(name):
    if name.startswith(("lraspp", "deeplab")):
        return torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return torchvision.models.get_model(name, weights=None)


def build(name):
    """A model with weights and running statistics that make every layer matter, and an input."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        model, size = torchvision_model(name), TORCHVISION[name]
    else:
        model = timm.create_model(name, pretrained=False)
        size = 64
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        for kind in ("gamma", "layer_scale"):  # ConvNeXt's 1e-6 would hide the depthwise branch
            if isinstance(getattr(module, kind, None), nn.Parameter):
                nn.init.constant_(getattr(module, kind), 0.5)
    return model.eval(), torch.randn(2, 3, size, size)


def tensor(output):
    return output["out"] if isinstance(output, dict) else output


def close(ours, plain, limit):
    """Within limit of the largest output; each op's every element is judged in test_depthwise.py and test_separable.py."""
    ours, plain = tensor(ours).float(), tensor(plain).float()
    assert (ours - plain).abs().max() <= limit * plain.abs().max()


def check_model(name):
    model, x = build(name)
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    converted = convert(model)
    assert list(converted.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, converted.parameters(), strict=True))
    depthwise = [m for m in model.modules() if is_depthwise(m)]
    entries = converted.conversion_report.entries
    assert depthwise and len(entries) == len(depthwise)
    assert not any(e.became == "left alone" for e in entries), converted.conversion_report
    with torch.no_grad():
        exact = model(x)
        for layout in LAYOUTS.values():
            close(converted(x.contiguous(memory_format=layout)), exact, 1e-4)
        if name in BFLOAT16:
            narrow, plain = copy.deepcopy(converted).bfloat16(), copy.deepcopy(model).bfloat16()
            error = (tensor(plain(x.bfloat16())).float() - tensor(exact)).abs().max() / tensor(exact).abs().max()
            close(narrow(x.bfloat16()), exact, 2 * error + 2**-8)
    plain = unfuse(converted)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    return model, converted, x


def check_training_step(model, converted, x):
    """Gradients of every parameter, in training mode.

    In float64: in float32 an activation within rounding of a ReLU's kink falls to the other side now and then, in the plain
    model as well, and moves gradients by some percent.
    """

    def gradients(model):
        model = copy.deepcopy(model).double().train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in ("StochasticDepth", "DropPath"):
                module.eval()
        tensor(model(x.double())).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for ours, plain in zip(gradients(converted), gradients(model), strict=True):
        assert (ours - plain).abs().max() <= 1e-9 * plain.abs().max() + 1e-9


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    check_model(name)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    check_model(name)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet0_5", "convnext_atto", "mixnet_s"])
def test_gradients_in_training(name):
    model, converted, x = check_model(name)
    check_training_step(model, converted, x)


@pytest.mark.slow
def test_every_torchvision_family():
    def family(name):
        return torchvision.models.get_model_builder(name).__module__

    names = [name for name in torchvision.models.list_models() if not name.startswith("quantized")]
    have = set()
    for module, name in {family(name): name for name in reversed(names)}.items():
        options = {"weights": None}
        if module.split(".")[2] in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if any(is_depthwise(m) for m in torchvision.models.get_model(name, **options).modules()):
            have.add(module)
    have = {f for f in have if ".detection." not in f}  # detectors: their backbones are here
    assert have == {family(name) for name in TORCHVISION}


def test_what_is_fused_in_well_known_models():
    """In eager mode by convert, where containers are sequential; in whole graphs by the backend, however they are written."""
    assert convert(torchvision_model("mobilenet_v2")).conversion_report.count("fused block") == 17
    assert convert(timm.create_model("mobilenetv1_100")).conversion_report.count("fused block") == 0
    for model, blocks in ((torchvision_model("mobilenet_v2"), 17), (timm.create_model("mobilenetv1_100"), 13)):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model.eval(), backend="dwconv_ext")(torch.randn(1, 3, 64, 64))
        assert last_report().fused["blocks"] == blocks
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(torchvision_model("efficientnet_b0").eval(), backend="dwconv_ext")(torch.randn(1, 3, 64, 64))
    refused = last_report().refused
    assert len(refused) == 16 and all("2 users" in r.why and "torchvision" in r.line for r in refused)
