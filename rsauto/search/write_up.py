"""From a run trial to its record and its adapter's card."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from huggingface_hub import ModelCard, ModelCardData

from rsauto.config import StudyConfig
from rsauto.data import TokenisedData
from rsauto.memory.kinds import Prediction
from rsauto.records import EvalPoint, Outcome, StepPoint, TrialRecord, TrialSpec
from rsauto.scaling import gamma_r
from rsauto.training.member import Member
from rsauto.training.trial import Trial

_FROM_SPEC = (
    "role", "method", "rank", "init_rank", "target_rank", "alpha", "scaling_rule",
    "scaling_exponent", "init_scale", "target_modules", "learning_rate", "lr_ratio",
    "lambda_lr_ratio", "allocation", "head_learning_rate", "adapter_dtype", "quant_bits",
    "optimizer", "schedule", "warmup_share", "weight_decay", "max_grad_norm", "batch_size",
    "micro_batch_size", "product_order", "max_length", "num_evals", "seed", "retry_of",
)  # fmt: skip


class Run(Protocol):
    """A trial that was trained, alone or in a pack."""

    started_at: str
    curve: list[EvalPoint]
    last: StepPoint | None
    flops: float

    @property
    def rank_pattern(self) -> dict[str, int] | None: ...


def trial_record(
    number: int,
    run: Trial,
    spec: TrialSpec,
    prediction: Prediction,
    outcome: Outcome,
    error: str | None,
) -> TrialRecord:
    """The record of a trial that ran alone, however it ended."""
    record = _run_record(number, run, spec, prediction, outcome, error)
    seconds = run.train_seconds
    return replace(
        record,
        measured_peak_bytes=run.measured_peak_bytes,
        train_seconds=seconds or None,
        tokens_per_second=(record.tokens or 0) / seconds if seconds else None,
    )


def packed_record(
    number: int,
    member: Member,
    prediction: Prediction,
    outcome: Outcome,
    error: str | None,
    *,
    pack_id: str,
    pack_peak_bytes: int | None,
) -> TrialRecord:
    """The record of a trial of a pack, which has no peak and no clock of its own.

    Its micro-batch is the one that the prediction is for and that it would have alone: the pack's
    may be larger than the memory budget allows, and changes the result by rounding only.
    """
    size, order = prediction.micro_batch_size, prediction.product_order
    spec = replace(member.spec, micro_batch_size=size, product_order=order)
    return replace(
        _run_record(number, member, spec, prediction, outcome, error),
        engine="packed",
        pack_id=pack_id,
        pack_size=member.pack_size,
        pack_peak_bytes=pack_peak_bytes,
    )


def _run_record(
    number: int,
    run: Run,
    spec: TrialSpec,
    prediction: Prediction,
    outcome: Outcome,
    error: str | None,
) -> TrialRecord:
    last_point = run.curve[-1] if run.curve else None
    steps = run.last.step if run.last else 0
    metrics = dict(last_point.metrics) if last_point else {}
    pattern = run.rank_pattern
    return TrialRecord(
        number=number,
        outcome=outcome,
        **{name: getattr(spec, name) for name in _FROM_SPEC},
        gamma_r=_gamma_r(spec),
        r_max=max(pattern.values()) if pattern else spec.rank,
        rank_pattern=pattern,
        steps=steps,
        tokens=run.last.tokens if run.last else 0,
        fidelity=steps / spec.steps,
        eval_loss=last_point.eval_loss if last_point else None,
        perplexity=metrics.pop("perplexity", None),
        metrics=metrics,
        curve=tuple(run.curve),
        num_trainable_params=prediction.num_trainable_params,
        flops=run.flops or None,
        predicted_peak_bytes=prediction.peak_bytes,
        predicted_reserved_bytes=prediction.reserved_bytes,
        worker=worker_name(),
        started_at=run.started_at,
        error=error,
    )


def worker_name() -> str:
    """This process, as records name it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def infeasible_record(number: int, spec: TrialSpec, smallest: Prediction) -> TrialRecord:
    """The record of a configuration the planner refused; nothing of it was run."""
    return TrialRecord(
        number=number,
        outcome="infeasible",
        **{name: getattr(spec, name) for name in _FROM_SPEC if name != "micro_batch_size"},
        micro_batch_size=smallest.micro_batch_size,
        gamma_r=_gamma_r(spec),
        r_max=spec.init_rank or spec.rank,
        num_trainable_params=smallest.num_trainable_params,
        predicted_peak_bytes=smallest.peak_bytes,
        predicted_reserved_bytes=smallest.reserved_bytes,
        worker=worker_name(),
        started_at=now(),
        error="does not fit the memory budget",
    )


