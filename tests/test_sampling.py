"""What an ordinary run leaves out, told by pytest itself of a file of its own."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

FILE = """
import pytest

@pytest.mark.sample(3)
@pytest.mark.parametrize("case", range(10))
def test_some(case):
    print(f"<{case}>")

@pytest.mark.sample(3)
@pytest.mark.parametrize("case", range(2))
def test_few(case):
    pass

@pytest.mark.sample(2)
@pytest.mark.parametrize("other", "ab")
@pytest.mark.parametrize("case", range(2))
def test_stacked(case, other):
    print(f"<{case} {other}>")

@pytest.mark.sample(1)
@pytest.mark.parametrize("case", range(3))
def test_one(case):
    print(f"<one {case}>")

@pytest.mark.thorough
def test_long():
    pass

def test_plain():
    pass
"""


@pytest.mark.parametrize(
    ("asked", "num_run"),
    [
        ([], 9),
        (["--thorough"], 21),
        (["-k", "some"], 10),
        (["-m", "thorough"], 1),
        (["test_it.py::test_long"], 1),
    ],
)
def test_a_sample_runs_unless_more_is_asked_for(
    pytester: pytest.Pytester, asked: list[str], num_run: int
) -> None:
    pytester.makepyfile(test_it=FILE)
    done = pytester.runpytest("-p", "sampling", "-p", "no:xdist", "-s", *asked)
    num_collected = 1 if "::" in str(asked) else 21
    done.assert_outcomes(passed=num_run, deselected=num_collected - num_run)
    if not asked:
        done.stdout.fnmatch_lines(["*<0>*", "*<4>*", "*<7>*", "*<0 a>*", "*<1 b>*", "*<one 0>*"])
