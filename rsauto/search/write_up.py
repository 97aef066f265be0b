"""From a run trial to its record and its adapter's card."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from rsauto.card import Subject, model_card
from rsauto.config import StudyConfig
from rsauto.data import TokenisedData
from rsauto.environment import package_versions
from rsauto.memory.kinds import Prediction
from rsauto.records import ActivationMoments, EvalPoint, Outcome, StepPoint, TrialRecord, TrialSpec
from rsauto.scaling import gamma_r
from rsauto.training.log import Log
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
    log: Log
    moments: list[ActivationMoments]

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
        log=tuple(run.log.points),
        activation_moments=tuple(run.moments),
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
    model: str,
    test_metrics: Mapping[str, float] | None = None,
) -> str:
    """The README.md of a trial's adapter; ``model`` is the base's fingerprint."""
    return model_card(
        Subject(
            config=config,
            base_name=base_name,
            record=record,
            label_names=data.label_names,
            pad_token_id=data.pad_token_id,
            fingerprints={"model": model, "data": data.fingerprint},
            packages=package_versions(),
            test_metrics=test_metrics or {},
        )
    )


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
