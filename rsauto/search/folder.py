"""The study folder: one process at a time writes it, every file whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsauto import study_file
from rsauto.atomic import beside, clear_leftovers, naming, put_in_place, write_text
from rsauto.config import StudyConfig, differences
from rsauto.enclosed import require_enclosed
from rsauto.errors import InputError
from rsauto.records import TrialRecord, dump_line
from rsauto.report.table import read_environment


def changed_settings(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Settings that differ and may not when a study is continued, each as 'key: was X, is Y'.

    A base model in a local folder may lie in another place than before: whether it is the same
    model is for its fingerprint to say.
    """
    name = new.model.name
    if Path(name).expanduser().is_dir():
        old = old.model_copy(update={"model": old.model.model_copy(update={"name": name})})
    return differences(old, new)


class StudyFolder:
    """Paths of a study folder, and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "study.yaml"
        self.environment_file = path / "environment.json"
        self.records_file = path / "trials.jsonl"
        self.journal_file = path / "journal.log"
        self.adapters = path / "adapters"
        self.id_file = path / ".study-id"
        self.worker_logs = path / "workers"
        self._lines: dict[int, str] = {}

    def check(self, config: StudyConfig) -> None:
        """Refuses a folder that cannot take this study. Changes nothing. Raises InputError."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: is a file, not a folder. Choose another --out.")
        if self.config_file.exists():
            self._check_same_study(config)
        elif self.path.is_dir() and not self._is_begun():
            raise InputError(
                f"--out {self.path}: the folder is not empty and holds no study. "
                "Choose another --out, or empty it."
            )
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"--out {self.path}: no permission to write in {parent}.")

    def _is_begun(self) -> bool:
        """Whether all that is there was made by a study: before study.yaml, or it was removed.

        Whether it is this study is then for its storage to say.
        """
        if self.id_file.exists() or self.journal_file.exists():
            return True
        hidden = (".lock", f".{self.id_file.name}.", f".{self.journal_file.name}.")
        return all(entry.name.startswith(hidden) for entry in self.path.iterdir())

    def _check_same_study(self, config: StudyConfig) -> None:
        changed = changed_settings(study_file.load(self.config_file), config)
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise InputError(
                f"--out {self.path}: holds a study with other settings:\n{listed}\n"
                "search.trials, seeds, rank, time limits and how trials are packed may change; for "
                "anything else choose another --out or put the settings back."
            )

    @contextmanager
    def locked(self, work: str = "study") -> Iterator[None]:
        """Holds the folder for this process. Raises InputError when another one has it."""
        self._make()
        with open(self.path / ".lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise InputError(
                    f"--out {self.path}: another process (pid {holder}) is working on this {work}. "
                    "Wait for it, or choose another --out."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be made: {error.strerror}.") from None
        require_enclosed(self.path)

    def write_config(self, config: StudyConfig) -> None:
        write_text(self.config_file, study_file.dump(config))

    def write_environment(self, environment: dict[str, Any]) -> None:
        write_text(self.environment_file, json.dumps(environment, indent=2) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """What an earlier run wrote, or nothing."""
        try:
            return read_environment(self.environment_file)
        except InputError as error:
            raise InputError(
                f"{error}. Remove the file; it is written anew when the study continues."
            ) from None

    def write_records(self, records: Iterable[TrialRecord]) -> None:
        records = list(records)
        lines = {r.number: self._lines.get(r.number) or dump_line(r) + "\n" for r in records}
        if lines.keys() != self._lines.keys() or not self.records_file.exists():
            write_text(self.records_file, "".join(lines.values()))
        self._lines = lines

    def identity(self) -> str:
        """A name by which others know this very folder, also where it is mounted elsewhere."""
        if not self.id_file.exists():
            write_text(self.id_file, uuid.uuid4().hex + "\n")
        return self.id_file.read_text(encoding="utf-8").strip()

    def is_the_one(self, identity: str) -> bool:
        """Whether this is the folder of that name, and adapters can be put into it."""
        try:
            found = self.id_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return False
        return found == identity and os.access(self.path, os.W_OK | os.X_OK)

    def adapter(self, number: int) -> Path:
        """Where the adapter of a trial is kept while it may still be the answer."""
        return self.adapters / f"{number:04d}"

    def adapter_entries(self) -> list[Path]:
        """Adapters that are kept, and those that somebody is writing or has left half written."""
        return list(self.adapters.iterdir()) if self.adapters.is_dir() else []

    def remove_adapters(
        self, entries: Iterable[Path], *, kept: Container[int], running: Container[int]
    ) -> None:
        """Removes entries but the adapters of trials that are kept, and all of running ones."""
        for entry in entries:
            digits = entry.name.lstrip(".")[:4]  # 0007, or .0007.1234.partial
            number = int(digits) if digits.isdecimal() else None
            is_whole = not entry.name.startswith(".")
            if number not in running and not (is_whole and number in kept):
                shutil.rmtree(entry, ignore_errors=True)

    def publish_adapter(self, number: int, name: str) -> Path:
        """Copies a trial's adapter to ``best`` or ``recommended``, all or nothing."""
        target = self.path / name
        clear_leftovers(target)
        partial = beside(target, "partial")
        # A container that is started again may have the number of the process that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with naming(target):
                partial.mkdir()
                # One by one: the error of shutil.copytree does not say that the disk is full.
                for file in sorted(filter(Path.is_file, self.adapter(number).iterdir())):
                    shutil.copyfile(file, partial / file.name)
                put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target
