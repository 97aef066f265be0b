"""The command line in a child that is forked off this process, which has imported everything.

A process of its own takes ten seconds of a processor before its first line of work. Tests of what
starts processes (`--workers`, the launchers, the tutorial) let it; all others need not.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tiny_study import environment

SLOW_STEPS = """
import time
import rsauto.training.loop as loop
from rsauto.training.packed import Pack

def late(real):
    def slow(*arguments):
        time.sleep({seconds})
        return real(*arguments)
    return slow

loop.accumulate_gradients = late(loop.accumulate_gradients)
Pack.advance = late(Pack.advance)
"""


def forked(work: Callable[[], int], log: Path, errors: Path | None = None) -> int:
    """The pid of a child that does ``work``, which gives its exit code. Its output is in ``log``,
    what it writes to stderr in ``errors`` if that is given.

    Its random numbers are its own: nothing may depend on where the parent's stood.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become_a_process(log, errors or log)
        code = work()
        atexit._run_exitfuncs()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_a_process(log: Path, errors: Path) -> None:
    """Nothing of the test run is left in it: its output, signals, exit functions, random state."""
    atexit._clear()
    for number, file in ((1, log), (2, errors)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]
        2, "w", closefd=False, buffering=1
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    random.seed()
    np.random.seed(os.getpid())
    torch.manual_seed(os.getpid())


def ended(pid: int) -> int:
    """The exit code of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit code and output of ``work`` in a child."""
    log.unlink(missing_ok=True)
    code = ended(forked(work, log))
    return code, log.read_text(encoding="utf-8", errors="replace")


class Child:
    """A forked child, used like `subprocess.Popen` with pipes."""

    def __init__(self, work: Callable[[], int], *, own_stderr: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "stdout")
        self._errors = Path(self._folder.name, "stderr") if own_stderr else self._log
        self.returncode: int | None = None
        self.pid = forked(work, self._log, self._errors)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, self._said(self._log))
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has said by its end: stdout and stderr, or both in the first."""
        self.wait(timeout)
        own_stderr = self._errors != self._log
        return self._said(self._log), self._said(self._errors) if own_stderr else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @staticmethod
    def _said(file: Path) -> str:
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def command_line(
    *words: str | Path,
    step_seconds: float = 0.0,
    before: str = "",
    prepare: Callable[[], None] | None = None,
    cwd: Path | None = None,
    own_stderr: bool = False,
) -> Child:
    """`rsauto WORDS`, as in a process of its own.

    Its steps are stretched by ``step_seconds``, so that it can be hit in the middle of a trial.
    ``before`` is Python, and ``prepare`` a function, to run first.
    """
    _import_everything()
    from rsauto.cli import app

    arguments = [str(word) for word in words]

    def work() -> int:
        os.environ.update(environment())
        if cwd is not None:
            os.chdir(cwd)
        sys.argv = ["rsauto", *arguments]
        if step_seconds:
            exec(SLOW_STEPS.format(seconds=step_seconds), {})
        exec(before, {})
        if prepare is not None:
            prepare()
        app(arguments)
        return 0

    return Child(work, own_stderr=own_stderr)


def rsauto(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line run to its end, like `subprocess.run`."""
    child = command_line(*words, cwd=cwd, own_stderr=True)
    try:
        stdout, stderr = child.communicate()
    finally:
        child.kill()
    assert child.returncode is not None
    return subprocess.CompletedProcess(words, child.returncode, stdout, stderr)


def _import_everything() -> None:
    """What the commands import when they need it."""
    import rsauto.search.driver
    import rsauto.search.workers
    import rsauto.study_command
    import rsauto.train_command  # noqa: F401
