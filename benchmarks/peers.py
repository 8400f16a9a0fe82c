"""The other runtimes, each a function of nothing that computes one layer; those not installed are left out, with a word."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

OPSET = 17


def available(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> list[str]:
    return [p for p in ("onnx", "onnxruntime", "openvino") if not available(p)]


def onnx_model(x: Tensor, convolutions: list[dict]) -> bytes:
    """A chain of Conv (and Relu where asked) nodes: {weight, bias, stride, padding, groups, relu}, all float32."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, name = [], [], "x"
    for i, conv in enumerate(convolutions):
        operands = [name, f"w{i}"]
        constants.append(numpy_helper.from_array(conv["weight"].detach().numpy(), f"w{i}"))
        if conv["bias"] is not None:
            operands.append(f"b{i}")
            constants.append(numpy_helper.from_array(conv["bias"].detach().numpy(), f"b{i}"))
        name = f"y{i}"
        pads = [*conv["padding"], *conv["padding"]]
        nodes.append(
            helper.make_node(
                "Conv", operands, [name], pads=pads, strides=[conv["stride"]] * 2, group=conv["groups"], dilations=[1, 1]
            )
        )
        if conv["relu"]:
            nodes.append(helper.make_node("Relu", [name], [f"r{i}"]))
            name = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9
    return model.SerializeToString()


def onnx_runtime(x: Tensor, model: bytes | str, threads: int) -> Callable[[], numpy.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


@cache
def openvino_core() -> Any:
    """One for the process: the CPU plugin sets a signal stack when it is loaded and the one before when it is unloaded.

    Of two plugins whose lives overlap, the second brings back a stack that the first has unmapped, and the next signal with a
    handler (a DataLoader's child that ends) is a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


def openvino(x: Tensor, model: bytes | str, threads: int, dtype: torch.dtype) -> Callable[[], numpy.ndarray]:
    import openvino as ov

    core = openvino_core()
    precision = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}[dtype]
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run(_memory: Tensor = x) -> numpy.ndarray:  # which nothing else need hold
        request.infer()
        return request.get_output_tensor().data

    return run


def of_model(x: Tensor, model: bytes, threads: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """ONNX Runtime and OpenVINO on a NCHW input, as far as they are installed and have the dtype."""
    found = {}
    if available("onnxruntime") and dtype == torch.float32:
        found["ONNX Runtime"] = onnx_runtime(x, model, threads)
    if available("openvino") and dtype in (torch.float32, torch.bfloat16):
        found["OpenVINO"] = openvino(x, model, threads, dtype)
    return found


def runtimes(x: Tensor, convolutions: list[dict], threads: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The same of a chain of convolutions, with a float32 input."""
    if x.device.type != "cpu" or not available("onnx"):
        return {}
    return of_model(x, onnx_model(x, convolutions), threads, dtype)
