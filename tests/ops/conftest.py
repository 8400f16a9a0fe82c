"""Fixtures of the ops' tests."""

from __future__ import annotations

import pytest
from implementations import EMULATOR, running
from tuned import Tuned, stop

import dwconv_ext


@pytest.fixture(params=[dwconv_ext._C.selected_isa(), EMULATOR])
def tuned(request):
    with running(request.param) as implementation:
        half = implementation.emulator or dwconv_ext._C
        yield Tuned(half, implementation.emulator is not None)
        stop(half)


@pytest.fixture
def on_cpu():
    yield Tuned(dwconv_ext._C, False)
    stop(dwconv_ext._C)
