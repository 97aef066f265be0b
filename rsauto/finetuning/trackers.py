"""TensorBoard, W&B and trackio, each through its own package, fed from the events of a training.

Names are the same in all: train/loss, train/grad_norm, train/learning_rate and train/tokens after
every step, eval/<metric> after every evaluation, test/<metric> at the end. A training that is
continued goes on in the same run of each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rsauto.errors import InputError
from rsauto.finetuning.request import Job
from rsauto.finetuning.run import Event, Finished, Ready
from rsauto.records import StepPoint
from rsauto.search.events import TrialStep

PROJECT = "rsauto"
"""Of W&B, unless WANDB_PROJECT names another, and of trackio."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a training when it begins."""

    name: str
    training_id: str
    folder: Path
    settings: Mapping[str, Any]
    steps_done: int


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <folder>/tensorboard."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote of steps that are done again is hidden.
        self._writer: Any = SummaryWriter(
            str(run.folder / "tensorboard"),
            purge_step=run.steps_done + 1 if run.steps_done else None,
        )
        if not run.steps_done:
            rows = "".join(f"| {name} | {value} |\n" for name, value in run.settings.items())
            self._writer.add_text("settings", f"| | |\n|---|---|\n{rows}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of W&B, under the account and the mode (WANDB_MODE) that wandb itself finds."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.training_id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its own local store (TRACKIO_DIR)."""

    def __init__(self, run: Run) -> None:
        import trackio

        self._package: Any = trackio
        with redirect_stdout(sys.stderr):  # it speaks, and standard output may be for JSON alone
            trackio.init(
                project=PROJECT,
                name=f"{run.name} {run.training_id[:8]}",
                resume="allow",
                config=dict(run.settings),
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._package.finish()  # not the run's own, after which it is ended once more at exit


_KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio
}  # fmt: skip


def tracked(events: Iterable[Event], job: Job) -> Iterator[Event]:
    """The same events, each told to the trackers that were asked for.

    Raises InputError where one of them does not open, before the model is loaded.
    """
    trackers: list[Tracker] = []
    with ExitStack() as open_ones:
        for event in events:
            if isinstance(event, Ready):
                for name in dict.fromkeys(job.request.track):
                    trackers.append(_opened(name, _run(event, job)))
                    open_ones.callback(trackers[-1].close)
            elif isinstance(event, TrialStep):
                _tell(trackers, event.point.step, values_of(event.point))
            elif isinstance(event, Finished) and not event.was_finished:
                _tell(trackers, int(event.values["steps"]), held_out_values(event))
            yield event


def values_of(point: StepPoint) -> dict[str, float]:
    """What is logged of a step."""
    values = {
        "train/loss": point.train_loss,
        "train/grad_norm": point.grad_norm,
        "train/learning_rate": point.learning_rate,
        "train/tokens": float(point.tokens),
    }
    if point.evaluation is not None:
        found = {"loss": point.evaluation.eval_loss, **point.evaluation.metrics}
        values |= {f"eval/{name}": value for name, value in found.items()}
    return values


def held_out_values(event: Finished) -> dict[str, float]:
    """What is logged of the test split; nothing where there is none."""
    found = dict(event.values["test"] or {})
    found.pop("rows", None)
    names = {"eval_loss": "loss"}
    return {f"test/{names.get(k, k)}": v for k, v in found.items() if v is not None}


def _run(event: Ready, job: Job) -> Run:
    settings = asdict(event.spec) | {"trial": job.record.number, "study": job.config.name}
    return Run(
        name=f"{job.config.name}/{job.request.choice.name}",
        training_id=event.training_id,
        folder=job.out,
        settings={k: v for k, v in settings.items() if v is not None},
        steps_done=event.steps_done,
    )


def _opened(name: str, run: Run) -> Tracker:
    try:
        return _KINDS[name](run)
    except Exception as error:  # each package raises kinds of its own
        offline = " Log in with wandb login, or set WANDB_MODE=offline." * (name == "wandb")
        raise InputError(
            f"--track {name}: does not start: {type(error).__name__}: {error}.{offline} "
            "Nothing was trained; leave the option out to train without."
        ) from error


def _tell(trackers: Sequence[Tracker], step: int, values: Mapping[str, float]) -> None:
    if values:
        for tracker in trackers:
            tracker.log(step, values)
