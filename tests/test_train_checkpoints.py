"""A trial that is broken off and goes on in another place ends bit for bit as one that was not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import data_of
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from rsauto.base import prepare
from rsauto.data import Example, TokenisedData
from rsauto.records import AllocationSpec, TrialSpec
from rsauto.training.checkpoints import (
    Snapshot,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from rsauto.training.trial import Bench, Trial

STEPS = 9


def rows(count: int, seed: int, num_classes: int = 0) -> tuple[Example, ...]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        ids = tuple(draw.randrange(1, 64) for _ in range(draw.randrange(4, 12)))
        made.append(Example(ids, label=draw.randrange(num_classes) if num_classes else None))
    return tuple(made)


TEXTS = data_of(rows(20, 0), rows(6, 1), general=rows(3, 2))
CLASSES = data_of(rows(20, 0, 3), rows(6, 1, 3))
ALLOCATION = AllocationSpec(tinit=2, tfinal=3, orth_reg_weight=0.1)


def spec_of(**changes: Any) -> TrialSpec:
    values: dict[str, Any] = {
        "role": "search", "method": "rslora", "rank": 4, "alpha": 8, "scaling_rule": "rslora",
        "learning_rate": 1e-2, "lr_ratio": 4.0, "warmup_share": 0.3, "batch_size": 6,
        "micro_batch_size": 4, "steps": STEPS, "num_evals": 2, "seed": 3,
    }  # fmt: skip
    return TrialSpec(**values | changes)


def adalora(**changes: Any) -> TrialSpec:
    allocation = dataclasses.replace(ALLOCATION, **changes.pop("allocation", {}))
    ranks = {"init_rank": 6, "target_rank": 2, "rank": 2, "lambda_lr_ratio": 4.0}
    return spec_of(method="rsadalora", allocation=allocation, **ranks | changes)


SPECS = {
    "rslora": spec_of(),
    "adafactor in bfloat16": spec_of(optimizer="adafactor", adapter_dtype="bfloat16"),
    "sgd": spec_of(optimizer="sgd", schedule="cosine"),
    "rsadalora": adalora(),
    "rsadalora, by lambda alone": adalora(allocation={"score": "lambda", "scale_rank": "live"}),
    "rsadalora, only masked": adalora(allocation={"recovery": "paper", "delta_t": 2}),
    "rsadalora, adafactor": adalora(optimizer="adafactor", adapter_dtype="bfloat16"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(llama: LlamaForCausalLM) -> Bench:
    return bench_of(llama, TEXTS)


def bench_of(model: Any, data: TokenisedData, fresh: tuple[str, ...] = ()) -> Bench:
    return Bench(
        model=model,
        base_name="tiny",
        data=data,
        device=torch.device("cpu"),
        fresh_parameters=fresh,
        untouched_general_loss=4.0 if data.general else None,
    )


def trained(bench: Bench, spec: TrialSpec, begun: Snapshot | None, until: int) -> Snapshot:
    """The trial after ``until`` steps, its tensors copied."""
    with Trial(bench, spec, begun) as trial:
        for point in trial.steps():
            if point.step == until:
                break
        return copied(trial.snapshot())


def copied(kept: Snapshot) -> Snapshot:
    tensors = [{k: v.clone() for k, v in t.items()} for t in (kept.weights, kept.moments)]
    return dataclasses.replace(kept, weights=tensors[0], moments=tensors[1])


def require_equal(one: Snapshot, other: Snapshot) -> None:
    for own, others in ((one.weights, other.weights), (one.moments, other.moments)):
        assert own.keys() == others.keys()
        for name, tensor in own.items():
            assert tensor.dtype == others[name].dtype, name
            assert torch.equal(tensor, others[name]), name
    assert one.plain_moments == other.plain_moments
    assert timeless(one) == timeless(other)


def timeless(kept: Snapshot) -> Any:
    """Its progress without what clocks and the meter's windows make of it."""
    last = kept.progress.last
    assert last is not None
    return dataclasses.replace(
        kept.progress,
        started_at=None,
        last=dataclasses.replace(last, seconds=0.0),
        since_evaluation=(),
        train_seconds=0.0,
        measured_peak_bytes=None,
    )


