"""The backend dwconv_ext: by its name, its options and its bases."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from blocks import randomised, sequential
from small_models import Net, assert_same, assert_same_step, check, fast, fused, picture
from torch import nn

import dwconv_ext
import dwconv_ext.compile
from dwconv_ext.compile import last_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("base", ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.xdist_group("inductor"))))
def test_bases(base):
    model = sequential(16, 16) if base == "inductor" else Net("shortcut").eval()
    compiled, x = fast(model, options={"base": base}), picture()
    with torch.no_grad():
        assert_same(compiled(x), model(x))
        assert last_report().base == base and fused()["blocks"] == 1
        for p in model.parameters():
            p.data.mul_(0.7)
        assert_same(compiled(x), model(x))
    if base == "aot_eager":
        assert_same_step(model, copy.deepcopy(model), compiled, x, 1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bse": "eager"}, "options must be among base, freeze, sequences, but got bse"),
        ({"base": 3}, "base must be the name of a backend, .* but got 3"),
        ({"freeze": 1}, "freeze must be True or False, but got 1"),
        ({"freeze": True, "base": "aot_eager"}, "freeze goes with the base 'eager' alone, but got base 'aot_eager'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"backend: {message}"):
        dwconv_ext.compile.backend(torch.fx.symbolic_trace(nn.Identity()), [picture()], options=options)


def test_wrong_options_of_torch_compile():
    # Dynamo wraps whatever a backend raises.
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ValueError: .*bse"):
        fast(lambda x: x + 1, options={"bse": "eager"})(picture())


def test_backend_is_known_by_name():
    assert "dwconv_ext" in torch._dynamo.list_backends(exclude_tags=())
    with torch.no_grad():
        torch._dynamo.lookup_backend("dwconv_ext")(torch.fx.symbolic_trace(nn.Identity()), [picture()])
    assert last_report() is not None and fused() == {}


NAMED = """
import torch
{before}
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
compiled = torch.compile(model, backend="dwconv_ext")
with torch.no_grad():
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
from dwconv_ext.compile import last_report
assert last_report().fused["blocks"] == 1
"""


@pytest.mark.parametrize("before", ("", "import dwconv_ext", "import torch._dynamo, dwconv_ext"), ids=("not", "first", "last"))
@pytest.mark.parametrize("installed", (True, False))
def test_the_name_alone(before, installed):
    """Imported by nobody, before Dynamo or after it; from an installed package, and from a source tree on the path."""
    known = bool(entry_points(group="torch_dynamo_backends", name="dwconv_ext"))
    if installed and not known:
        pytest.skip("the package is not installed")
    if not installed:
        if not before:
            pytest.skip("nothing names the package")
        hidden = "import importlib.metadata as m; m.entry_points = lambda **how: m.EntryPoints()"
        before = f"{hidden}\n{before}"
    environment = {**os.environ, "PYTHONPATH": str(Path(dwconv_ext.__file__).parents[1])}
    command = [sys.executable, "-c", NAMED.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_own_modules_and_converted_models():
    """A FusedDSConv and what convert made of a model are found as the block that they are."""
    block = randomised(dwconv_ext.FusedDSConv(16, 24, activation="silu"))
    check(block, picture(), wanted={"blocks": 1})
    check(dwconv_ext.convert(sequential(16, 16)), picture(), wanted={"blocks": 1})
