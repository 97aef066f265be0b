"""The typed records that everything passes along. Standard library only.

A `TrialSpec` says what to train, a `StepPoint` is what training yields, a `TrialRecord` is how a
trial ended. Reports are made from records alone. Absent is None, never a sentinel number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T", bound="LogPoint | ActivationMoments")

Outcome = Literal["complete", "pruned", "infeasible", "oom", "diverged", "failed"]
Method = Literal["lora", "rslora", "adalora", "rsadalora"]
Role = Literal["default", "default_tuned", "search", "seed", "refit"]
ProductOrder = Literal["factors", "merged"]
"""How B A x is computed, see `rsauto.adapters.low_rank`."""

ADALORA_METHODS: tuple[Method, ...] = ("adalora", "rsadalora")
"""Methods that place their rank while they train."""

SETTLED_OUTCOMES: tuple[Outcome, ...] = ("complete", "pruned", "oom", "diverged", "failed")
"""Outcomes that cost a trial. A configuration refused by the planner costs none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationSpec:
    """How AdaLoRA places its rank in one trial (arXiv:2303.10512); steps are optimizer steps."""

    tinit: int
    """Steps of warm-up at the initial rank."""
    tfinal: int
    """Last steps, at a fixed pattern."""
    delta_t: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    orth_reg_form: Literal["norm", "squared"] = "norm"
    score: Literal["full", "lambda"] = "full"
    recovery: Literal["paper", "none"] = "none"
    scale_rank: Literal["target", "init", "live"] = "target"
    """The rank in gamma_r."""
    init_std: float | None = None
    """Of P's and Q's entries; None gives vectors of unit length."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Reads it, also from a newer version with fields this one does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


RankPattern = tuple[tuple[str, int], ...]
"""Names of modules, each with its rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything that decides the result of one trial. Equal specs give equal trials."""

    role: Role
    """default, default_tuned (its learning-rate search), search, seed (a finalist run again), or
    refit (rsLoRA with the rank pattern that AdaLoRA found)."""
    method: Method
    rank: int
    alpha: int
    scaling_rule: Literal["rslora", "lora"]
    scaling_exponent: float | None = None
    """Overrides the rule's power of r in gamma_r; None uses the rule's own."""
    init_scale: float | None = None
    """Multiplies A at initialisation (paper appendix B.3); None leaves PEFT's initialisation."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """'all-linear', 'attention', or module names."""
    learning_rate: float
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A."""
    lambda_lr_ratio: float | None = None
    """AdaLoRA: learning rate of lambda over that of Q."""
    head_learning_rate: float | None = None
    """Of a classifier's head; None for a causal language model."""
    init_rank: int | None = None
    """AdaLoRA: of every module at the start."""
    target_rank: int | None = None
    """AdaLoRA: mean over the modules at the end, which is `rank`."""
    allocation: AllocationSpec | None = None
    """AdaLoRA's; None for other methods."""
    rank_pattern: RankPattern | None = None
    """Rank of each module, where they differ; `rank` is then their mean."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    quant_bits: Literal[4, 8] | None = None
    """Of the frozen base; None where it is not quantised."""
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    batch_size: int = 16
    """Sequences per optimizer step (global)."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None until the memory planner has chosen it."""
    product_order: ProductOrder = "factors"
    """The order of operations that takes fewer at that micro-batch; results differ by rounding."""
    max_length: int = 512
    """Tokens per sequence, longer ones are truncated."""
    steps: int = 100
    num_evals: int = 4
    """Evaluations spread evenly over the steps, the last one after the last step."""
    seed: int = 0
    retry_of: int | None = None
    logging_steps: int | None = None
    """Steps between two points of the log; None keeps none."""
    activation_moments: bool = False
    """Whether moments of activations are measured at every evaluation."""
    cohort: int | None = None
    """Search trials of one cohort begin together and are compared at every rung; see `pruning`."""
    cohort_size: int | None = None
    """Trials of the cohort."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        targets = data.get("target_modules", "all-linear")
        allocation = data.get("allocation")
        pattern = data.get("rank_pattern")
        fixed = {
            "target_modules": targets if isinstance(targets, str) else tuple(targets),
            "allocation": None if allocation is None else AllocationSpec.from_json(allocation),
            "rank_pattern": None if pattern is None else tuple((n, r) for n, r in pattern),
        }
        return cls(**{**data, **fixed})

    def configuration(self) -> tuple[Any, ...]:
        """What makes two trials repetitions of one another: all but seed, role and bookkeeping."""
        found: tuple[Any, ...] = _CONFIGURATION(self)
        return found


_BOOKKEEPING = {
    "role", "retry_of", "cohort", "cohort_size", "logging_steps", "activation_moments",
}  # fmt: skip
_CONFIGURATION = attrgetter(
    *(
        f.name
        for f in dataclasses.fields(TrialSpec)
        if f.name not in _BOOKKEEPING | {"seed", "micro_batch_size", "product_order"}
    )
)
"""Asked for of every trial whenever one is proposed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPoint:
    """One point of a trial's curve; the losses are means per counted token, in nats."""

    step: int
    train_loss: float
    """Mean since the previous point."""
    eval_loss: float
    grad_norm: float
    """Mean Frobenius norm over trainable tensors (rsLoRA paper, figure 3), before clipping."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPoint:
    """Means over the steps since the point before."""

    step: int
    train_loss: float
    grad_norm: float
    """See `EvalPoint`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationMoments:
    """Of the adapted layers after some steps, on the same validation rows in every trial.

    y = W x + gamma_r B A x, v = dL/dy. Means over the entries of the layer's tensors, padding left
    out, and then over the layers. Definition 3.1 of the rsLoRA paper asks of an adapter that both
    gains do not depend on the rank; its appendix B.7 shows the moments of y.
    """

    step: int
    output_mean: float
    """Of y."""
    output_second: float
    """Of y squared."""
    adapter_second: float
    """Of (gamma_r B A x) squared."""
    adapter_grad_second: float
    """Of (gamma_r A^T B^T v) squared: the gradient that reaches x through the adapter."""
    forward_gain: float
    """Root of the mean square of gamma_r B A x over that of x."""
    backward_gain: float
    """Root of the mean square of gamma_r A^T B^T v over that of v."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPoint:
    """What the training loop yields after every optimizer step."""

    step: int
    """Steps done, from 1."""
    train_loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Tokens trained on so far, padding not counted."""
    seconds: float
    """Wall time of this step, evaluation excluded."""
    evaluation: EvalPoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """How a trial ended, whatever the outcome. One line of trials.jsonl."""

    number: int
    outcome: Outcome
    role: Role
    method: Method
    engine: Literal["peft", "packed"] = "peft"
    rank: int
    init_rank: int | None = None
    target_rank: int | None = None
    r_max: int | None = None
    """Largest rank of any module, what a server must be able to hold."""
    rank_pattern: dict[str, int] | None = None
    """Rank of each module at the end, where they may differ."""
    allocation: AllocationSpec | None = None
    alpha: int
    scaling_rule: str
    scaling_exponent: float | None = None
    init_scale: float | None = None
    gamma_r: float
    target_modules: str | tuple[str, ...]
    learning_rate: float
    lr_ratio: float
    lambda_lr_ratio: float | None = None
    head_learning_rate: float | None = None
    adapter_dtype: str = "float32"
    quant_bits: int | None = None
    optimizer: str
    schedule: str
    warmup_share: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    batch_size: int
    micro_batch_size: int | None = None
    product_order: ProductOrder = "factors"
    max_length: int
    seed: int
    steps: int | None = None
    """Optimizer steps done."""
    num_evals: int | None = None
    tokens: int | None = None
    fidelity: float | None = None
    """Steps done as a share of a full-length run."""
    eval_loss: float | None = None
    perplexity: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curve: tuple[EvalPoint, ...] = ()
    log: tuple[LogPoint, ...] = ()
    """Where training.logging_steps asks for it."""
    activation_moments: tuple[ActivationMoments, ...] = ()
    """One at every evaluation, where training.activation_moments asks for them."""
    num_trainable_params: int | None = None
    adapter_bytes: int | None = None
    flops: float | None = None
    smallest_budget_bytes: int | None = None
    """The smallest memory_budget it can be trained in: its need at the smallest micro-batch.

    The trial itself ran at the largest micro-batch that fits, so peaks of two ranks need not be at
    the same one; this number is."""
    predicted_peak_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    measured_peak_bytes: int | None = None
    memory_budget_bytes: int | None = None
    pack_id: str | None = None
    pack_size: int | None = None
    pack_peak_bytes: int | None = None
    train_seconds: float | None = None
    """Wall time of optimizer steps, evaluation excluded."""
    tokens_per_second: float | None = None
    retry_of: int | None = None
    worker: str | None = None
    started_at: str | None = None
    """UTC, ISO 8601."""
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Non-finite floats become None so that any JSON reader can parse it."""
        plain: dict[str, Any] = _finite(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Reads a record, also one from a newer version that has fields this one does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {key: value for key, value in data.items() if key in known}
        targets = kept.get("target_modules", "all-linear")
        kept["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
        kept["curve"] = tuple(_eval_point(point) for point in kept.get("curve") or ())
        kept["log"] = tuple(_numbers(LogPoint, point) for point in kept.get("log") or ())
        moments = kept.get("activation_moments") or ()
        kept["activation_moments"] = tuple(_numbers(ActivationMoments, m) for m in moments)
        if kept.get("allocation") is not None:
            kept["allocation"] = AllocationSpec.from_json(kept["allocation"])
        return cls(**kept)


_LOSSES = {"train_loss", "eval_loss", "grad_norm"}


def _eval_point(data: dict[str, Any]) -> EvalPoint:
    """A curve point; a loss written as null was not finite."""
    known = {f.name for f in dataclasses.fields(EvalPoint)}
    values: dict[str, Any] = {
        key: math.nan if key in _LOSSES and value is None else value
        for key, value in data.items()
        if key in known
    }
    return EvalPoint(**values)


def _numbers(kind: type[T], data: dict[str, Any]) -> T:
    """A record of numbers; one written as null was not finite."""
    known = {f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {
        key: math.nan if value is None else value for key, value in data.items()
    }
    return kind(**{key: value for key, value in values.items() if key in known})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def dump_line(record: TrialRecord) -> str:
    """One line of trials.jsonl, without the newline."""
    return json.dumps(record.to_json(), allow_nan=False, ensure_ascii=False)
