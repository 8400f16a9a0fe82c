"""A pytest plugin: the models that timm's and torchvision's own tests build, converted or compiled.

``python -m pytest -p built ...``; models.py says which library, models and way in DWCONV_BUILT, and reads what is written there.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import fx, nn

import dwconv_ext
from dwconv_ext.compile import backend, last_report

asked = json.loads(os.environ["DWCONV_BUILT"])
built = {"layers": 0, "fused": 0}  # in the test that runs


def _counted_backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    compiled = backend(module, inputs)
    built["fused"] += sum(last_report().fused.values())
    return compiled


def _ours(model: nn.Module) -> nn.Module:
    if asked["how"] == "converted":
        model = dwconv_ext.convert(model)
        built["layers"] += sum(entry.became != "left alone" for entry in model.conversion_report.entries)
    elif asked["how"] == "compiled":
        model.compile(backend=_counted_backend)  # in place: the tests go on to ask for the model's class and its methods
    elif asked["how"] == "eager":
        model.compile(backend="eager")
    return model


def _wrapped(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(builder)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return _ours(builder(*args, **kwargs))

    return build


def _models_alone(list_models: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(list_models)
    def listed(*args: Any, **kwargs: Any) -> list[str]:
        return [name for name in list_models(*args, **kwargs) if name.split(".")[0] in asked["models"]]  # less the weights' tag

    return listed


def pytest_configure(config: Any) -> None:
    """Before the tests' files import the builders."""
    if asked["library"] == "timm":
        timm.create_model = _wrapped(timm.create_model)
        timm.list_models = _models_alone(timm.list_models)  # a parameter of each test: 18,000 of them
        return
    builders = torchvision.models._api.BUILTIN_MODELS
    packages = (
        torchvision.models,
        torchvision.models.segmentation,
        torchvision.models.detection,
        torchvision.models.quantization,
    )
    for name, builder in list(builders.items()):
        builders[name] = _wrapped(builder)
        for package in packages:
            if getattr(package, builder.__name__, None) is builder:
                setattr(package, builder.__name__, builders[name])


def _model_of(item: Any) -> str | None:
    """Of the models asked for, the one that the test is of: its argument, or in its name."""
    given = getattr(item, "callspec", None) and item.callspec.params
    if given:
        name = given.get("model_name", getattr(given.get("model_fn"), "__name__", None))
        name = name.split(".")[0] if isinstance(name, str) else None  # no string where there is no model to test
        return name if name in asked["models"] else None
    return next((name for name in asked["models"] if name in item.name), None)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items[:] = [item for item in items if _model_of(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """A line for each test: a failure anywhere is one, and what was skipped in its set-up has no call."""
    report = yield
    if report.when == "setup":
        item.kind, item.why = report.outcome, ""
    elif report.outcome != "passed":
        item.kind = report.outcome
    if report.failed:
        item.why = str(getattr(report.longrepr, "reprcrash", report.longrepr)).replace("\n", " ")
    if report.when == "teardown":
        line = {"test": item.name, "model": _model_of(item), "kind": item.kind, "why": item.why, **built}
        with open(asked["out"], "a") as out:
            out.write(json.dumps(line) + "\n")
    return report


def pytest_runtest_setup(item: Any) -> None:
    torch.manual_seed(0)  # the same weights and images with and without
    torch._dynamo.reset()  # as in a process of its own: graphs of one class's models count against one limit
    built.update(layers=0, fused=0)
