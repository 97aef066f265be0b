"""The section `search` of a study file: what is searched, by which strategy, and for how long."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rsauto.choices import (
    IntChoice,
    Part,
    PowerRange,
    Powers,
    RateChoice,
    RateRange,
    Rates,
    Targets,
    as_tuple,
)
from rsauto.records import ADALORA_METHODS, Method

Objective = Annotated[str, Field(min_length=1)]

MINIMISED = frozenset({"eval_loss", "train_loss", "perplexity", "general_loss", "forgetting"})
"""What is better when it is less; every other metric is better when it is more."""

Strategy = Literal["transfer", "tpe", "gp", "random", "grid", "cost"]

_EXPONENTS = ("scaling_exponent", "init_exponent")

SHORT_SEARCHES: tuple[Strategy, ...] = ("transfer", "tpe", "gp", "cost")
"""Strategies that end when no improvement is likely; random and grid are for their coverage."""


class SearchConfig(Part):
    """What is searched, how, and for how long."""

    trials: int = Field(24, ge=1)
    """Settled trials in the study, defaults and repeated seeds included."""
    strategy: Strategy = "transfer"
    """transfer: the learning rate is tuned at one low rank, moved to the others by the law of the
    scaling rule, and searched in a narrow band around it; tpe, gp, random: Optuna's samplers over
    the whole space; grid: every point, low ranks first; cost: the point with the most expected
    improvement for its time."""
    pruner: Literal["halving", "median", "none"] | None = None
    """halving: trials that began together are compared at the first evaluation after an eighth of
    their steps, and whenever these have doubled since; about half of them go on each time. median:
    a trial worse than the median of the others is given up. null: halving, but none for grid, which
    is for its coverage."""
    method: Annotated[tuple[Method, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "rslora",
    )
    rank: IntChoice = PowerRange(low=2, high=256)
    alpha: IntChoice = PowerRange(low=8, high=64)
    learning_rate: RateChoice = RateRange(low=1e-5, high=1e-2)
    """A range is centred anew for every rank by the law of its scaling rule; a list is exact."""
    reference_rank: int = Field(8, ge=1)
    """The rank for which a learning-rate range is meant, and at which transfer tunes it."""
    lr_ratio: Annotated[Rates, BeforeValidator(as_tuple)] = (1.0,)
    """LoRA+: learning rate of B over that of A."""
    target_modules: Annotated[tuple[Targets, ...], Field(min_length=1)] | None = None
    """Several choices of layers to search over; None uses model.target_modules."""
    scaling_exponent: Annotated[Powers, BeforeValidator(as_tuple)] | None = None
    """Power of r in gamma_r = alpha r^p, in place of the method's own (-1 for lora, -0.5 for
    rslora); a list is searched."""
    init_exponent: Annotated[Powers, BeforeValidator(as_tuple)] = (0.0,)
    """A is drawn r^p times as wide as PEFT draws it; a list is searched."""
    seeds: int = Field(3, ge=1)
    """Seeds on which the finalists are compared, the search's own included."""
    repeat: Literal["finalists", "tuned", "all"] = "finalists"
    """What is run on the other seeds: the finalists; of every method, rank and whatever else is
    searched the best learning rate; or all points of a grid."""
    baseline: bool = True
    """Also train PEFT's default adapter, as it is and at its own best learning rate."""
    within: float = Field(0.01, ge=0, lt=1)
    """Ranks whose objective is this close to the best (relative) count as good as the best."""
    min_improvement: float = Field(0.002, ge=0, lt=1)
    """The search ends when a further trial is expected to improve the best by less than this share
    of it; 0 never ends it. Not of account to random and grid."""
    objective: Objective = "eval_loss"
    direction: Literal["minimize", "maximize"] | None = None
    """None: losses, perplexity and forgetting are minimised, other metrics maximised."""
    max_seconds: float | None = Field(None, gt=0)
    """Stop asking for trials after this much wall time of one run."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop asking for trials once this many tokens were trained on, padding not counted."""
    max_gpu_hours: float | None = Field(None, gt=0)
    """Stop asking for trials once the study has held its devices for this long, all runs and all
    workers added up; on a CPU each process counts as one device."""
    max_failures: int = Field(3, ge=1)
    """Stop after this many failed trials in a row."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.strategy == "grid" and isinstance(self.learning_rate, RateRange):
            raise ValueError("strategy grid needs learning_rate as a list, such as [1e-4, 3e-4]")
        if self.repeat != "finalists" and self.strategy != "grid":
            raise ValueError(f"repeat {self.repeat} is for strategy grid, not for {self.strategy}")
        self._require_plain_lora()
        for name in ("rank", "alpha", "learning_rate", "lr_ratio", "method", *_EXPONENTS):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice")
        return self

    def _require_plain_lora(self) -> None:
        """Other exponents are for LoRA's two factors, and no law says how their rates move."""
        own = {"scaling_exponent": None, "init_exponent": (0.0,)}
        for name in (name for name in _EXPONENTS if getattr(self, name) != own[name]):
            if set(self.method) & set(ADALORA_METHODS):
                raise ValueError(f"{name} is for the methods lora and rslora only")
            if self.strategy in ("transfer", "cost"):
                raise ValueError(
                    f"{name} is for the strategies grid, random, tpe and gp: {self.strategy} moves "
                    "learning rates by the laws of lora and rslora"
                )
            if isinstance(self.learning_rate, RateRange):
                raise ValueError(f"{name} needs learning_rate as a list, such as [1e-4, 3e-4]")

    @property
    def chosen_pruner(self) -> Literal["halving", "median", "none"]:
        """The pruner that was asked for, or the strategy's own."""
        return self.pruner or ("none" if self.strategy == "grid" else "halving")

    @property
    def ranks(self) -> tuple[int, ...]:
        return _values(self.rank)

    @property
    def alphas(self) -> tuple[int, ...]:
        return _values(self.alpha)

    @property
    def minimize(self) -> bool:
        if self.direction is not None:
            return self.direction == "minimize"
        return self.objective in MINIMISED


def _values(choice: PowerRange | tuple[int, ...]) -> tuple[int, ...]:
    return choice.values() if isinstance(choice, PowerRange) else tuple(sorted(choice))
