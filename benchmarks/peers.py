"""The other runtimes, each a function of nothing that computes one layer; those not installed are left out, with a word."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def available(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> list[str]:
    return [p for p in ("onnx", "onnxscript", "onnxruntime", "openvino") if not available(p)]


def exported(model: nn.Module, x: Tensor) -> bytes:
    """A float32 model as ONNX."""
    buffer = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, input_names=["x"], opset_version=18, verbose=False)
    program.save(buffer)
    return buffer.getvalue()


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


def runtimes(model: nn.Module, x: Tensor, threads: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """ONNX Runtime and OpenVINO on a float32 model and input in NCHW, as far as they are installed and have the dtype."""
    if x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not all(map(available, ("onnx", "onnxscript"))):
        return {}
    onnx, found = exported(model, x), {}
    if available("onnxruntime") and dtype == torch.float32:
        found["ONNX Runtime"] = onnx_runtime(x, onnx, threads)
    if available("openvino"):
        found["OpenVINO"] = openvino(x, onnx, threads, dtype)
    return found
