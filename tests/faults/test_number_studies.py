"""Studies whose model or rates give no numbers: told before a trial, or divergences in a report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from packs import unmetered
from safetensors.torch import load_file, save_file
from tiny_study import records, rows, study_values

import rsauto
from rsauto.errors import InputError
from rsauto.records import EvalPoint
from rsauto.search import pack_size, pruning
from rsauto.search.books import Books
from rsauto.search.objective import Objective
from rsauto.search.setup import set_up
from rsauto.study_file import validate
from rsauto.training.trial import Bench, untouched

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]

Weights = dict[str, torch.Tensor]


def values_of(folder: Path, **search: Any) -> dict[str, Any]:
    """Four search trials, the defaults, and no repeated seeds."""
    found = study_values(folder, **{"trials": 6, "rank": [2, 4], "seeds": 1, **search})
    return {**found, "packing": {"mode": "off"}}


def with_weights(values: dict[str, Any], change: Callable[[Weights], None]) -> dict[str, Any]:
    path = Path(values["model"]["name"]) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return values


def with_config(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    path = Path(values["model"]["name"]) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return values


def one_nan(weights: Weights) -> None:
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan


def ten_million_times(weights: Weights) -> None:
    """More than half precision holds, as activations of some bfloat16 models are."""
    weights["model.layers.0.mlp.down_proj.weight"] *= 3e7


def sure_of_everything(weights: Weights) -> None:
    """Thousands of nats a token: a number, but its perplexity is none."""
    weights["model.norm.weight"] *= 1e5


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (one_nan, {}, "eval_loss nan as it is.*weights hold nan or inf, or .* in float32"),
        (
            ten_million_times,
            {"model": {"dtype": "float16"}},
            "eval_loss nan .* overflow in float16",
        ),
        (sure_of_everything, {"search": {"objective": "perplexity"}}, "perplexity inf as it is"),
    ],
)
def test_a_model_that_gives_no_numbers_is_told_before_any_trial(
    change: Callable[[Weights], None], settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    values = with_weights(values_of(tmp_path), change)
    for section, part in settings.items():
        values[section] = {**values[section], **part}
    for _ in range(2):  # what was measured the first time is not taken for sound the second
        with pytest.raises(InputError, match=f"^model.name: .* gives {told}"):
            rsauto.run_study(values, out=tmp_path / "out")
    assert records(tmp_path / "out") == []


def test_what_overflows_float16_is_a_number_in_the_advised_dtypes(tmp_path: Path) -> None:
    values = with_weights(values_of(tmp_path), ten_million_times)
    found = []
    for dtype in ("bfloat16", "float32"):
        setup = set_up(validate({**values, "model": {**values["model"], "dtype": dtype}}))
        model = setup.load_model().model
        bench = Bench(model=model, base_name="tiny", data=setup.data, device=setup.device)
        found.append(untouched(bench, 4).eval_loss)
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"vocab_size": 2000},
            r"1 weights .*embed_tokens.weight is \(1024, 32\) and .* \(2000, 32\)",
        ),
        ({"intermediate_size": 128}, r"6 weights of .* another shape than its config.json"),
        ({"num_hidden_layers": 0}, "it has no linear layers"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_named(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    values = with_config(values_of(tmp_path), **changes)
    with pytest.raises(InputError, match=told):
        rsauto.run_study(values, out=tmp_path / "out")


def test_a_study_of_which_every_trial_diverges_ends_with_a_readable_report(tmp_path: Path) -> None:
    """A token that only training rows have is no number, so that evaluations are fine."""
    values, out = values_of(tmp_path), tmp_path / "out"
    marked = [{**row, "prompt": "q" + row["prompt"]} for row in rows(64)]
    train = Path(values["data"]["name"]) / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in marked), encoding="utf-8")
    data = set_up(validate(values)).data
    seen = {token for example in data.validation for token in example.input_ids}
    own = sorted({token for example in data.train for token in example.input_ids} - seen)

    def spoil(weights: Weights) -> None:
        embeddings = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embeddings.clone()
        embeddings[own] = math.nan

    rsauto.run_study(with_config(with_weights(values, spoil), tie_word_embeddings=False), out=out)
    found = records(out)
    assert len(found) == 6
    assert {(r["outcome"], r["error"]) for r in found} == {("diverged", "step 1: loss nan")}
    assert not (out / "best").exists()
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "None of 6 trials finished at full length" in report
    assert "| diverged | step 1: loss nan |" in report


# ------------------------------------------------------------ what harms, alone and packed


@pytest.fixture
def packs_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)


@pytest.mark.usefixtures("packs_are_faster")
def test_a_trial_that_harms_at_its_very_end_has_diverged_in_a_pack_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No rate makes this little model much worse than it begins: here "worse" begins below that.
    monkeypatch.setattr(pruning, "HARM", 0.9975)
    values = values_of(
        tmp_path, strategy="grid", pruner="none", rank=[2], alpha=[8], learning_rate=[1e-4, 3e-2]
    )
    values = {**values, "memory_budget": "1GiB", "training": {**values["training"], "num_evals": 2}}
    outcomes = []
    for mode in ("off", "auto"):
        out = tmp_path / mode
        rsauto.run_study({**values, "packing": {"mode": mode, "trials": 4}}, out=out)
        found = [r for r in records(out) if r["role"] == "search"]
        assert {r["engine"] for r in found} == {"peft" if mode == "off" else "packed"}
        outcomes.append({(r["rank"], r["learning_rate"]): r["outcome"] for r in found})
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0].values()) == {"complete", "diverged"}


def test_an_objective_that_is_no_number_is_a_divergence() -> None:
    """The loss of a trial may be one while its perplexity is not."""
    objective = Objective("perplexity", True, untouched=20.0, untouched_loss=3.0)
    books = cast(Books, SimpleNamespace(objective=objective))
    point = EvalPoint(step=4, train_loss=3.0, eval_loss=800.0, grad_norm=1.0,
                      metrics={"perplexity": math.inf})  # fmt: skip
    ending = Books.harm(books, [point])
    assert ending == ("diverged", "step 4: perplexity inf")
