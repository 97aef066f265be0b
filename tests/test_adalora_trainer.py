"""AdaLoRA in transformers' Trainer, and training that goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_adalora_parity import (
    LLAMA_TARGETS,
    adamw,
    adapted,
    batch,
    kept,
    logits_of,
    tiny_llama,
    train,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from rsauto import RsAdaLoraCallback
from rsauto.adalora.model import svd_layers

ROWS = 64
STEPS = 16
TARGET = 2 * 2 * len(LLAMA_TARGETS)


def rows(count: int = ROWS) -> list[dict[str, Tensor]]:
    drawn = batch(5, count)
    return [{name: values[n] for name, values in drawn.items()} for n in range(count)]


def trainer_of(
    model: torch.nn.Module,
    out: Path,
    *,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> Trainer:
    """Two passes over 64 rows in batches of 8: 16 optimizer steps."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 3,
        "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **{**settings, **changes})
    callbacks = [RsAdaLoraCallback()] if callbacks is None else callbacks
    dataset: Any = rows()
    return Trainer(
        model, arguments, train_dataset=dataset, eval_dataset=dataset[:16], callbacks=callbacks
    )


class Watch(TrainerCallback):
    """The rank budget in use after every step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.ranks.append(sum(model.base_model.rank_pattern().values()))


def factors_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_same_run(model: PeftModel, other: PeftModel) -> None:
    """Factors, masks and importance are equal to the last bit."""
    ours, theirs = factors_of(model), factors_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert model.base_model.rank_pattern() == other.base_model.rank_pattern()
    pairs = zip(svd_layers(model.base_model), svd_layers(other.base_model), strict=True)
    for (_, one), (_, two) in pairs:
        first, second = one.triplets["default"], two.triplets["default"]
        assert torch.equal(first.mask, second.mask)
        assert (first.importance is None) == (second.importance is None)
        if first.importance is not None and second.importance is not None:
            states = zip(first.importance.tensors(), second.importance.tensors(), strict=True)
            assert all(torch.equal(*state) for state in states)


# --- the callback


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_the_callback_drives_the_allocation(tmp_path: Path, recovery: str) -> None:
    model = adapted(total_step=9999, recovery=recovery)
    watch = Watch()
    trainer_of(model, tmp_path, callbacks=[RsAdaLoraCallback(), watch]).train()
    config = model.base_model.config_of("default")
    assert (config.total_step, config.tinit, config.tfinal) == (STEPS, 3, 5)
    budget = config.schedule(num_modules=6)
    assert watch.ranks == [budget.budget(step) for step in range(1, STEPS + 1)]
    assert watch.ranks[:3] == [36] * 3 and watch.ranks[-6:] == [TARGET] * 6
    assert sum(sum(flags) for flags in kept(model).values()) == TARGET
    sizes = sum(len(layer.lora_E["default"]) for _, layer in svd_layers(model))
    assert sizes == (TARGET if recovery == "none" else 36)


def test_shares_of_the_run_take_the_place_of_steps(tmp_path: Path) -> None:
    model = adapted(total_step=None, tinit=0, tfinal=0)
    watch = Watch()
    callbacks = [RsAdaLoraCallback(warmup_share=0.25, final_share=0.5), watch]
    trainer_of(model, tmp_path, callbacks=callbacks).train()
    config = model.base_model.config_of("default")
    assert (config.total_step, config.tinit, config.tfinal) == (STEPS, 4, 8)
    assert watch.ranks[3:6] == [36, 22, 15] and watch.ranks[7:] == [TARGET] * 9


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"warmup_share": 1.0}, "warmup_share: 1.0 must be at least 0 and below 1, or None."),
        ({"final_share": -0.1}, "final_share: -0.1 must be at least 0 and below 1, or None."),
        (
            {"warmup_share": 0.5, "final_share": 0.5},
            "warmup_share 0.5 and final_share 0.5 leave no part of the run to allocate ranks in. "
            "Lower them.",
        ),
    ],
)
def test_shares_that_leave_nothing_are_refused(shares: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        RsAdaLoraCallback(**shares)
    assert str(refused.value) == text


def test_a_run_too_short_for_its_phases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tinit 3 and tfinal 5 leave no step .* total_step 8"):
        trainer_of(adapted(), tmp_path, num_train_epochs=1).train()


@pytest.mark.parametrize("kind", ["lora", "bare"])
def test_the_model_of_another_method_is_refused(tmp_path: Path, kind: str) -> None:
    model: Any = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError,
        match=r"RsAdaLoraCallback: the model is a \w+ without an RsAdaLoraConfig. Wrap it with",
    ):
        trainer_of(model, tmp_path).train()


def test_a_trainer_is_the_same_as_a_loop_by_hand(tmp_path: Path) -> None:
    """The rows in the trainer's own order, whatever that is."""
    seen: list[Tensor] = []

    class Recording(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    model = adapted(total_step=STEPS)
    trainer = trainer_of(model, tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant")
    trainer.__class__ = Recording
    trainer.train()
    hand = adapted(total_step=STEPS)
    optimizer = adamw(hand, weight_decay=0.0)
    for step, ids in enumerate(seen, start=1):
        hand(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        hand.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert len(seen) == STEPS
    assert hand.base_model.rank_pattern() == model.base_model.rank_pattern()
    torch.testing.assert_close(logits_of(hand), logits_of(model), atol=1e-5, rtol=0)


def test_the_loss_of_an_evaluation_is_cross_entropy_alone(tmp_path: Path) -> None:
    model = adapted(orth_reg_weight=5.0)
    trainer = trainer_of(model, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    reported = trainer.evaluate()["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in rows()[:16]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert reported == pytest.approx(expected.item(), abs=1e-5)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(logged) < 6, "5 times the mean of two norms would be far above ln 64"


def test_the_regulariser_is_not_multiplied_by_micro_batches(tmp_path: Path) -> None:
    models = []
    for micro_batches in (1, 4):
        model = adapted(orth_reg_weight=2.0)
        trainer_of(
            model,
            tmp_path,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        ).train()
        models.append(model)
    one, four = map(factors_of, models)
    assert models[0].base_model.rank_pattern() == models[1].base_model.rank_pattern()
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=1e-5, rtol=0)


# --- from a checkpoint

MOMENTS = {"before": 2, "during": 7, "last-of-all": 11, "final": 13}
"""Steps of a checkpoint: before, during and after ranks are allocated (4 to 11)."""


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.sample(3)
def test_a_trainer_resumes_as_if_it_had_not_stopped(
    tmp_path: Path, moment: str, recovery: str
) -> None:
    """Into another adapter on another base; with deltaT 3 the masks at step 7 are those of 6."""
    save: dict[str, Any] = {"save_strategy": "steps", "save_steps": MOMENTS[moment]}
    options: dict[str, Any] = {"recovery": recovery, "deltaT": 3}
    straight = adapted(**options)
    trainer_of(straight, tmp_path, **save).train()
    checkpoint = tmp_path / f"checkpoint-{MOMENTS[moment]}"
    resumed = adapted(seed=9, **options)
    trainer_of(resumed, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(resumed, straight)
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    saved = load_file(checkpoint / "adapter_model.safetensors")
    factors = [t.shape for name, t in saved.items() if name[-6:] in ("lora_A", "lora_E", "lora_B")]
    assert sorted(state["exp_avg"].shape for state in moments.values()) == sorted(factors)


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("score", ["full", "lambda"])
@pytest.mark.parametrize("stop", [1, 8, 17])
@pytest.mark.sample(4)
def test_a_loop_by_hand_resumes_as_if_it_had_not_stopped(
    tmp_path: Path, stop: int, score: str, recovery: str
) -> None:
    options: dict[str, Any] = {"recovery": recovery, "score": score, "deltaT": 2}
    straight = adapted(**options)
    optimizer = adamw(straight)
    train(straight, optimizer, 1, stop)
    straight.save_pretrained(str(tmp_path))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(straight, optimizer, stop + 1, 20)
    resumed = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)
    optimizer = adamw(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    train(resumed, optimizer, stop + 1, 20)
    assert_same_run(resumed, straight)
    assert sum(resumed.base_model.rank_pattern().values()) == TARGET


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_the_best_model_comes_back_at_the_end(tmp_path: Path, recovery: str) -> None:
    """It may be one of higher ranks than the last."""
    model = adapted(recovery=recovery)
    watch = Watch()
    trainer = trainer_of(
        model,
        tmp_path,
        callbacks=[RsAdaLoraCallback(), watch],
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first of all
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and best.endswith("checkpoint-2")
    assert watch.ranks[-1] == TARGET
    assert sum(model.base_model.rank_pattern().values()) == 36
    loaded = PeftModel.from_pretrained(tiny_llama(), best)
    torch.testing.assert_close(logits_of(model), logits_of(loaded), atol=1e-6, rtol=0)


def test_what_a_trainer_saves_is_what_it_trained(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "model"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=2e-6, rtol=0)
    sizes = sum(len(layer.lora_E["default"]) for _, layer in svd_layers(loaded))
    assert sizes == TARGET
