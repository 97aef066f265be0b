"""What makes a study the same study when it is continued: settings, model, data, and its trials."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.storages import BaseStorage
from pydantic import ValidationError

from rsauto.config import StudyConfig
from rsauto.data import fingerprint
from rsauto.errors import InputError
from rsauto.search.folder import StudyFolder, changed_settings
from rsauto.search.ledger import Ledger
from rsauto.search.setup import Setup


def claim(ledger: Ledger, config: StudyConfig, setup: Setup, folder: StudyFolder) -> dict[str, str]:
    """Writes settings and fingerprints into a new ledger, and refuses one that has others.

    ``config`` is the study's, ``setup`` this process's; returned are the fingerprints.

    The ledger itself says whose it is: a study folder can be lost, and one storage may serve many
    studies. Raises InputError that names the difference.
    """
    stored = ledger.attributes()
    if "config" in stored:
        changed = changed_settings(stored_config(stored["config"], f"name: {config.name}"), config)
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise InputError(
                f"name: the storage has a study {config.name!r} with other settings:\n{listed}\n"
                "Give this study another name, or put the settings back."
            )
    elif ledger.study.get_trials(deepcopy=False):
        raise InputError(
            f"name: the storage has a study {config.name!r} that rsauto did not make. "
            "Give this study another name."
        )
    fingerprints = fingerprints_of(setup)
    before = setup.source.in_todays_form(stored.get("fingerprints", fingerprints))
    other = _changed(before, fingerprints)
    if other:
        raise InputError(
            f"--out {folder.path}: the {other} changed since this study was begun, so its trials "
            "cannot be compared with new ones. Choose another --out, or put the old files back."
        )
    ledger.set_attribute("fingerprints", fingerprints)
    ledger.set_attribute("memory_budget_bytes", setup.memory_budget_bytes)
    ledger.set_attribute("ended", None)
    place = {"path": str(folder.path.resolve()), "identity": folder.identity()}
    ledger.set_attribute("folder", place)
    # Last: with it the study is there for workers to join.
    ledger.set_attribute("config", config.model_dump(mode="json"))
    return fingerprints


def require_own_journal(storage: BaseStorage, config: StudyConfig, folder: StudyFolder) -> None:
    """Refuses a folder whose journal is another study's. Raises InputError."""
    others = [name for name in optuna.get_all_study_names(storage) if name != config.name]
    if others:
        raise InputError(
            f"--out {folder.path}: its journal holds the study {others[0]!r}, and this one is "
            f"{config.name!r}. Choose another --out, or give the study file that name."
        )


def stored_config(stored: dict[str, Any], where: str) -> StudyConfig:
    """The settings that a study was begun with. Raises InputError for those of another version."""
    try:
        return StudyConfig.model_validate(stored)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise InputError(
            f"{where}: the study was begun with another version of rsauto, whose settings this one "
            f"does not read: {field}: {problem['msg']}. Install the same version here."
        ) from None


def require_equal_inputs(ledger: Ledger, setup: Setup, where: str) -> None:
    """Refuses to work on a study with another model or other data. Raises InputError."""
    before = setup.source.in_todays_form(ledger.attributes()["fingerprints"])
    changed = _changed(before, fingerprints_of(setup))
    if changed:
        raise InputError(
            f"{where}: the {changed} that this machine reads are not those that the study was "
            "begun with, so trials run here could not be compared. Put the same files here, or set "
            "model.revision and data.revision in the study file."
        )


def fingerprints_of(setup: Setup) -> dict[str, str]:
    """Of what the results of a trial depend on beside its settings."""
    found = {"model": setup.source.fingerprint, "data": setup.data.fingerprint}
    if setup.data.general:
        found["text of data.forgetting"] = fingerprint(setup.data.general)
    return found


def require_nothing_lost(folder: StudyFolder, ledger: Ledger) -> None:
    """Refuses to go on where trials.jsonl has trials that the ledger lacks.

    They would be run again and their records overwritten. Lines that cannot be read are no sign of
    that, as long as the ledger has as many records: it is from there that they are written anew.
    Raises InputError.
    """
    if not folder.records_file.exists():
        return
    settled = {record.number for record in ledger.records()}
    lines = folder.records_file.read_text(encoding="utf-8", errors="replace").split("\n")
    numbers = [_number(line) for line in lines if line]
    lost = [n for n in numbers if n is not None and n not in settled]
    num_lost = len(lost) or max(0, len(numbers) - len(settled))
    if num_lost:
        raise InputError(
            f"--out {folder.path}: trials.jsonl has {num_lost} trials that the study's storage "
            "lacks. Give the --storage this study was begun with, bring journal.log back, or "
            "choose another --out to begin anew. Where it is trials.jsonl that is damaged, remove "
            "it: it is written anew from the storage."
        )


def _number(line: str) -> int | None:
    try:
        number = json.loads(line)["number"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) else None


def _changed(before: dict[str, str], now: dict[str, str]) -> str:
    """What differs, in words; nothing where all is the same."""
    return " and the ".join(name for name in now if before.get(name) != now[name])
