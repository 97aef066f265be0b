"""The trial that is exported, with the base model and the data it was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rsauto.base import BaseSource
from rsauto.config import StudyConfig
from rsauto.data import TokenisedData
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError
from rsauto.records import TrialRecord
from rsauto.report.choice import Choice, chosen_record
from rsauto.report.table import Study
from rsauto.search.reading import Objects, Read, read


@dataclass(frozen=True)
class Chosen:
    """One trial of a study."""

    study: Study
    choice: Choice
    record: TrialRecord

    @property
    def config(self) -> StudyConfig:
        return self.study.config

    @property
    def source(self) -> BaseSource:
        """The base model before its weights are read. Raises InputError, as `data` does."""
        return self._read.source

    @property
    def data(self) -> TokenisedData:
        """Raises InputError where model or data are not there, or are not the study's."""
        return self._read.data

    @cached_property
    def _read(self) -> Read:
        found = read(self.config, Objects())
        now = {"model": found.source.fingerprint, "data": found.data.fingerprint}
        then = found.source.in_todays_form(self.study.environment.get("fingerprints", {}))
        changed = [name for name, value in now.items() if then.get(name, value) != value]
        if changed:
            raise InputError(
                f"{self.study.folder}: the {' and the '.join(changed)} read here are not those of "
                "the study, so nothing could be checked against it. Put the same files back. A "
                "study of objects that were given from Python cannot be exported from its folder; "
                "its adapters are plain LoRA as they are."
            )
        return found

    @property
    def location(self) -> str:
        """The base model for `from_pretrained`, from any working directory."""
        return location_of(self.config.model.name)

    @property
    def refit(self) -> TrialRecord | None:
        """The rsLoRA trial with the rank pattern that AdaLoRA found, the best if several."""
        refits = [
            record
            for record in self.study.records
            if record.role == "refit" and record.outcome == "complete"
        ]
        return min(refits, key=lambda record: record.eval_loss or 0.0, default=None)


def location_of(name: str) -> str:
    """A base model's name for `from_pretrained`: a hub id as it is, folders in full."""
    if name == "embedded":
        return str(MODEL_DIR)
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def choose(study: Study, choice: Choice) -> Chosen:
    """Raises InputError where there is no such trial."""
    return Chosen(study, choice, chosen_record(study, choice))


def card_names_trial(folder: Path, number: int) -> bool:
    """Whether an adapter's card says that it is of this trial."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(rf"\btrial {number}\b", card) is not None
