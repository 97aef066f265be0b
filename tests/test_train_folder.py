"""What `rsauto train` finds in its folder: another process's end, and files that are spoiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import study_values

import rsauto
from rsauto.atomic import beside
from rsauto.errors import InputError, StudyInterrupted
from rsauto.finetuning.request import Job, Request, resolve
from rsauto.finetuning.run import Finished, Remark, training_events
from rsauto.search.events import Stage, TrialStep
from rsauto.search.folder import StudyFolder
from rsauto.stop import StopFlag


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trial."""
    folder = tmp_path_factory.mktemp("study")
    values = study_values(
        folder, strategy="grid", trials=1, seeds=1, rank=[4], alpha=[8], learning_rate=[0.02]
    )
    values["packing"] = {"mode": "off"}
    rsauto.run_study(values, out=folder / "out", report=False)
    return folder / "out"


def job_in(out: Path, study: Path) -> Job:
    return resolve(Request(study=study, out=out))


def stopped(job: Job) -> None:
    """A training that is asked to stop in its second step."""
    stop = StopFlag()
    with pytest.raises(StudyInterrupted):
        for event in training_events(job, stop):
            stop.requested |= isinstance(event, TrialStep) and event.point.step == 2


def test_what_another_process_finished_meanwhile_is_left_alone(study: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path / "out", study)
    late = training_events(job)
    assert isinstance(next(late), Stage), "it has seen that nothing is finished"
    (first,) = (event for event in training_events(job) if isinstance(event, Finished))
    adapter = job.out / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    (told,) = late
    assert isinstance(told, Finished) and told.was_finished and told.values == first.values
    assert adapter.stat().st_mtime_ns == written


def test_a_record_of_something_else_is_named(study: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path / "out", study)
    list(training_events(job))
    (job.out / "record.json").write_text(json.dumps({"number": 0}))
    with pytest.raises(InputError, match=r"record\.json: is not what rsauto train wrote"):
        list(training_events(job))


def test_a_finished_training_without_its_adapter_says_how_to_make_it_anew(
    study: Path, tmp_path: Path
) -> None:
    job = job_in(tmp_path / "out", study)
    (first,) = (event for event in training_events(job) if isinstance(event, Finished))
    shutil.rmtree(job.out / "adapter")
    # Of a process that was killed while it wrote the adapter.
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = beside(job.out / "adapter", "partial")
    left = left.with_name(left.name.replace(str(os.getpid()), str(dead.pid)))
    left.mkdir()
    with pytest.raises(InputError, match=r"its adapter, .* is gone\. .* remove .*record\.json and"):
        list(training_events(job))
    (job.out / "record.json").unlink()
    (again,) = (event for event in training_events(job) if isinstance(event, Finished))
    assert not again.was_finished and (job.out / "adapter" / "adapter_config.json").exists()
    assert again.values["eval_loss"] == first.values["eval_loss"]
    assert not left.exists()


def test_another_process_at_the_same_training_is_named(study: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path / "out", study)
    says = f"pid {os.getpid()}\\) is working on this training"
    with StudyFolder(job.out).locked("training"), pytest.raises(InputError, match=says):
        list(training_events(job))


def test_moments_of_another_adapter_are_refused(study: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path / "out", study)
    stopped(job)
    for path in (job.out / "checkpoints").glob("step-*/optimizer.safetensors"):
        save_file({**load_file(path), "other.weight|exp_avg": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"cannot be continued: .* other\.weight, .* Remove the"):
        list(training_events(job))


def test_where_no_checkpoint_can_be_read_it_says_that_it_begins_anew(
    study: Path, tmp_path: Path
) -> None:
    job = job_in(tmp_path / "out", study)
    stopped(job)
    found = sorted((job.out / "checkpoints").glob("step-*/progress.json"))
    assert len(found) == 2
    for path in found:
        path.write_text("{")
    remarks = [e.text for e in training_events(job) if isinstance(e, Remark)]
    assert [text.rpartition("; ")[2] for text in remarks] == [
        "going on from the one before",
        "beginning anew",
    ]
