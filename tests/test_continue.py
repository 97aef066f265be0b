"""What a continued study refuses, and what it forgives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import records, rows, study_values, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rsauto
from rsauto.base import BaseSource, open_base
from rsauto.config import ModelConfig, StudyConfig
from rsauto.errors import AllTrialsFailedError, InputError
from rsauto.memory import trace
from rsauto.search.ledger import Ledger
from rsauto.search.setup import Objects, set_up
from rsauto.search.storage import open_storage
from rsauto.study_file import validate


def run(folder: Path, trials: int, **options: Any) -> None:
    """One rank and no pruning: quick."""
    rsauto.run_study(values_of(folder, trials), out=folder / "out", **options, report=False)


def values_of(folder: Path, trials: int, **search: Any) -> dict[str, Any]:
    return study_values(folder, trials=trials, rank=[2], pruner="none", **search)


def test_a_torn_journal_costs_one_entry_not_the_study(tmp_path: Path) -> None:
    run(tmp_path, 3)
    journal = tmp_path / "out" / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-25])
    run(tmp_path, 4)
    run(tmp_path, 5)
    assert len([r for r in records(tmp_path / "out") if r["outcome"] != "infeasible"]) == 5


def test_a_lost_journal_is_told_before_records_are_overwritten(tmp_path: Path) -> None:
    run(tmp_path, 2)
    before = (tmp_path / "out" / "trials.jsonl").read_bytes()
    (tmp_path / "out" / "journal.log").unlink()
    with pytest.raises(InputError, match="storage lacks"):
        run(tmp_path, 2)
    assert (tmp_path / "out" / "trials.jsonl").read_bytes() == before


def test_another_study_of_that_name_in_the_storage_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    values = values_of(tmp_path, 2)
    rsauto.run_study(values, out=tmp_path / "one", storage=url, report=False)
    other = {**values, "training": {**values["training"], "optimizer": "sgd"}}
    with pytest.raises(InputError, match=r"training\.optimizer: was 'adamw', is 'sgd'"):
        rsauto.run_study(other, out=tmp_path / "two", storage=url, report=False)
    study = rsauto.run_study(
        values_of(tmp_path, 3), out=tmp_path / "one", storage=url, report=False
    )
    assert len(study.records) == 3


def test_other_weights_of_the_same_size_are_noticed(tmp_path: Path) -> None:
    run(tmp_path, 1)
    weights = tmp_path / "model" / "model.safetensors"
    changed = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    config = {**values_of(tmp_path / "other", 2), "model": {"name": str(tmp_path / "model")}}
    config["data"] = {"name": str(tmp_path / "data"), "max_length": 32}
    (tmp_path / "out" / "environment.json").unlink()
    with pytest.raises(InputError, match="model changed since"):
        rsauto.run_study(config, out=tmp_path / "out", report=False)


def test_the_same_model_in_another_place_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the study wrote its fingerprint as earlier versions did. Its plans hold, too."""
    values = values_of(tmp_path, 1)
    study = rsauto.run_study(values, out=tmp_path / "out", report=False)
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    monkeypatch.setattr(trace, "trace_step", lambda *_, **__: pytest.fail("traced again"))
    values["model"]["name"] = str(moved)
    source = open_base(ModelConfig(name=str(moved)))
    assert study.environment["fingerprints"]["model"] == source.fingerprint
    former = {**study.environment["fingerprints"], "model": source.former_fingerprint}
    for trials, before in ((2, None), (3, former)):
        if before is not None:
            store_fingerprints(tmp_path / "out", validate(values), before)
        values["search"]["trials"] = trials
        found = rsauto.run_study(values, out=tmp_path / "out", report=False)
        assert len(found.records) == trials
        assert found.environment["fingerprints"] == study.environment["fingerprints"]
    store_fingerprints(tmp_path / "out", validate(values), {**former, "model": "another"})
    with pytest.raises(InputError, match="model changed since"):
        rsauto.run_study(values, out=tmp_path / "out", report=False)
    with pytest.raises(InputError, match=r"model\.name: was .*moved', is 'embedded'"):
        rsauto.run_study({**values, "model": {"name": "embedded"}}, out=tmp_path / "out")


def store_fingerprints(folder: Path, config: StudyConfig, found: dict[str, str | None]) -> None:
    ledger = Ledger.open(open_storage(None, folder / "journal.log"), config)
    ledger.set_attribute("fingerprints", found)
    ledger.close()


def test_a_fingerprint_is_of_contents(tmp_path: Path) -> None:
    """Of configuration, header and weights; not of who wrote them, nor where they lie."""
    folder = write_model(tmp_path / "model")
    first = open_base(ModelConfig(name=str(folder)))
    stated = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()

    def now(changes: dict[str, Any]) -> BaseSource:
        (folder / "config.json").write_text(json.dumps({**stated, **changes}))
        return open_base(ModelConfig(name=str(folder)))

    by_another = now({"transformers_version": "4.0.0", "_name_or_path": "/elsewhere"})
    assert by_another.fingerprint == first.fingerprint
    prints = {first.fingerprint, now({"rms_norm_eps": 0.5}).fingerprint}
    for offset in (len(kept) - 1, kept.index(b"F32")):
        changed = bytearray(kept)
        changed[offset] ^= 1
        weights.write_bytes(changed)
        prints.add(now({}).fingerprint)
    assert len(prints) == 4


def test_failures_that_were_mended_do_not_end_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsauto.training import loop

    with monkeypatch.context() as broken, pytest.raises(AllTrialsFailedError):
        broken.setattr(loop, "accumulate_gradients", lambda *_: 1 / 0)
        run(tmp_path, 6)
    run(tmp_path, 6)
    assert "complete" in {r["outcome"] for r in records(tmp_path / "out")}


def test_every_choice_of_layers_is_checked_before_the_start(tmp_path: Path) -> None:
    values = values_of(tmp_path, 2, target_modules=[["q_proj"], ["q_prj"]])
    with pytest.raises(InputError, match=r"search.target_modules: .*'q_prj'.* 'q_proj'"):
        rsauto.run_study(values, out=tmp_path / "out", report=False)
    assert not (tmp_path / "out").exists()


def test_rows_beyond_the_positions_of_the_model_are_refused(tmp_path: Path) -> None:
    values = values_of(tmp_path, 2)
    long_rows = [{"prompt": "x", "completion": f" {n} down" * 30} for n in range(40)]
    with pytest.raises(InputError, match=r"data.max_length: .* positions for 64"):
        rsauto.run_study(
            {**values, "data": {"max_length": 256}}, out=tmp_path / "out", train=long_rows
        )


def test_a_loaded_model_is_planned_with_its_own_attention(tmp_path: Path) -> None:
    values = values_of(tmp_path, 2)
    del values["model"]
    values["data"] = {"max_length": 32}
    peaks = []
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation=attention, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        setup = set_up(validate(values), Objects(model, tokenizer, rows(64), rows(12, 100)))
        peaks.append(setup.smallest_prediction(setup.space.middle(2)).peak_bytes)
    assert peaks[0] != peaks[1]
