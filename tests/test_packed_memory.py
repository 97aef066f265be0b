"""What a pack is predicted to need, against what torch's allocator says that it needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import study_values

from rsauto.config import StudyConfig
from rsauto.records import TrialSpec
from rsauto.search import pack_memory
from rsauto.search.pack_size import may_share
from rsauto.search.setup import Setup, set_up
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = study_values(tmp_path_factory.mktemp("study"))
    return {**found, "memory_budget": "64MiB", "pack_memory_budget": "1GiB"}


def setup_of(values: dict[str, Any], **changes: Any) -> Setup:
    merged = {**values}
    for section, part in changes.items():
        merged[section] = {**values.get(section, {}), **part} if isinstance(part, dict) else part
    return set_up(StudyConfig.model_validate(merged))


def needs(setup: Setup, specs: list[TrialSpec]) -> tuple[float, int]:
    """(predicted, measured) bytes of a pack."""
    loaded = setup.load_model()
    bench = Bench(
        model=loaded.model,
        base_name="tiny",
        data=setup.data,
        device=torch.device("cpu"),
        fresh_parameters=loaded.fresh_parameters,
    )
    rows = pack_memory.pack_rows(setup, specs)
    predicted = pack_memory.needed_bytes(setup, specs, rows, len(specs))
    tokens = pack_memory.tokens_of(setup, specs[0].batch_size, rows)
    with Pack(bench, optimizer="adamw", rows=rows, tokens=tokens) as pack:
        for spec in specs:
            pack.admit(replace(spec, steps=24, num_evals=2))
        for _ in range(24):
            pack.advance()
        assert pack.peak_bytes is not None
        return predicted / (1 + setup.planner.allowance), pack.peak_bytes


def trials(setup: Setup, ranks: list[int], **changes: Any) -> list[TrialSpec]:
    return [replace(setup.space.middle(rank), **changes) for rank in ranks]


@pytest.mark.parametrize("ranks", [[16, 16], [8] * 8, [2, 64, 16, 4, 8, 32]], ids=str)
def test_a_pack_needs_what_is_predicted(values: dict[str, Any], ranks: list[int]) -> None:
    predicted, measured = needs(setup := setup_of(values), trials(setup, ranks))
    # Not all rows of the longest batch that there can be need to have met; mixed ranks are bounded.
    assert measured <= 1.005 * predicted
    assert measured > 0.9 * predicted


def test_trials_of_different_layers_do_not_share_a_pack(values: dict[str, Any]) -> None:
    setup = setup_of(values, search={"target_modules": ["all-linear", "attention"]})
    first, second = trials(setup, [4, 8])
    assert may_share(second, [first])
    assert not may_share(replace(second, target_modules="attention"), [first])


@pytest.mark.parametrize("score", ["full", "lambda"])
@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.sample(1)
def test_packs_of_adalora_are_predicted_as_well(
    values: dict[str, Any], score: str, recovery: str
) -> None:
    setup = setup_of(
        values,
        search={"method": ["rsadalora"]},
        training={"steps": 24},
        adalora={"score": score, "recovery": recovery},
    )
    predicted, measured = needs(setup, trials(setup, [8, 8, 32, 4]))
    assert 0.85 * predicted < measured <= 1.01 * predicted


def test_long_evaluation_rows_count(values: dict[str, Any], tmp_path: Path) -> None:
    """Evaluation is where the peak is, and one batch's logits are gone before the next one's."""
    long = tmp_path / "long.jsonl"
    row = '{"prompt": "1 down:", "completion": " ' + "1 2 3 4 5 6 " * 3 + '"}\n'
    long.write_text(row * 12, encoding="utf-8")
    train = Path(values["data"]["name"]) / "train.jsonl"
    data = {"name": str(train), "validation_file": str(long), "max_length": 64}
    setup = setup_of({**values, "data": data})
    predicted, measured = needs(setup, trials(setup, [4] * 4))
    assert 0.97 * predicted < measured <= 1.005 * predicted


def test_more_than_there_is_cannot_be_planned_for(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(values)
    assert pack_memory.pack_budget_bytes(setup) == 2**30
    assert pack_memory.pack_budget_bytes(setup_of({**values, "pack_memory_budget": None})) == 2**26
    monkeypatch.setattr(pack_memory, "device_bytes", lambda _: 2**20)
    assert pack_memory.pack_budget_bytes(setup) == 2**20
