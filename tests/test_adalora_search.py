"""AdaLoRA in a study: its place in the space and the order of trials, its records, its adapters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_study import records, study_values
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rsauto.adapters.adalora import add_adalora, allocator_of
from rsauto.adapters.lora import add_adapter, lora_layers
from rsauto.adapters.optimizers import parameter_groups
from rsauto.api import run_study
from rsauto.config import StudyConfig
from rsauto.records import AllocationSpec, TrialRecord, TrialSpec
from rsauto.search import books
from rsauto.search.agenda import finalists, may_prune, num_reserved, opening_trial, refit_trial
from rsauto.search.space import Space
from rsauto.study_file import validate

Records = Callable[..., TrialRecord]
PATTERN = {"q_proj": 5, "k_proj": 0, "v_proj": 3}


def space_of(steps: int = 50, adalora: dict[str, Any] | None = None, **search: Any) -> Space:
    search = {"strategy": "tpe", "method": ["rslora", "rsadalora"], "rank": [4, 16], **search}
    config: StudyConfig = validate(
        {"training": {"steps": steps, "num_evals": 1}, "search": search, "adalora": adalora or {}}
    )
    return Space(config, config.search.ranks, steps=steps, max_length=512)


def loss_of(record: TrialRecord) -> float | None:
    return record.eval_loss if record.outcome == "complete" else None


# --------------------------------------------------------------------------------- the space


def test_a_trial_has_the_schedule_that_the_shares_of_the_run_say() -> None:
    settings = {"init_ratio": 2.0, "warmup_share": 0.25, "final_share": 0.5, "interval": 3}
    spec = space_of(steps=40, adalora=settings).middle(4, "rsadalora")
    assert (spec.init_rank, spec.target_rank, spec.rank) == (8, 4, 4)
    assert spec.allocation is not None
    assert (spec.allocation.tinit, spec.allocation.tfinal, spec.allocation.delta_t) == (10, 20, 3)
    assert spec.scaling_rule == "rslora"
    assert space_of().middle(4, "rslora").allocation is None


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_initial_rank_is_rounded_up(rank: int) -> None:
    assert space_of(rank=[rank]).middle(rank, "rsadalora").init_rank == math.ceil(1.5 * rank)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_even_the_shortest_run_leaves_a_step_to_allocate_in(
    steps: int, llama: LlamaForCausalLM
) -> None:
    shares = {"warmup_share": 0.5, "final_share": 0.49}
    spec = space_of(steps=steps, adalora=shares).middle(4, "rsadalora")
    schedule = allocator_of(add_adalora(llama, spec)).config.schedule(1)
    assert schedule.tinit < schedule.final_step <= steps


def test_what_the_sampler_chose_is_found_again_in_the_trial() -> None:
    space = space_of(adalora={"lambda_lr_ratio": [1, 4, 16]}, method=["lora", "adalora"])
    choice = {"method": "adalora", "rank": 16, "log2_alpha": 4, "lambda_lr_ratio": 16.0,
              "log2_lr_offset": 0.5}  # fmt: skip
    spec = space.spec(choice)
    assert spec.lambda_lr_ratio == 16.0
    again = space.params(spec)
    assert again is not None and again.keys() == choice.keys()
    assert {k: v for k, v in again.items() if k != "log2_lr_offset"} == {
        k: v for k, v in choice.items() if k != "log2_lr_offset"
    }
    assert again["log2_lr_offset"] == pytest.approx(0.5, abs=1e-3)
    assert space.params(replace(spec, lambda_lr_ratio=2.0)) is None
    assert space.params(replace(spec, rank_pattern=(("q_proj", 3),))) is None


def test_a_grid_has_no_point_twice_where_a_setting_is_of_no_account() -> None:
    space = space_of(
        adalora={"lambda_lr_ratio": [1, 4]}, strategy="grid", learning_rate=[1e-3, 1e-2], alpha=[8]
    )
    specs = list(space.grid())
    assert len(specs) == len(set(specs)) == 2 * 2 * (1 + 2)


def test_no_law_moves_adaloras_learning_rates_with_rank() -> None:
    space = space_of()
    assert space.centre("rsadalora", 4) == space.centre("rsadalora", 16)
    assert space.centre("rslora", 4) > space.centre("rslora", 16)


def test_a_spec_survives_json() -> None:
    spec = space_of().middle(4, "rsadalora")
    assert TrialSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    refit = replace(spec, allocation=None, rank_pattern=(("a", 1), ("b", 2)))
    assert TrialSpec.from_json(json.loads(json.dumps(refit.to_json()))) == refit


# --------------------------------------------------------------------------------- the order


def settle(space: Space, record_of: Records, *trials: tuple[str, int, float, Any]) -> list[Any]:
    """Search trials of (method, rank, loss, rank pattern)."""
    settled = []
    for number, (method, rank, loss, pattern) in enumerate(trials):
        spec = space.middle(rank, method)  # type: ignore[arg-type]
        record = record_of(spec, number, loss, rank_pattern=pattern)
        settled.append((spec, record))
    return settled


def test_the_search_opens_with_every_rank_and_method(record_of: Records) -> None:
    space = space_of(trials=40)
    settled: list[Any] = []
    while (spec := opening_trial(space, settled)) is not None:
        settled.append((spec, record_of(spec, len(settled))))
    found = [(spec.rank, spec.method) for spec, _ in settled]
    assert found == list(itertools.product((4, 16), ("rslora", "rsadalora")))
    short = space_of(trials=20, seeds=1, rank=[2, 4, 8, 16])
    assert opening_trial(short, settle(short, record_of)) == short.middle(2, "rslora")
    first_only = settle(short, record_of, *[("rslora", r, 1.0, None) for r in (2, 4, 8, 16)])
    assert opening_trial(short, first_only) is None


def test_the_best_pattern_is_refitted_once_at_rsloras_own_rate(record_of: Records) -> None:
    space = space_of(trials=30)
    trials = [
        ("rslora", 16, 2.0, None),
        ("rsadalora", 16, 1.5, {"q_proj": 24, "k_proj": 8, "v_proj": 16}),
        ("rsadalora", 4, 1.0, PATTERN),
    ]
    settled = settle(space, record_of, *trials)
    refit = refit_trial(space, settled, loss_of)
    assert refit is not None
    assert (refit.role, refit.method, refit.rank) == ("refit", "rslora", 4)
    assert dict(refit.rank_pattern or ()) == {"q_proj": 5, "v_proj": 3}, "rank 0 is not adapted"
    assert refit.allocation is None and refit.init_rank is None and refit.lambda_lr_ratio is None
    rate = settled[0][0].learning_rate * (4 / 16) ** -0.25
    assert refit.learning_rate == pytest.approx(rate, rel=1e-3)
    settled.append((refit, record_of(refit, 3, 0.9)))
    assert refit_trial(space, settled, loss_of) is None
    assert refit in finalists(space, settled, loss_of, within=0.01)


def test_no_pattern_no_refit(record_of: Records) -> None:
    space = space_of(trials=30)
    assert refit_trial(space, settle(space, record_of, ("rslora", 4, 1.0, None)), loss_of) is None
    off = space_of(trials=30, adalora={"refit": False})
    settled = settle(off, record_of, ("rsadalora", 4, 1.0, PATTERN))
    assert refit_trial(off, settled, loss_of) is None
    assert num_reserved(space.config) == num_reserved(off.config) + 1


def test_adalora_is_pruned_only_once_its_ranks_are_fixed(record_of: Records) -> None:
    space = space_of(steps=50)
    settled = settle(space, record_of, ("rsadalora", 4, 1.0, PATTERN), ("rslora", 4, 1.0, None))
    spec = space.middle(4, "rsadalora")
    assert spec.allocation is not None and spec.allocation.tfinal == 15
    allowed = [step for step in range(1, 51) if may_prune(spec, step, settled)]
    assert allowed == list(range(35, 50))
    assert may_prune(space.middle(4, "rslora"), 1, settled)
    other = settle(space, record_of, ("rslora", 4, 1.0, None))
    assert not may_prune(spec, 40, other), "the only trial of its rank and method"


# --------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize(("method", "gamma"), [("rsadalora", 16 / 2), ("adalora", 16 / 4)])
def test_the_factor_follows_the_target_rank(
    method: str, gamma: float, llama: LlamaForCausalLM
) -> None:
    spec = replace(space_of(method=[method]).middle(4), alpha=16)
    factors = {layer.scaling["default"] for layer in lora_layers(add_adalora(llama, spec))}
    assert factors == {gamma}


def test_three_rates_for_three_factors(llama: LlamaForCausalLM) -> None:
    spec = space_of().middle(4, "rsadalora")
    adapted = add_adalora(llama, spec)
    groups = parameter_groups(
        adapted, learning_rate=1e-3, lr_ratio=2.0, lambda_lr_ratio=8.0, weight_decay=0.0
    )
    found = {group["name"]: (group["lr"], len(group["params"])) for group in groups}
    assert found == {"A": (1e-3, 14), "B": (2e-3, 14), "lambda": (8e-3, 14)}
    shapes = {group["name"]: group["params"][0].shape for group in groups}
    assert shapes == {"A": (6, 32), "B": (32, 6), "lambda": (6, 1)}


def test_a_refit_gives_every_module_its_rank_and_that_ranks_factor(
    llama: LlamaForCausalLM,
) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    spec = TrialSpec(
        role="refit",
        method="rslora",
        rank=4,
        alpha=16,
        scaling_rule="rslora",
        learning_rate=1e-3,
        rank_pattern=((names[0], 1), (names[1], 7)),
    )
    layers = list(lora_layers(add_adapter(llama, spec)))
    assert [layer.r["default"] for layer in layers] == [1, 7]
    assert [layer.scaling["default"] for layer in layers] == pytest.approx(
        [16.0, 16 / math.sqrt(7)]
    )


# --------------------------------------------------------------------------------- a whole study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, so the pattern is fixed after the fifth."""
    folder = tmp_path_factory.mktemp("adalora")
    values = study_values(
        folder, strategy="tpe", method=["rslora", "rsadalora"], rank=[2, 4], trials=18, seeds=2,
        pruner="none", min_improvement=0,
    )  # fmt: skip
    values["training"]["steps"] = 12
    values["adalora"] = {"recovery": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(books, "KEPT_ADAPTERS", 100)  # also of what is not among the best
        run_study(values, out=folder / "out", report=False)
    return folder


def test_records_say_where_the_rank_went(study: Path) -> None:
    found = [r for r in records(study / "out") if r["method"] == "rsadalora"]
    assert {r["outcome"] for r in found} == {"complete"} and len(found) >= 2
    for record in found:
        assert record["target_rank"] == record["rank"]
        assert record["init_rank"] == math.ceil(1.5 * record["rank"])
        assert len(record["rank_pattern"]) == 14
        assert sum(record["rank_pattern"].values()) == 14 * record["rank"]
        assert record["r_max"] == max(record["rank_pattern"].values())
        assert record["allocation"]["recovery"] == "none"
        assert record["lambda_lr_ratio"] == 4.0
        assert record["measured_peak_bytes"] <= 1.02 * record["predicted_peak_bytes"]


def test_the_refit_is_part_of_the_study(study: Path) -> None:
    refits = [r for r in records(study / "out") if r["role"] == "refit"]
    assert len(refits) == 1
    (refit,) = refits
    assert (refit["method"], refit["outcome"]) == ("rslora", "complete")
    assert refit["measured_peak_bytes"] == pytest.approx(refit["predicted_peak_bytes"], rel=0.02)
    patterns = [r["rank_pattern"] for r in records(study / "out") if r["method"] == "rsadalora"]
    kept = [{n: r for n, r in pattern.items() if r} for pattern in patterns]
    assert refit["rank_pattern"] in kept


def test_rank_allocation_is_not_pruned_away_by_the_export(study: Path) -> None:
    """Every adapter that was kept reloads in stock PEFT with the loss of its record."""
    from rsauto.base import open_base
    from rsauto.config import DataConfig, ModelConfig
    from rsauto.data import load_rows, tokenise
    from rsauto.training.evaluate import evaluate

    by_number = {r["number"]: r for r in records(study / "out")}
    kept = sorted((study / "out" / "adapters").iterdir())
    methods = {by_number[int(folder.name)]["method"] for folder in kept}
    assert "rsadalora" in methods
    source = open_base(ModelConfig(name=str(study / "model")), "CAUSAL_LM")
    config = DataConfig(name=str(study / "data"), max_length=32)
    data = tokenise(load_rows(config), config, source.tokenizer)
    for folder in kept:
        base = AutoModelForCausalLM.from_pretrained(study / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder)
        loss = evaluate(
            model, data.validation, batch_size=4, pad_token_id=data.pad_token_id,
            device=torch.device("cpu"),
        ).eval_loss  # fmt: skip
        assert loss == pytest.approx(by_number[int(folder.name)]["eval_loss"], abs=1e-5)


def test_an_allocation_is_read_back_from_a_newer_record() -> None:
    data = {"tinit": 1, "tfinal": 2, "something_new": 3}
    assert AllocationSpec.from_json(data) == AllocationSpec(tinit=1, tfinal=2)


def test_the_card_says_how_the_rank_is_spread(study: Path) -> None:
    by_number = {r["number"]: r for r in records(study / "out")}
    for folder in (study / "out" / "adapters").iterdir():
        record = by_number[int(folder.name)]
        card = (folder / "README.md").read_text(encoding="utf-8")
        differs = record["rank_pattern"] is not None
        assert (f"# LoRA adapter, rank {record['rank']} on average\n" in card) == differs
        assert (f"| a server must allow | rank {record['r_max']} |\n" in card) == differs
        is_adalora = record["method"] == "rsadalora"
        assert ("| learning rate of lambda | 4 times that of A |\n" in card) == is_adalora
