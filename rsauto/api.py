"""rsauto from Python: run a study, also on a loaded model and data, and train what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.finetuning.request import Request, resolve
from rsauto.finetuning.run import Finished, training_events
from rsauto.finetuning.trackers import tracked
from rsauto.launched import is_follower
from rsauto.report.choice import Choice
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
    report: bool = True,
) -> Study:
    """Runs or continues a study to its end, without a word, and returns it.

    ``config`` is a StudyConfig, a dict of the same shape, a study file, or None for the embedded
    study. ``out`` defaults to runs/<study name>. A loaded ``model`` (with its ``tokenizer``) and
    ``train`` rows (a datasets.Dataset or a sequence of dicts; ``validation`` is split off where it
    is not given) take the place of model.name and data.name. The model is frozen, and its dropout
    turned off, in place. In a script that `accelerate launch` or `torchrun` starts several times,
    all processes call this and train every trial together, in a folder that all can read. Without
    ``report`` the page and the table are left to `rsauto report`.

    Raises InputError or BudgetError before anything is started, StudyInterrupted when the same
    call would continue, AllTrialsFailedError when no trial gave a result.
    """
    checked = _checked(config)
    folder = Path(out) if out is not None else Path("runs") / checked.name
    objects = Objects(model=model, tokenizer=tokenizer, train=train, validation=validation)
    if is_follower():
        follow()
        return load_study(folder)
    for _ in study_events(checked, folder, storage=storage, objects=objects, report=report):
        pass
    return load_study(folder)


def train(
    study: str | Path,
    *,
    trial: int | None = None,
    rank: int | None = None,
    best: bool = False,
    out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains what a study found at full length, without a word, or goes on with it.

    The recommended configuration unless a ``trial``, a ``rank`` or the ``best`` is asked for;
    ``out`` defaults to <study>/trained/<choice>. ``options`` are further fields of `Request`:
    steps, epochs, seed, num_evals, save_every, memory_budget, micro_batch_size, track. Returns what
    record.json holds: the trial's record and, under "test", the results on the test split.

    Raises InputError or BudgetError before anything is trained, StudyInterrupted where the same
    call would continue, AllTrialsFailedError where the training diverged.
    """
    place = None if out is None else Path(out)
    choice = Choice(trial=trial, rank=rank, best=best)
    job = resolve(Request(study=Path(study), choice=choice, out=place, **options))
    (values,) = (e.values for e in tracked(training_events(job), job) if isinstance(e, Finished))
    return values


def _checked(config: StudyConfig | Mapping[str, Any] | str | Path | None) -> StudyConfig:
    if isinstance(config, StudyConfig):
        return config
    if isinstance(config, Mapping):
        return study_file.validate(config)
    return study_file.load(None if config is None else Path(config))
