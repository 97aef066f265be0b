"""Processes that help with a study: on this host, one a GPU, or on a Ray cluster.

Each is an `rsauto worker`, which needs nothing but the study's storage. What is here only starts
and stops them; they share the work through the storage, and any of them may die.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rsauto.errors import InputError
from rsauto.stop import StopFlag
from rsauto.storage_url import shown

STORAGE_VARIABLE = "RSAUTO_STORAGE"
"""Holds a storage URL for worker and study: a command line, and its password, is everybody's."""

WITH_PARENT = "RSAUTO_WITH_PARENT"
"""Environment variable: the process a worker ends with."""

STOP_SECONDS = 30.0
"""Time a worker has to put its trial back before it is killed."""


class Crew(Protocol):
    """Processes that work on the same study as this one."""

    num_processes: int
    """This process included."""
    num_on_this_host: int
    """Of these, those that share the host's memory."""

    def start(self, study: str, storage: str | None, folder: Path) -> str | None:
        """Starts them; a line that says what was started."""
        ...

    def notices(self) -> list[str]:
        """A line for each that has ended before its time since this was last asked."""
        ...

    def stop(self) -> None:
        """Ends them all, cleanly where they let it."""
        ...


class NoCrew:
    """This process works alone, as far as it knows."""

    num_processes = num_on_this_host = 1

    def start(self, study: str, storage: str | None, folder: Path) -> str | None:
        return None

    def notices(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass


class LocalCrew:
    """Workers on this host. Each has a GPU of its own, or a share of the CPU's cores."""

    def __init__(self, num_processes: int, devices: Sequence[str] = ()) -> None:
        """``devices`` are the GPUs, this process's own first; none on a CPU."""
        self.num_processes = self.num_on_this_host = num_processes
        self.devices = tuple(devices)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, Path] = {}

    def start(self, study: str, storage: str | None, folder: Path) -> str | None:
        (folder / "workers").mkdir(exist_ok=True)
        for k in range(2, self.num_processes + 1):
            log = folder / "workers" / f"{k}.log"
            with open(log, "wb") as file:
                self._running[k] = subprocess.Popen(
                    worker_command(study, storage, folder),
                    env={**self._environment(k), **worker_storage(storage)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C in the terminal is for this process, which then stops them.
                    start_new_session=True,
                )
            self._logs[k] = log
        what = "one a GPU" if self.devices else f"{cores_each(self.num_processes)} cores each"
        return f"{self.num_processes} workers, this one included, {what}"

    def _environment(self, k: int) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": self.devices[k - 1]} if self.devices else {}
        threads = str(cores_each(self.num_processes))
        return {**os.environ, **own, "OMP_NUM_THREADS": threads, WITH_PARENT: str(os.getpid())}

    def notices(self) -> list[str]:
        ended = {k: code for k, p in self._running.items() if (code := p.poll()) is not None}
        for k in ended:
            del self._running[k]
        return [ending(f"worker {k}", c, last_line(self._logs[k])) for k, c in ended.items() if c]

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        for process in self._running.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


class RayCrew:
    """Workers placed by Ray, each in a task of its own, on whatever node has room."""

    def __init__(self, num_processes: int, devices: Sequence[str] = ()) -> None:
        """``devices`` are this host's GPUs, this process's own first; none on a CPU."""
        self.num_processes = num_processes
        self.num_on_this_host = 1  # where the others will be is for Ray to say
        self.devices = tuple(devices)
        self._tasks: dict[int, Any] = {}
        self._is_ours = False

    def start(self, study: str, storage: str | None, folder: Path) -> str | None:
        ray = import_module("ray")
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            # Ray takes SIGTERM for itself, by which a study is asked to stop.
            handler = signal.getsignal(signal.SIGTERM)
            try:
                self._connect(ray)
            finally:
                signal.signal(signal.SIGTERM, handler)
        needs: dict[str, float] = {"num_gpus": 1} if self.devices else {"num_cpus": 1}
        task = ray.remote(max_retries=0, **needs)(run_worker)
        command = worker_command(study, storage, folder)[1:]
        for k in range(2, self.num_processes + 1):
            self._tasks[k] = task.remote(command, worker_storage(storage))
        return f"{self.num_processes} workers, this one and {self.num_processes - 1} placed by Ray"

    def _connect(self, ray: Any) -> None:
        """To the cluster there is, or to one of this host's GPUs but the one of this process.

        Raises InputError where such a cluster has too few of them.
        """
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if not self.devices or os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
            return
        others, own = self.devices[1:], os.environ.get("CUDA_VISIBLE_DEVICES")
        # Ray numbers the GPUs of a node as this names them when the node is started.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(others)
        try:
            ray.init(num_gpus=len(others), **quiet)
        except ValueError:  # a cluster that is there has the GPUs it was started with
            ray.init(**quiet)
            return
        finally:
            del os.environ["CUDA_VISIBLE_DEVICES"]
            if own is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = own
        if len(others) < self.num_processes - 1:
            ray.shutdown()
            raise InputError(
                f"--workers {self.num_processes}: there is no Ray cluster here, and this machine "
                f"has {len(self.devices)} GPUs, one of them for this process. Give --workers "
                f"{len(self.devices)} at most, or set RAY_ADDRESS to a cluster."
            )

    def notices(self) -> list[str]:
        ray = import_module("ray")
        told = []
        for k in [k for k, task in self._tasks.items() if ray.wait([task], timeout=0)[0]]:
            try:
                code, last = ray.get(self._tasks.pop(k))
            except ray.exceptions.RayError as error:
                code, last = 1, str(error).strip().split("\n")[-1]
            if code:
                told.append(ending(f"worker {k} on Ray", code, last))
        return told

    def stop(self) -> None:
        if not self._tasks and not self._is_ours:
            return
        ray = import_module("ray")
        tasks = list(self._tasks.values())
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=STOP_SECONDS)
        self._tasks.clear()
        if self._is_ours:
            ray.shutdown()
            self._is_ours = False


