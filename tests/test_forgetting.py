"""Forgetting: the rise of the loss on a text that is not trained on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from examples import data_of
from tiny_study import study_values
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from rsauto.api import run_study
from rsauto.config import StudyConfig
from rsauto.data import Example
from rsauto.errors import InputError
from rsauto.records import TrialSpec
from rsauto.search.setup import set_up
from rsauto.study_file import validate
from rsauto.training.loop import evaluate_all
from rsauto.training.trial import Bench, Trial

CPU = torch.device("cpu")
TRAIN = tuple(Example((1, 2 + n % 3, 9, 9, 9), 1) for n in range(12))
GENERAL = (Example((1, 30, 31, 32, 33, 34), 1), Example((1, 40, 41, 42), 1))


def loss_by_hand(model: torch.nn.Module) -> float:
    """Mean over all counted tokens of the text, one sequence at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in GENERAL:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


def test_it_is_the_rise_over_the_untouched_model(llama: LlamaForCausalLM) -> None:
    data = data_of(TRAIN, TRAIN[:4], GENERAL)
    untouched = evaluate_all(llama, data, batch_size=2, device=CPU).metrics
    assert untouched["general_loss"] == pytest.approx(loss_by_hand(llama), abs=1e-6)
    assert "forgetting" not in untouched
    bench = Bench(
        model=llama,
        base_name="tiny",
        data=data,
        device=CPU,
        untouched_general_loss=untouched["general_loss"],
    )
    spec = TrialSpec(
        role="search", method="rslora", scaling_rule="rslora", rank=4, alpha=16,
        learning_rate=3e-2, batch_size=4, micro_batch_size=4, steps=20, num_evals=2,
    )  # fmt: skip
    with Trial(bench, spec) as trial:
        points = [p.evaluation for p in trial.steps() if p.evaluation is not None]
        assert trial._adapted is not None
        after = loss_by_hand(trial._adapted.eval())
    last = points[-1].metrics
    assert len(points) == 2
    assert last["general_loss"] == pytest.approx(after, abs=1e-5)
    assert last["forgetting"] == pytest.approx(after - untouched["general_loss"], abs=1e-5)
    assert last["forgetting"] > 0.1, "learning three rows by heart at this rate must forget"


def test_nothing_is_measured_unless_asked(llama: LlamaForCausalLM) -> None:
    found = evaluate_all(llama, data_of(TRAIN, TRAIN[:4]), batch_size=2, device=CPU)
    assert set(found.metrics) == {"perplexity", "token_accuracy", "exact_match"}


def test_a_study_measures_it_and_can_search_for_the_least(tmp_path: Path) -> None:
    values = study_values(tmp_path, trials=3, rank=[2, 4], objective="forgetting", seeds=1)
    values["data"]["forgetting"] = "english"
    study = run_study(values, out=tmp_path / "out", report=False)
    complete = [r for r in study.records if r.outcome == "complete"]
    assert complete and all(math.isfinite(r.metrics["forgetting"]) for r in complete)
    baseline = study.environment["baseline"]["metrics"]["general_loss"]
    for record in complete:
        rise = record.metrics["general_loss"] - baseline
        assert record.metrics["forgetting"] == pytest.approx(rise, abs=1e-6)
    assert StudyConfig.model_validate(values).search.minimize


def test_it_is_planned_for(tmp_path: Path) -> None:
    """Its sequences are as long as the longest row, and the plan evaluates that length."""
    values = study_values(tmp_path)
    values["data"]["forgetting"] = "english"
    setup = set_up(validate(values))
    longest = max(len(example.input_ids) for example in setup.data.general)
    assert longest == max(setup.data.train_length, setup.data.validation_length)


def test_as_an_objective_it_must_be_measured(tmp_path: Path) -> None:
    values = study_values(tmp_path, objective="forgetting")
    with pytest.raises(InputError, match=r"search\.objective: 'forgetting' is not measured"):
        set_up(validate(values))


def test_another_text_is_another_study(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ferry was late, and nobody minded. " * 20, encoding="utf-8")
    values = study_values(tmp_path, trials=1, rank=[2], seeds=1)
    values["data"]["forgetting"] = str(text)
    run_study(values, out=tmp_path / "out", report=False)
    text.write_text("Flour, water, salt and yeast make a loaf. " * 20, encoding="utf-8")
    values["search"]["trials"] = 2
    with pytest.raises(InputError, match=r"the text of data\.forgetting changed"):
        run_study(values, out=tmp_path / "out", report=False)
