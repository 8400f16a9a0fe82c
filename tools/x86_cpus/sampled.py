"""pytest as __main__.py starts it: tests that start Python start the one that is named, and every N-th of the tests chosen runs.

python sampled.py PYTHON N ARGUMENTS...
"""

import sys

import pytest


class Sample:
    def __init__(self, every: int):
        self.every = every

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = items[:: self.every]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % self.every])
        items[:] = chosen


sys.executable, every, *arguments = sys.argv[1:]
sys.exit(pytest.main(arguments, [Sample(int(every))]))
