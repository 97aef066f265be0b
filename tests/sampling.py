"""What an ordinary test run leaves to ``--thorough``: further cases of what other cases show.

``@pytest.mark.sample(n)`` runs n of a test's cases, spread evenly over them, and
``@pytest.mark.thorough`` none. What is asked for by name, with ``-k`` or ``file::test``, runs
whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="Run every case of every test.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sample(n): n of the cases run without --thorough")
    config.addinivalue_line("markers", "thorough: runs with --thorough only")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.keyword or any("::" in argument for argument in config.args)
    if config.option.thorough or asked:
        return
    kept = set(sampled(items))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def sampled(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those that an ordinary run has."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    return [item for of_one in cases.values() for item in _sample(of_one)]


def _sample(cases: Sequence[pytest.Item]) -> Sequence[pytest.Item]:
    if cases[0].get_closest_marker("thorough"):
        return []
    mark = cases[0].get_closest_marker("sample")
    if mark is None:
        return cases
    number = min(mark.args[0], len(cases))
    return [cases[index * len(cases) // number] for index in range(number)]
