"""Hypothesis, or, where it is not installed (a machine with a GPU and no registry), stand-ins that skip the property tests."""

from __future__ import annotations

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    available = True
except ImportError:
    import pytest

    available = False

    def given(*_args, **_kwargs):
        return pytest.mark.skip(reason="hypothesis is not installed")  # before pytest looks for the arguments as fixtures

    def settings(*_args, **_kwargs):
        return lambda function: function

    class _Strategies:
        @staticmethod
        def composite(function):
            return lambda *_args, **_kwargs: None

        def __getattr__(self, _name):
            return lambda *_args, **_kwargs: None

    st, HealthCheck = _Strategies(), ()

__all__ = ["HealthCheck", "available", "given", "settings", "st"]
