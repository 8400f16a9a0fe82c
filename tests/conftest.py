from __future__ import annotations

import os
import tempfile

import implementations
import properties
import pytest
import torch

import dwconv_ext

# torch.compile keeps what it made of the package's Python on disk, and does not notice that it has changed.
_compiled = tempfile.TemporaryDirectory(prefix="dwconv_ext_inductor_", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

if properties.available:
    quiet = {"deadline": None, "suppress_health_check": list(properties.HealthCheck)}
    properties.settings.register_profile("default", max_examples=150, **quiet)
    properties.settings.register_profile("fuzz", max_examples=10_000, **quiet)
    properties.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=dwconv_ext._C.supported_isas())
def isa(request):
    """Every instruction set this CPU has, in turn."""
    with implementations.running(request.param):
        yield request.param


@pytest.fixture(params=implementations.NAMES)
def kernels(request):
    """Every implementation of the ops, in turn: of the CPU's instruction sets, and CUDA's."""
    with implementations.running(request.param) as implementation:
        yield implementation


@pytest.fixture
def forced(request):
    """A row of the kernel table, used wherever it fits."""
    row = request.param
    before = dwconv_ext._C.selected_isa()
    dwconv_ext._C.select_isa(row["isa"])
    dwconv_ext._C.force_row(row["name"], row["filter"], row["stride"])
    yield row
    dwconv_ext._C.force_row("")
    dwconv_ext._C.select_isa(before)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whatever ran before: a kink of ReLU that a difference quotient steps over would come and go."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before, nothing left behind; the same random numbers each time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_report_header(config):
    return f"dwconv_ext {dwconv_ext.__version__}, torch {torch.__version__}, {', '.join(dwconv_ext._C.supported_isas())}"
