"""What an ordinary test run leaves to ``--thorough``: further cases of what other cases show.

``@pytest.mark.sample(n)`` runs n of a test's cases, spread over all its parameters, and
``@pytest.mark.thorough`` none. What is asked for by name, with ``-k`` or ``file::test``, runs
whole, as is what ``-m`` or ``--last-failed`` choose from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="Run every case of every test.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sample(n): n of the cases run without --thorough")
    config.addinivalue_line("markers", "thorough: runs with --thorough only")


def pytest_report_header(config: pytest.Config) -> str | None:
    sampled = "of cases marked sample or thorough only some: --thorough runs all"
    return sampled if _is_sampled(config) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _is_sampled(config):
        return
    kept = set(sampled(items))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _is_sampled(config: pytest.Config) -> bool:
    """Whether nobody has asked for certain tests, or for all."""
    option = config.option
    chosen = option.keyword or option.markexpr or getattr(option, "lf", False)
    return not (option.thorough or chosen or any("::" in asked for asked in config.args))


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
    number, total = min(mark.args[0], len(cases)), len(cases)
    # Prime to the total, so that it does not meet the same value of a stacked parameter each time.
    step = next(s for s in range(-(-total // number), total + 2) if math.gcd(s, total) == 1)
    return [cases[index * step % total] for index in range(number)]
