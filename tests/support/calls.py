"""Calls of the ops that are right: their arguments by name."""

from __future__ import annotations

import torch
from cases import DTYPES, LAYOUTS

import dwconv_ext
from dwconv_ext._extension import STAGES
from dwconv_ext.ops.arguments import four_paddings

ops = torch.ops.dwconv_ext

# What a call may be without being wrong; the first of each is what the named cases below have.
CHOICES = {
    "dtype": DTYPES,
    "layout": list(LAYOUTS),
    "batch": [2, 1, 0],
    "channels": [4, 1],
    "multiplier": [2, 1],
    "out_channels": [6, 1],
    "stride": [(1, 1), (2, 1)],
    "padding": [(0, 0), (1, 2), (1, 2, 0, 1)],
    "kernel": [3, 1],
    "optional": [True, False],  # whether tensors that may be left out are there
}


def valid(op: str, how: dict) -> dict:
    """A call's arguments by name."""
    dtype, batch, channels = how["dtype"], how["batch"], how["channels"]
    layout = LAYOUTS[how["layout"]]
    wide = torch.promote_types(dtype, torch.float32)
    kernel = how["kernel"]
    pads = four_paddings(how["padding"])
    size = [(n + p - kernel) // s + 1 for n, p, s in zip((8, 7), (sum(pads[:2]), sum(pads[2:])), how["stride"], strict=True)]

    def image(*shape):
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)

    def vector(count, kind=dtype):
        return torch.ones(count, dtype=kind)

    def maybe(t):
        return t if how["optional"] else None

    conv = {"stride": how["stride"], "padding": how["padding"], "dilation": (1, 1)}
    if op.startswith("batch_norm"):
        x = image(max(batch, 1), channels, 8, 7)
        first = {"input": x, "weight": maybe(vector(channels, wide)), "bias": maybe(vector(channels, wide))}
        last = {"eps": 1e-5, "act": "relu", "slope": 0.01}
        if op == "batch_norm_act":
            return first | last
        if op == "batch_norm_statistics":
            return {"input": x}
        statistics = {"mean": vector(channels, wide), "variance": vector(channels, wide)}
        if op == "batch_norm_act_apply":
            return first | statistics | last
        if op == "batch_norm_act_backward_apply":
            statistics |= {f"mean_grad_{name}": vector(channels, wide) for name in ("weight", "bias")}
        return {"grad_output": torch.zeros_like(x), **first, **statistics, **last}
    if op == "depthwise_norm_act_backward":
        x = image(max(batch, 1), channels, 8, 7)
        outputs = channels * how["multiplier"]
        middle = image(len(x), outputs, *size)
        norm = {f"norm_{name}": maybe(vector(outputs, wide)) for name in ("weight", "bias")}
        statistics = {"mean": vector(outputs, wide), "variance": vector(outputs, wide)}
        tensors = {"grad_output": middle, "middle": middle, "input": x, "weight": image(outputs, 1, kernel, kernel), **norm}
        how_ = {"eps": 1e-5, "act": "relu", "slope": 0.01, "output_mask": [True, how["optional"]]}
        return tensors | statistics | conv | how_
    if op == "depthwise_norm_act":
        outputs = channels * how["multiplier"]
        norm = {f"norm_{name}": maybe(vector(outputs, wide)) for name in ("weight", "bias")}
        first = {"input": image(max(batch, 1), channels, 8, 7), "weight": image(outputs, 1, kernel, kernel), **norm}
        return first | conv | {"eps": 1e-5, "act": "relu", "slope": 0.01}
    if op == "max_pool2d":
        window = {"kernel_size": (kernel, kernel), **conv, "padding": [min(pad, kernel // 2) for pad in how["padding"][:2]]}
        return {"input": image(max(batch, 1), channels, 8, 7), **window}
    if op == "layer_norm2d":
        affine = {"weight": maybe(vector(channels, wide)), "bias": maybe(vector(channels, wide))}
        return {"input": image(max(batch, 1), channels, 8, 7), **affine, "eps": 1e-5}
    if op == "global_average_pool":
        return {"input": image(max(batch, 1), channels, 8, 7), "keepdim": how["optional"]}
    if op == "squeeze_excitation":
        weights = {}
        for name, count in (("reduce", 3), ("expand", channels)):
            weights |= {f"{name}_weight": torch.zeros(3, channels, dtype=dtype), f"{name}_bias": maybe(vector(count))}
        return {"input": image(max(batch, 1), channels, 8, 7), **weights, "act": "relu", "gate": "sigmoid"}
    x, isa = image(batch, channels, 8, 7), dwconv_ext._C.selected_isa()
    if op.startswith("depthwise"):
        filters = channels * how["multiplier"]
        w = torch.zeros(filters, 1, kernel, kernel, dtype=dtype)
        if op == "depthwise_conv2d_pack":
            return {"weight": w, "bias": maybe(vector(filters)), "isa": isa, "input_dtype": ""}
        if op == "depthwise_conv2d_packed":
            filter = [filters, kernel, kernel, *how["stride"], *pads, 1, 1]
            packed = ops.depthwise_conv2d_pack(w, maybe(vector(filters)), isa)
            return {"input": x, "packed": packed, "filter": filter, "act": 1, "slope": 0.1}
        if op == "depthwise_conv_transpose2d":
            w = torch.zeros(channels, how["multiplier"], kernel, kernel, dtype=dtype)
            more = {"padding": how["padding"][:2], "output_padding": tuple(s - 1 for s in how["stride"])}
            return {"input": x, "weight": w, "bias": maybe(vector(filters)), **conv, **more, "act": "relu", "slope": 0.01}
        if op in ("depthwise_conv2d", "depthwise_conv2d_pooled"):
            return {"input": x, "weight": w, "bias": maybe(vector(filters)), **conv, "act": "relu", "slope": 0.01}
        return {"grad_output": image(batch, filters, *size), "input": x, "weight": w, **conv, "output_mask": [True, True, True]}
    out_channels = how["out_channels"]
    weights = {
        "dw_weight": torch.zeros(channels, 1, kernel, kernel, dtype=dtype),
        "dw_bias": maybe(vector(channels)),
        "pw_weight": torch.zeros(out_channels, channels, 1, 1, dtype=dtype),
        "pw_bias": maybe(vector(out_channels)),
    }
    residual = {"residual": maybe(image(batch, out_channels, *size))}
    if op == "separable_conv2d":
        return {"input": x, **weights, **conv, "dw_act": "relu", "pw_act": "silu", **residual}
    if op == "separable_conv2d_pack":
        return {**weights, "isa": isa, "input_dtype": ""}
    if op == "pointwise_conv2d_pack":
        return {"weight": weights["pw_weight"], "bias": weights["pw_bias"], "isa": isa, "input_dtype": ""}
    if op == "pointwise_conv2d":
        packed = ops.pointwise_conv2d_pack(weights["pw_weight"], weights["pw_bias"], isa)
        stride = how["stride"][0]
        residual = {"residual": maybe(image(batch, out_channels, *(-(-side // stride) for side in x.shape[2:])))}
        gate = maybe(torch.ones(batch, channels, 1, 1, dtype=dtype))
        shape = {"out_channels": out_channels, "stride": stride, "act": 1}
        return {"input": x, "packed": packed, **shape, "slope": 0.1, **residual, "gate": gate}
    if op == "patch_conv2d":
        patches = torch.zeros(out_channels, channels * kernel * kernel, 1, 1, dtype=dtype)
        filter = [out_channels, kernel, kernel, *how["stride"], *pads, 1, 1]
        packed = ops.pointwise_conv2d_pack(patches, None, isa)
        return {"input": x, "packed": packed, "filter": filter, "act": 1, "slope": 0.1, "channels_last": not how["optional"]}
    if op == "linear":
        packed = ops.pointwise_conv2d_pack(torch.zeros(out_channels, channels, 1, 1, dtype=dtype), None, isa)
        rows = torch.zeros((max(batch, 1), 3, channels), dtype=dtype)
        return {"input": rows, "packed": packed, "out_features": out_channels, "act": 1, "slope": 0.1}
    if op == "interleave_channels":
        return {"first": x, "second": torch.ones_like(x)}
    packed = ops.separable_conv2d_pack(*weights.values(), isa)
    if op == "inverted_residual":
        x, expand = image(batch, 3, 8, 7), torch.zeros(channels, 3, 1, 1, dtype=dtype)
        first = {"expand": ops.pointwise_conv2d_pack(expand, None, isa), "hidden": channels, "expand_act": 1, "expand_slope": 0.0}
        block = [out_channels, kernel, kernel, *how["stride"], *pads, 1, 1, 1, 3]
        return {"input": x, **first, "packed": packed, "block": block, "slopes": [0.0, 0.0], **residual}
    block = [out_channels, kernel, kernel, *how["stride"], *pads, 1, 1, 1, 3]
    return {"input": x, "packed": packed, "block": block, "slopes": [0.0, 0.0], **residual}


OPS = (
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_pooled",
    "depthwise_conv_transpose2d",
    "depthwise_conv2d_pack",
    "depthwise_conv2d_packed",
    "separable_conv2d",
    "separable_conv2d_pack",
    "separable_conv2d_packed",
    "pointwise_conv2d_pack",
    "pointwise_conv2d",
    "inverted_residual",
    "patch_conv2d",
    "linear",
    "interleave_channels",
    "layer_norm2d",
    "max_pool2d",
    "global_average_pool",
    "batch_norm_act",
    "batch_norm_act_backward",
    "squeeze_excitation",
    "depthwise_norm_act",
    "depthwise_norm_act_backward",
    *STAGES,
)
PLAIN = {name: choices[0] for name, choices in CHOICES.items()}
