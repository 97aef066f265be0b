"""Optuna's own studies as our table, and our studies in Optuna's own tools."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pandas as pd
import pytest
from optuna import visualization
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import rsauto
from rsauto.errors import InputError
from rsauto.optuna_table import trials_of
from rsauto.report.noise import configurations
from rsauto.report.table import load_study

REPORTS = Path(__file__).parents[1] / "reports"
OURS = "gsm8k-10m"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    """A committed study in its journal, of which the copy may be written."""
    journal = tmp_path_factory.mktemp("journal") / "journal.log"
    shutil.copy(REPORTS / OURS / "journal.log", journal)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name=OURS, storage=storage)


def test_a_study_of_ours_is_its_own_table(ours: optuna.Study) -> None:
    theirs = load_study(REPORTS / OURS).trials
    pd.testing.assert_frame_equal(trials_of(ours), theirs)


def suggested(trial: optuna.Trial) -> float:
    """What people write: their own names, peft's attributes, a pruned and a failed trial."""
    rank = trial.suggest_categorical("lora_r", [4, 16, 64])
    rate = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
    trial.suggest_float("lora_dropout", 0.0, 0.1)
    trial.set_user_attr("accelerator_memory_max", 1000 * rank)
    trial.set_user_attr("num_params", 10 * rank)
    trial.set_user_attr("accuracy", 0.5)
    trial.set_user_attr("note", {"nested": 1})
    trial.set_constraint("memory", 1.0 if rank == 64 else -1.0)
    if rate < 1e-4:
        raise RuntimeError("this one fails")
    for step in (10, 20):
        trial.report(3.0 - step / 20, step)
        if rate < 2e-4:
            raise optuna.TrialPruned
    return 2.0 - rank / 100


@pytest.fixture(scope="module")
def foreign() -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for rank, rate in ((4, 1e-3), (16, 2e-3), (64, 1e-3), (16, 5e-5), (4, 1.5e-4)):
        study.enqueue_trial({"lora_r": rank, "lr": rate})
    study.enqueue_trial({"lora_r": 4, "lr": 1e-3})
    study.optimize(suggested, n_trials=5, catch=RuntimeError)
    return study


def test_names_outcomes_and_values_are_taken_over(foreign: optuna.Study) -> None:
    trials = rsauto.trials_of(foreign)
    assert trials["number"].tolist() == [0, 1, 2, 3, 4], "what waits has not settled"
    assert trials["outcome"].tolist() == ["complete"] * 3 + ["failed", "pruned"]
    assert trials["rank"].tolist() == [4, 16, 64, 16, 4]
    assert trials["learning_rate"].tolist() == [1e-3, 2e-3, 1e-3, 5e-5, 1.5e-4]
    assert trials["measured_peak_bytes"].tolist() == [4000, 16000, 64000, 16000, 4000]
    assert trials["accelerator_memory_max"].equals(
        trials["measured_peak_bytes"].rename("accelerator_memory_max")
    )
    assert trials["eval_loss"].tolist()[:3] == pytest.approx([1.96, 1.84, 1.36])
    assert trials["eval_loss"].isna().tolist() == [False, False, False, True, False]
    assert trials["eval_loss"][4] == 2.5 and trials["fidelity"][4] == 0.5
    assert trials["feasible"].tolist() == [True, True, False, True, True]
    assert trials["param_lora_dropout"].notna().all()
    assert (trials["accuracy"] == 0.5).all() and "note" not in trials.columns
    assert str(trials["rank"].dtype) == "Int64" and str(trials["method"].dtype) == "string"
    assert (trials["trial_seconds"] >= 0).all()


def test_the_two_questions_can_be_asked_of_it(foreign: optuna.Study) -> None:
    trials = trials_of(foreign)
    front = rsauto.pareto(trials, x="num_trainable_params")
    assert front["rank"].tolist() == [4, 16]
    assert rsauto.select_rank(trials, within=0.0)["rank"] == 16
    assert rsauto.select_rank(trials, within=0.0, parameters=100)["rank"] == 4
    assert rsauto.select_rank(trials, memory_budget=5000)["rank"] == 4


