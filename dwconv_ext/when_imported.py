"""Runs a callback after a module is imported, without importing it: for modules of torch that are slow to import."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module as Python would, and has its loader call the action at the end."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                sys.meta_path.remove(self)  # looking for it without importing it was not yet the import
                run(module)
                self.action(module)

            spec.loader.exec_module = run_and_act
        return spec


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """action(module), now or when it is imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))
