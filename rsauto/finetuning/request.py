"""What is to be trained: a trial of a study, the length and seed to train it with, and where to.

Everything here is read from the study folder alone, without torch, so that a wrong request is
told at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsauto import study_file
from rsauto.config import StudyConfig
from rsauto.errors import InputError, nearest
from rsauto.records import ADALORA_METHODS, TrialRecord, TrialSpec
from rsauto.report.choice import Choice, chosen_record
from rsauto.report.table import Study, load_study

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Each is the name of the package that it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One training, as it was asked for. Raises InputError with every value that cannot be."""

    study: Path
    """Folder of the study."""
    choice: Choice = field(default_factory=Choice)
    out: Path | None = None
    """None: <study>/trained/<choice>."""
    steps: int | None = None
    """Optimizer steps; None, and no epochs, takes the study's own full length."""
    epochs: float | None = None
    seed: int | None = None
    """Of initialisation and data order; None takes the trial's."""
    num_evals: int | None = None
    save_every: int | None = None
    """Steps between two checkpoints; None makes about ten over the run."""
    memory_budget: str | None = None
    """In place of the study's."""
    micro_batch_size: int | None = None
    """In place of the study's."""
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if problems := [*self._wrong_numbers(), *self._wrong_trackers()]:
            raise InputError(problems)

    def _wrong_numbers(self) -> list[str]:
        problems = []
        for option, value, least in (
            ("--steps", self.steps, 1),
            ("--seed", self.seed, 0),
            ("--evals", self.num_evals, 1),
            ("--save-every", self.save_every, 1),
        ):
            if value is not None and value < least:
                problems.append(f"{option} {value}: must be at least {least}.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            problems.append(f"--epochs {self.epochs:g}: must be a number above 0.")
        if self.steps is not None and self.epochs is not None:
            problems.append(
                f"--steps {self.steps} and --epochs {self.epochs:g} both say how long. Give one."
            )
        return problems

    def _wrong_trackers(self) -> list[str]:
        problems = []
        for name in self.track:
            if name not in TRACKERS:
                problems.append(
                    f"--track {name}: is not known.{nearest(name, TRACKERS)} Choose from "
                    f"{', '.join(TRACKERS)}; the option can be repeated."
                )
            elif find_spec(name) is None:
                problems.append(
                    f"--track {name}: the package {name} is not installed. Install it with "
                    f"pip install {name}, or leave the option out."
                )
        return problems


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request, and the trial that it is about."""

    request: Request
    study: Study
    config: StudyConfig
    """The study's, with the memory settings of the request."""
    record: TrialRecord

    @property
    def out(self) -> Path:
        default = self.study.folder / "trained" / self.request.choice.name
        return self.request.out or default

    @property
    def known_steps(self) -> int | None:
        """Steps to train, None where the data must be counted first."""
        if self.request.epochs is not None:
            return None
        return self.request.steps or full_length(self.record) or self.config.training.steps

    def steps(self, num_rows: int) -> int:
        """Steps to train, of data with ``num_rows`` training rows."""
        if self.known_steps is not None:
            return self.known_steps
        epochs = self.request.epochs or self.config.training.epochs
        assert epochs is not None, "a study says its steps or its epochs"
        return max(1, math.ceil(epochs * num_rows / self.record.batch_size))

    def spec(self, steps: int) -> TrialSpec:
        """The trial at a length of ``steps``, its micro-batch not chosen yet."""
        asked = self.request
        spec = spec_of(self.record, steps)
        seed = spec.seed if asked.seed is None else asked.seed
        return replace(spec, seed=seed, num_evals=min(asked.num_evals or spec.num_evals, steps))


def resolve(request: Request) -> Job:
    """Finds the study and the trial. Raises InputError where one of them is not there."""
    study = load_study(request.study)
    record = chosen_record(study, request.choice)
    if record.method in ADALORA_METHODS and record.allocation is None:
        raise InputError(
            f"--trial {record.number}: its record does not say how AdaLoRA placed its rank, so it "
            "cannot be trained again. It was written by an older version of rsauto; choose a trial "
            "of a newer one."
        )
    asked = {
        "memory_budget": request.memory_budget,
        "training.micro_batch_size": request.micro_batch_size,
    }
    is_changed = any(value is not None for value in asked.values())
    file = study.folder / "study.yaml"
    config = study_file.load(file, options=asked) if is_changed else study.config
    job = Job(request=request, study=study, config=config, record=record)
    evals, steps = request.num_evals, job.known_steps
    if evals is not None and steps is not None and evals > steps:
        raise InputError(f"--evals {evals}: must be at most the steps, which are {steps}.")
    return job


def full_length(record: TrialRecord) -> int | None:
    """Steps of the trial at its full length, also of one that was stopped; None if it never ran."""
    if not record.steps or not record.fidelity:
        return None
    return round(record.steps / record.fidelity)


_LEFT_TO_TRAINING = {
    "micro_batch_size", "product_order", "retry_of", "cohort", "cohort_size", "rank_pattern",
    "steps", "logging_steps", "activation_moments",
}  # fmt: skip


def spec_of(record: TrialRecord, steps: int) -> TrialSpec:
    """What was trained in a trial, at a length of ``steps``.

    AdaLoRA's warm-up and final phase keep their share of the run, rounded down. Its ranks are
    found anew; those of a refit are given.
    """
    names = {f.name for f in fields(TrialSpec)} - _LEFT_TO_TRAINING
    values: dict[str, Any] = {name: getattr(record, name) for name in names}
    values["num_evals"] = min(record.num_evals or 1, steps)
    if record.method not in ADALORA_METHODS and record.rank_pattern is not None:
        values["rank_pattern"] = tuple(record.rank_pattern.items())
    before = full_length(record)
    if record.allocation is not None and before is not None:
        chosen = record.allocation
        values["allocation"] = replace(
            chosen,
            tinit=chosen.tinit * steps // before,
            tfinal=chosen.tfinal * steps // before,
        )
    return TrialSpec(**values, steps=steps)