def test_other_parameters_tell_configurations_apart() -> None:
    study = optuna.create_study()
    for dropout in (0.0, 0.0, 0.1):
        study.enqueue_trial({"lora_r": 8, "dropout": dropout})

    def loss(trial: optuna.Trial) -> float:
        trial.suggest_int("lora_r", 1, 64)
        return trial.suggest_float("dropout", 0.0, 0.1) + trial.number

    study.optimize(loss, n_trials=3)
    rows = configurations(trials_of(study))
    assert rows["eval_loss"].tolist() == pytest.approx([0.5, 2.1])
    assert rows["num_seeds"].tolist() == [2, 1]


def test_own_names_and_several_objectives() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda t: (float(t.suggest_int("width", 1, 8)), 0.5), n_trials=2)
    names = {"width": "rank"}
    trials = trials_of(study, objective=["eval_loss", "accuracy"], columns=names)
    assert (trials["rank"].astype(float) == trials["eval_loss"]).all()
    assert (trials["accuracy"] == 0.5).all() and trials["feasible"].all()
    with pytest.raises(InputError, match="has 2 values a trial, and 1 of them is named"):
        trials_of(study)
    with pytest.raises(InputError, match=r"'width' cannot become 'rnk'.*Did you mean .*rank"):
        trials_of(study, objective=["eval_loss", "accuracy"], columns={"width": "rnk"})


@pytest.mark.parametrize(("direction", "best"), [("minimize", 4), ("maximize", 16)])
def test_the_studys_direction_says_which_value_is_better(direction: str, best: int) -> None:
    """Under whatever name: nothing in val_loss says to us that less is better."""
    study = optuna.create_study(direction=direction)
    for rank in (4, 16):
        study.enqueue_trial({"rank": rank})
    study.optimize(lambda t: float(t.suggest_int("rank", 1, 16)), n_trials=2)
    for name in ("val_loss", "eval_loss"):
        trials = trials_of(study, objective=name)
        assert rsauto.select_rank(trials, objective=name, within=0)["rank"] == best
        assert trials.attrs["minimize"] == {name: direction == "minimize"}


def test_what_a_trial_noted_does_not_change_its_number_or_outcome() -> None:
    study = optuna.create_study()

    def loss(trial: optuna.Trial) -> float:
        trial.set_user_attr("number", 7)
        trial.set_user_attr("outcome", "splendid")
        return float(trial.suggest_int("rank", 4, 4))

    study.optimize(loss, n_trials=1)
    trials = trials_of(study)
    assert trials["number"].tolist() == [0] and trials["outcome"].tolist() == ["complete"]


def test_a_value_that_the_column_cannot_hold_is_named() -> None:
    study = optuna.create_study()
    study.optimize(lambda t: float(len(t.suggest_categorical("rank", ["small"]))), n_trials=1)
    with pytest.raises(InputError, match=r"rank: a trial has 'small', .* whole numbers"):
        trials_of(study)
    assert trials_of(optuna.create_study()).empty


@pytest.mark.parametrize(
    "plot",
    ["optimization_history", "parallel_coordinate", "slice", "intermediate_values", "timeline",
     "contour", "rank", "edf", "param_importances"],
)  # fmt: skip
def test_ours_opens_in_optunas_plots(ours: optuna.Study, plot: str) -> None:
    figure = getattr(visualization, f"plot_{plot}")(ours)
    assert figure.data


def test_ours_opens_in_optuna_dashboard(ours: optuna.Study) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    app = dashboard.wsgi(ours._storage)

    def get(path: str) -> Any:
        environ: dict[str, Any] = {"PATH_INFO": path, "wsgi.input": io.BytesIO()}
        setup_testing_defaults(environ)
        said: list[str] = []
        body = b"".join(app(environ, lambda status, *_: said.append(status)))
        assert said == ["200 OK"]
        return json.loads(body)

    (listed,) = get("/api/studies")["study_summaries"]
    assert listed["study_name"] == OURS
    found = get(f"/api/studies/{listed['study_id']}")["trials"]
    assert len(found) == len(ours.get_trials(deepcopy=False))
    assert {param["name"] for param in found[0]["params"]} >= {"rank", "learning_rate"}
