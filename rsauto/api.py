"""rsauto from Python: run a study, also on a model and data that are already loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.launched import is_follower
from rsauto.report.table import Study, load_study
from rsauto.search.driver import study_events
from rsauto.search.follow import follow
from rsauto.search.setup import Objects


def run_study(
    config: StudyConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    storage: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: Sequence[Mapping[str, Any]] | None = None,
    validation: Sequence[Mapping[str, Any]] | None = None,
) -> Study:
    """Runs or continues a study to its end, without a word, and returns it.

    ``config`` is a StudyConfig, a dict of the same shape, a study file, or None for the embedded
    study. ``out`` defaults to runs/<study name>. A loaded ``model`` (with its ``tokenizer``) and
    ``train`` rows (a datasets.Dataset or a sequence of dicts; ``validation`` is split off where it
    is not given) take the place of model.name and data.name. The model is frozen, and its dropout
    turned off, in place. In a script that `accelerate launch` or `torchrun` starts several times,
    all processes call this and train every trial together, in a folder that all can read.

    Raises InputError or BudgetError before anything is started, StudyInterrupted when the same
    call would continue, AllTrialsFailedError when no trial gave a result.
    """
    checked = _checked(config)
    folder = Path(out) if out is not None else Path("runs") / checked.name
    objects = Objects(model=model, tokenizer=tokenizer, train=train, validation=validation)
    if is_follower():
        follow()
        return load_study(folder)
    for _ in study_events(checked, folder, storage=storage, objects=objects):
        pass
    return load_study(folder)


def _checked(config: StudyConfig | Mapping[str, Any] | str | Path | None) -> StudyConfig:
    if isinstance(config, StudyConfig):
        return config
    if isinstance(config, Mapping):
        return study_file.validate(config)
    return study_file.load(None if config is None else Path(config))
