"""Forked command lines end and speak as processes do, or the tests with them could not fail."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest
from processes import Child, command_line, kill_all


def said(work: Callable[[], object]) -> tuple[int | None, str]:
    child = Child(lambda: int(bool(work())))
    text, _ = child.communicate(timeout=60)
    return child.returncode, text


def fail() -> None:
    raise ValueError("seen")


def in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("work", "code", "text"),
    [
        (fail, 1, "ValueError: seen"),
        (in_a_thread, 0, "ValueError: seen"),
        (lambda: warnings.warn("seen", stacklevel=1), 0, "UserWarning: seen"),
        (lambda: logging.getLogger("optuna").critical("seen"), 0, "seen"),
        (lambda: sys.exit("seen"), 1, "seen"),
        (lambda: sys.exit(3), 3, ""),
        (lambda: print("seen") or True, 1, "seen"),
        (lambda: sys.stdout.close(), 0, ""),
        (lambda: os.abort(), -6, ""),
        (lambda: threading.Timer(0.5, print, ["seen"]).start(), 0, "seen"),
    ],
)
def test_what_a_process_would_say_is_said(work: Callable[[], object], code: int, text: str) -> None:
    import optuna  # its logger writes to the stderr of its import

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # as every study of this process has

    found, output = said(work)
    assert found == code, output
    assert text in output


def test_a_wrong_command_ends_as_from_a_shell() -> None:
    child = command_line("study", "--no-such-option", own_stderr=True)
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (2, "")
    assert "No such option" in stderr


def test_nothing_that_was_left_running_goes_on() -> None:
    child = Child(lambda: time.sleep(600) or 0)
    kill_all()
    assert child.returncode == -9