def lost_record(number: int, spec: TrialSpec, error: str, worker: str | None) -> TrialRecord:
    """The record of a trial that never came to its end; nothing of what it did is known."""
    return TrialRecord(
        number=number,
        outcome="failed",
        **{name: getattr(spec, name) for name in _FROM_SPEC},
        gamma_r=_gamma_r(spec),
        r_max=spec.init_rank or spec.rank,
        steps=0,
        tokens=0,
        fidelity=0.0,
        worker=worker,
        started_at=now(),
        error=error,
    )


def _gamma_r(spec: TrialSpec) -> float:
    """The factor as training begins: of AdaLoRA's chosen rank, and of a pattern's mean rank."""
    rank = spec.rank
    if spec.allocation is not None and spec.allocation.scale_rank != "target":
        rank = spec.init_rank or rank
    return gamma_r(spec.scaling_rule, spec.alpha, rank, spec.scaling_exponent)


def trial_card(
    config: StudyConfig,
    base_name: str,
    record: TrialRecord,
    data: TokenisedData,
    further_results: str = "",
) -> str:
    """The adapter's README.md: what it is, how it was trained, how to load it.

    ``further_results`` are lines of Markdown that follow those on the validation rows.
    """
    is_classifier = config.data.task == "SEQ_CLS"
    metadata = ModelCardData(
        base_model=None if "/" not in base_name else base_name,
        library_name="peft",
        pipeline_tag="text-classification" if is_classifier else "text-generation",
        tags=["lora", "rsauto"],
    )
    base = f"quantised to {record.quant_bits} bits, " if record.quant_bits else ""
    head = ""
    if record.head_learning_rate is not None:
        head = f"| learning rate of the head | {record.head_learning_rate:g} |\n"
    metrics = "".join(f"| {name} | {value:.4g} |\n" for name, value in record.metrics.items())
    content = f"""---
{metadata.to_yaml()}
---
# LoRA adapter, rank {record.rank}{" on average" if record.rank_pattern else ""}

Trained by rsauto in study `{config.name}`, trial {record.number}, on the frozen base model
`{base_name}`, {base}with seed {record.seed}.

The files hold plain LoRA of scale 1 (`lora_alpha` = `r`): the factor gamma_r = \
{record.gamma_r:.6g} it was trained with is folded into the factors.

| trained with | |
|---|---|
| method | {record.method} |
| rank, alpha | {record.rank}, {record.alpha} |
| learning rate (A), lr_ratio (B/A) | {record.learning_rate:g}, {record.lr_ratio:g} |
{_rank_rows(record)}{head}\
| optimizer, schedule | {record.optimizer}, {record.schedule} |
| steps x batch size | {record.steps} x {record.batch_size} |

| on the validation rows | |
|---|---|
| eval_loss | {record.eval_loss:.4f} |
{metrics}{further_results}
```python
{_loading_code(base_name, data)}
```
"""
    return str(ModelCard(content))


def _rank_rows(record: TrialRecord) -> str:
    """Rows of the card that say how rank is spread, where modules differ."""
    if record.rank_pattern is None:
        return ""
    empty = sum(rank == 0 for rank in record.rank_pattern.values())
    rows = (
        f"| ranks of the modules | up to {record.r_max}; {empty} of them are not adapted |\n"
        f"| a server must allow | rank {record.r_max} |\n"
    )
    if record.allocation is not None:
        rows += (
            f"| rank at the start | {record.init_rank} in every module |\n"
            f"| learning rate of lambda | {record.lambda_lr_ratio:g} times that of A |\n"
        )
    return rows


def _loading_code(base_name: str, data: TokenisedData) -> str:
    """Python that puts the adapter on its base model."""
    auto, options = "AutoModelForCausalLM", ""
    if data.label_names is not None:
        auto = "AutoModelForSequenceClassification"
        options = f"""
    id2label={dict(enumerate(data.label_names))!r},
    ignore_mismatched_sizes=True,  # of a head with other classes; the adapter brings its own
    pad_token_id={data.pad_token_id},
"""
    name = repr(base_name)
    imports = f"from peft import PeftModel\nfrom transformers import {auto}\n"
    if base_name == "embedded":
        name = "MODEL_DIR"
        imports += "\nfrom rsauto.embedded import MODEL_DIR\n"
    return f"""{imports}
base = {auto}.from_pretrained({name}{"," if options else ""}{options})
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
