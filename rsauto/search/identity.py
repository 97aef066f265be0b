"""What makes a study the same study when it is continued: settings, model, data, and its trials."""

from __future__ import annotations

import json
from pathlib import Path

from rsauto.config import StudyConfig, differences
from rsauto.errors import InputError
from rsauto.search.folder import StudyFolder
from rsauto.search.ledger import Ledger


def claim(ledger: Ledger, config: StudyConfig, fingerprints: dict[str, str], out: Path) -> None:
    """Writes settings and fingerprints into a new ledger, and refuses one that has others.

    The ledger itself says whose it is: a study folder can be lost, and one storage may serve many
    studies. Raises InputError that names the difference.
    """
    stored = ledger.study.user_attrs
    if "config" in stored:
        changed = differences(StudyConfig.model_validate(stored["config"]), config)
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
    _require_same_inputs(stored.get("fingerprints", fingerprints), fingerprints, out)
    ledger.study.set_user_attr("config", config.model_dump(mode="json"))
    ledger.study.set_user_attr("fingerprints", fingerprints)


def require_nothing_lost(folder: StudyFolder, ledger: Ledger) -> None:
    """Refuses to go on where trials.jsonl has trials that the ledger lacks.

    They would be run again and their records overwritten. Raises InputError.
    """
    if not folder.records_file.exists():
        return
    settled = {record.number for record in ledger.records()}
    lines = folder.records_file.read_text(encoding="utf-8").splitlines()
    lost = [number for number in map(_number, lines) if number not in settled]
    if lost:
        raise InputError(
            f"--out {folder.path}: trials.jsonl has {len(lost)} trials that the study's storage "
            "lacks. Give the --storage this study was begun with, bring journal.log back, or "
            "choose another --out to begin anew."
        )


def _number(line: str) -> int | None:
    try:
        number = json.loads(line)["number"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if isinstance(number, int) else None


def _require_same_inputs(before: dict[str, str], now: dict[str, str], out: Path) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            f"--out {out}: the {' and the '.join(changed)} changed since this study was begun, so "
            "its trials cannot be compared with new ones. Choose another --out, or put the old "
            "files back."
        )