def continued(bench: Bench, spec: TrialSpec, folder: Path, at: tuple[int, ...]) -> Snapshot:
    """Broken off after each of some steps, written, read, and gone on with."""
    begun = None
    for step in at:
        begun = read_checkpoint(write_checkpoint(folder, trained(bench, spec, begun, step)))
        assert begun.step == step
    return trained(bench, spec, begun, spec.steps)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sample(3)
def test_it_ends_as_if_nothing_had_happened(name: str, bench: Bench, tmp_path: Path) -> None:
    spec = SPECS[name]
    undisturbed = trained(bench, spec, None, spec.steps)
    require_equal(continued(bench, spec, tmp_path, (4, 7)), undisturbed)


def test_a_classifiers_head_goes_on_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=64, num_hidden_layers=1, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    prepare(model, gradient_checkpointing=False)
    bench = bench_of(model.eval(), CLASSES, ("classifier.weight", "classifier.bias"))
    spec = spec_of(head_learning_rate=1e-2)
    undisturbed = trained(bench, spec, None, STEPS)
    assert any(".modules_to_save." in name for name in undisturbed.weights)
    require_equal(continued(bench, spec, tmp_path, (4,)), undisturbed)


def test_what_is_restored_matters(bench: Bench, tmp_path: Path) -> None:
    """Each part of a checkpoint left out gives another end, so the comparison can fail."""
    spec = SPECS["rsadalora, only masked"]
    undisturbed = trained(bench, spec, None, STEPS)
    kept = trained(bench, spec, None, 5)
    scores = {k: v for k, v in kept.weights.items() if "sensitivity" not in k}
    spoilt = {
        "moments": dataclasses.replace(kept, moments={}),
        "scores": dataclasses.replace(kept, weights=scores),
        "losses": dataclasses.replace(
            kept, progress=dataclasses.replace(kept.progress, since_evaluation=())
        ),
    }
    for part, snapshot in spoilt.items():
        end = trained(bench, spec, copied(snapshot), STEPS)
        with pytest.raises(AssertionError):
            require_equal(end, undisturbed)
            print(f"{part} made no difference")
    require_equal(trained(bench, spec, kept, STEPS), undisturbed)


def test_peak_time_and_cost_are_of_all_runs(bench: Bench) -> None:
    spec = SPECS["rsadalora"]
    kept = trained(bench, spec, None, 7)
    with Trial(bench, spec, kept) as trial:
        list(trial.steps())
        peak = trial.measured_peak_bytes
        seconds = trial.train_seconds
        assert trial.started_at == kept.progress.started_at
    before = kept.progress.measured_peak_bytes
    assert before is not None and peak is not None and peak >= before
    assert seconds > kept.progress.train_seconds


def test_after_the_last_step_there_is_nothing_left_to_train(bench: Bench) -> None:
    spec = SPECS["rsadalora"]
    kept = trained(bench, spec, None, STEPS)
    with Trial(bench, spec, kept) as trial:
        assert list(trial.steps()) == []
        require_equal(trial.snapshot(), kept)
        assert trial.rank_pattern is not None and sum(trial.rank_pattern.values()) == 2 * 14


def test_the_last_two_are_kept_and_a_part_of_one_is_none(bench: Bench, tmp_path: Path) -> None:
    kept = trained(bench, SPECS["rslora"], None, 1)
    (tmp_path / ".step-00000009.1.partial").mkdir()  # of a process that was killed
    for step in (1, 2, 11):
        last = kept.progress.last
        assert last is not None
        moved = dataclasses.replace(last, step=step)
        progress = dataclasses.replace(kept.progress, last=moved)
        write_checkpoint(tmp_path, dataclasses.replace(kept, progress=progress))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000011"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "progress.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "progress.json").write_text('{"version": 99}'), "of another version"),
        (lambda path: (path / "adapter.safetensors").write_bytes(b"abc"), "cannot be read"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_says_so(
    spoil: Callable[[Path], Any], words: str, bench: Bench, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, trained(bench, SPECS["rslora"], None, 1))
    spoil(path)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(path)


def test_one_of_another_adapter_is_refused(bench: Bench) -> None:
    kept = trained(bench, SPECS["rslora"], None, 1)
    with pytest.raises(ValueError, match="checkpoint"):
        trained(bench, spec_of(rank=8), kept, 2)
