"""One trial that has the device for itself."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from rsauto.records import Outcome, TrialRecord, TrialSpec
from rsauto.search.attempts import Attempt
from rsauto.search.books import Books
from rsauto.search.events import Event, TrialStarted, TrialStep
from rsauto.search.history import Settled
from rsauto.search.write_up import trial_record
from rsauto.training.loop import Diverged
from rsauto.training.spread import ProcessLost
from rsauto.training.trial import Bench, OutOfMemory, Trial


def run_alone(
    books: Books, bench: Bench, trial: Attempt, spec: TrialSpec, known: Settled
) -> Generator[Event, None, TrialRecord]:
    """Trains and settles a trial; one that does not fit the budget is settled without."""
    prediction = books.setup.predict(spec)
    if prediction is None:
        return books.refuse(trial, spec)
    size, order = prediction.micro_batch_size, prediction.product_order
    spec = replace(spec, micro_batch_size=size, product_order=order)
    yield TrialStarted(trial.number, spec, prediction)
    with Trial(bench, spec) as run:
        outcome, error = yield from _train(books, trial, run, known)
        record = trial_record(trial.number, run, spec, prediction, outcome, error)
        if outcome == "complete":
            record = _saved(books, run, record)
        record = books.settle(trial, record)
    books.keep_adapters()
    return record


def _saved(books: Books, run: Trial, record: TrialRecord) -> TrialRecord:
    """The record of a trial whose adapter is written; where it cannot be, that is its outcome."""
    folder, card = books.place_of(record)
    try:
        return replace(record, adapter_bytes=run.save(folder, card))
    except OutOfMemory as full:
        return replace(record, outcome="oom", error=str(full))
    except OSError:
        raise  # a disk without room is the study's matter
    except Exception as bug:  # one faulty trial must not end the study
        return replace(record, outcome="failed", error=f"{type(bug).__name__}: {bug}")


def _train(
    books: Books, trial: Attempt, run: Trial, known: Settled
) -> Generator[Event, None, tuple[Outcome, str | None]]:
    """Runs the trial's steps; an error inside becomes its outcome."""
    points = run.steps()
    while True:
        try:
            point = next(points)
        except StopIteration:
            return "complete", None
        except OutOfMemory as full:
            return "oom", str(full)
        except Diverged as diverged:
            return "diverged", str(diverged)
        except ProcessLost:
            books.abandon(trial)
            raise
        except Exception as bug:  # one faulty trial must not end the study
            return "failed", f"{type(bug).__name__}: {bug}"
        yield TrialStep(trial.number, run.spec, point, run.measured_peak_bytes)
        if books.stop.requested:
            books.abandon(trial)
            books.stop_if_asked()
        if point.evaluation is not None:
            ending = books.report(trial, run.spec, run.curve, known)
            if ending is not None:
                return ending
