"""The command line in a child that is forked off this process, which has imported everything.

A process of its own takes ten seconds of a processor before its first line of work. Tests of what
starts processes (`--workers`, the launchers, the tutorial), and of what may depend on the hash
seed, let it; all others need not.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

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

    Its random numbers are its own: nothing may depend on where the parent's stood. What libraries
    have registered for their exit in the parent is not run.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become_a_process(log, errors or log)
        code = _exit_code_of(work)
        threading._shutdown()  # type: ignore[attr-defined]  # as every process waits for its threads
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
        traceback.print_exc()
    finally:
        _leave(code)


def _exit_code_of(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)


def _leave(code: int) -> NoReturn:
    """Whatever happens: a child that returned would go on as a second test run."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _become_a_process(log: Path, errors: Path) -> None:
    """Nothing of the test run is left in it: what hears its output, its warnings and the failures
    of its threads, its signals, exit functions and random state."""
    atexit._clear()
    for number, file in ((1, log), (2, errors)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]
        2, "w", closefd=False, buffering=1
    )
    faulthandler.disable()  # pytest's
    threading.excepthook = threading.__excepthook__
    sys.unraisablehook = sys.__unraisablehook__
    _filter_as_a_process_does()
    warnings.showwarning = lambda *warning: print(
        warnings.formatwarning(*warning[:4]), file=sys.stderr
    )
    for logger in (logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)):
        for handler in list(logger.handlers):
            if type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)
            elif type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    random.seed()
    np.random.seed(os.getpid())
    torch.manual_seed(os.getpid())


def _filter_as_a_process_does() -> None:
    """Libraries silence messages and modules of theirs, as in any process; what is of all warnings
    is the test run's, or what a thread had set at the moment of the fork."""
    of_libraries = [entry for entry in warnings.filters if entry[1] or entry[3]]
    warnings.resetwarnings()
    for silent in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", silent)
    warnings.filters[:0] = of_libraries  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def ended(pid: int, timeout: float = 600) -> int:
    """The exit code of a child, negative where a signal ended it. One that hangs is killed."""
    until = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def in_child(work: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit code and output of ``work`` in a child."""
    log.unlink(missing_ok=True)
    code = ended(forked(work, log))
    return code, log.read_text(encoding="utf-8", errors="replace")


_LIVING: set[Child] = set()


def kill_all() -> None:
    """Those that a test has left running."""
    for child in list(_LIVING):
        child.kill()


class Child:
    """A forked child, used like `subprocess.Popen` with pipes."""

    def __init__(self, work: Callable[[], int], *, own_stderr: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "stdout")
        self._errors = Path(self._folder.name, "stderr") if own_stderr else self._log
        self.returncode: int | None = None
        self.pid = forked(work, self._log, self._errors)
        _LIVING.add(self)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                _LIVING.discard(self)
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
        self.wait()

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
    """`rsauto WORDS` in a forked child.

    Its steps are stretched by ``step_seconds``, so that it can be hit in the middle of a trial.
    ``before`` is Python, and ``prepare`` a function, to run first.
    """
    _import_everything()
    from rsauto.cli import app

    arguments = [str(word) for word in words]

    def work() -> int:
        inherited = environment()
        os.environ.clear()
        os.environ.update(inherited)
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