def run_worker(arguments: Sequence[str], storage: Mapping[str, str]) -> tuple[int, str]:
    """On a Ray node: runs a worker to its end; its exit code and the last line it wrote."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **storage, WITH_PARENT: str(os.getpid())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:  # Ray cancels a task by an interrupt
        process.terminate()
        process.wait(STOP_SECONDS)
        raise
    lines = output.strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def crew_of(num_processes: int, launcher: str, storage: str | None) -> Crew:
    """The crew that the command line asks for. Raises InputError where there cannot be one."""
    if num_processes < 1:
        raise InputError(f"--workers {num_processes}: must be at least 1.")
    if launcher not in ("local", "ray"):
        raise InputError(f"--launcher {launcher}: must be local or ray.")
    if launcher == "ray":
        _check_ray(storage)
        return RayCrew(num_processes, visible_gpus())
    if num_processes == 1:
        return NoCrew()
    devices = visible_gpus()
    if devices and num_processes > len(devices):
        raise InputError(
            f"--workers {num_processes}: this machine has {len(devices)} GPUs, and each worker "
            f"takes one. Give --workers {len(devices)}, or join from another machine with rsauto "
            "worker."
        )
    take_own_share(num_processes, devices)
    return LocalCrew(num_processes, devices[:num_processes])


def _check_ray(storage: str | None) -> None:
    if find_spec("ray") is None:
        raise InputError("--launcher ray: Ray is missing. Run pip install 'rsauto[ray]'.")
    if storage is None or storage.startswith("sqlite"):
        place = "the journal in the study folder" if storage is None else shown(storage)
        raise InputError(
            "--launcher ray: the workers need a storage that every node can reach, and "
            f"{place} is a file of this machine. Give "
            "--storage with a PostgreSQL or MySQL URL."
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if any(named) else [str(k) for k in range(count)]


def take_own_share(num_processes: int, devices: Sequence[str]) -> None:
    """Leaves the other workers their GPUs and cores."""
    import torch

    torch.set_num_threads(cores_each(num_processes))
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]


def cores_each(num_processes: int) -> int:
    """Cores of each of several processes, at least one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // num_processes)


def worker_command(study: str, storage: str | None, folder: Path) -> list[str]:
    """The command of one more worker; a storage other than the folder's is in its environment."""
    where = [str(folder.resolve())] if storage is None else ["--study", study]
    return [sys.executable, "-m", "rsauto", "worker", *where]


def worker_storage(storage: str | None) -> dict[str, str]:
    """What `worker_command` has to find in its environment."""
    return {} if storage is None else {STORAGE_VARIABLE: storage}


def ending(name: str, code: int, last: str) -> str:
    """One line on a worker that ended before the study did."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f": {last}" if last else ""
    return f"{name} {how}{said}; the study goes on without it"


def last_line(log: Path) -> str:
    """The last thing a worker said."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def stop_with_parent(stop: StopFlag) -> None:
    """Asks this process to stop once the one that started it is gone, however it went."""
    parent = os.environ.get(WITH_PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        stop.requested = True

    threading.Thread(target=watch, daemon=True).start()
