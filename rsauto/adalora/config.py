"""`RsAdaLoraConfig`: AdaLoRA in PEFT's own spelling, with rsLoRA's factor.

Its fields are those of PEFT's AdaLoraConfig and mean the same, but that `use_rslora` is obeyed and
the factor follows the target rank:

    gamma_r = lora_alpha / sqrt(R)    use_rslora=True, the default  (arXiv:2312.03732, theorem 3.2)
    gamma_r = lora_alpha / R          use_rslora=False

with R the target_r (``scale_rank="target"``), the init_r ("init"; with use_rslora=False what PEFT's
AdaLoRA does), or the rank a module has at the moment ("live"). A constant factor only changes what
alpha means; it is the same in every module, so that a target rank can be compared with an rsLoRA
trial of that rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import LoraConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from rsauto.adalora.budget import BudgetSchedule
from rsauto.adalora.importance import Score
from rsauto.adalora.orthogonality import OrthForm
from rsauto.errors import nearest
from rsauto.scaling import gamma_r


class _PeftTypeName(str):
    """A type of PEFT's that is not in its list, which is an enumeration of strings."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """As the members of that list have it; transformers asks for it."""
        return str(self)


PEFT_TYPE = _PeftTypeName("RSADALORA")

ScaleRank = Literal["target", "init", "live"]
Recovery = Literal["paper", "none"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "scale_rank": get_args(ScaleRank),
    "score": get_args(Score),
    "recovery": get_args(Recovery),
    "orth_reg_form": get_args(OrthForm),
}

_UNSUPPORTED = (
    "use_dora", "use_qalora", "loftq_config", "alpha_pattern", "layer_replication", "lora_bias",
    "target_parameters", "eva_config", "corda_config", "lora_ga_config", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "use_bdlora", "alora_invocation_tokens",
    "megatron_config", "trainable_token_indices",
)  # fmt: skip
"""Fields of LoraConfig that AdaLoRA has no meaning for; PEFT ignores most of them silently."""


@dataclass
class RsAdaLoraConfig(LoraConfig):
    """AdaLoRA on rsLoRA. Raises ValueError for values that cannot be trained with."""

    use_rslora: bool = field(default=True, metadata={"help": "alpha/sqrt(R), else alpha/R."})
    target_r: int = field(default=8, metadata={"help": "Mean rank of the modules at the end."})
    init_r: int = field(default=12, metadata={"help": "Rank of every module at the start."})
    tinit: int = field(default=0, metadata={"help": "Steps of warm-up at the initial rank."})
    tfinal: int = field(default=0, metadata={"help": "Last steps, at a fixed pattern."})
    deltaT: int = field(default=1, metadata={"help": "Steps between two allocations."})
    beta1: float = field(default=0.85, metadata={"help": "Smoothing of the sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "Smoothing of the uncertainty."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "Of the orthogonality of P and Q in the objective."}
    )
    orth_reg_form: OrthForm = field(
        default="norm",
        metadata={"help": "norm: mean of Frobenius norms (PEFT); squared: sum of squares (paper)."},
    )
    total_step: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the whole run."}
    )
    scale_rank: ScaleRank = field(
        default="target", metadata={"help": "R in gamma_r: target, init or live."}
    )
    score: Score = field(
        default="full", metadata={"help": "full: P, lambda, Q; lambda: without state per entry."}
    )
    recovery: Recovery = field(
        default="paper",
        metadata={"help": "paper: masked triplets can come back; none: their tensors are freed."},
    )
    init_std: float | None = field(
        default=None,
        metadata={"help": "Of P's and Q's entries at the start; None: vectors of unit length."},
    )

    def __post_init__(self) -> None:
        unsupported = self._unsupported()  # before PEFT empties some of them
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type: Any = PEFT_TYPE
        problems = [*self._wrong_choices(), *self._wrong_numbers(), *unsupported]
        if problems:
            raise ValueError(" ".join(problems))
        if self.total_step is not None:
            self.schedule(num_modules=1)

    def _wrong_choices(self) -> list[str]:
        return [
            f"{name}: {value!r} is not known.{nearest(str(value), list(known))} "
            f"Choose one of {', '.join(known)}."
            for name, known in _CHOICES.items()
            if (value := getattr(self, name)) not in known
        ]

    def _wrong_numbers(self) -> list[str]:
        problems = []
        for name, least in (("target_r", 1), ("init_r", 1), ("tinit", 0), ("tfinal", 0),
                            ("deltaT", 1)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name}: {value!r} is not a whole number of at least {least}.")
        for name in ("beta1", "beta2"):
            if not 0 < _number(getattr(self, name)) < 1:
                problems.append(f"{name}: {getattr(self, name)!r} must be between 0 and 1.")
        if not problems and self.target_r > self.init_r:
            problems.append(
                f"target_r: {self.target_r} is above init_r, which is {self.init_r}. Ranks only "
                "fall: raise init_r, usually to 1.5 or 2 times target_r."
            )
        if not _number(self.orth_reg_weight) >= 0:
            problems.append(f"orth_reg_weight: {self.orth_reg_weight!r} must be 0 or more.")
        if not _number(self.lora_alpha) > 0:
            problems.append(f"lora_alpha: {self.lora_alpha!r} must be more than 0.")
        if self.init_std is not None and not _number(self.init_std) > 0:
            problems.append(f"init_std: {self.init_std!r} must be more than 0, or None.")
        if not isinstance(self.use_rslora, bool):
            problems.append(f"use_rslora: {self.use_rslora!r} is neither true nor false.")
        total = self.total_step
        if total is not None and (isinstance(total, bool) or not isinstance(total, int)):
            problems.append(f"total_step: {total!r} is not a whole number.")
        if self.r not in (8, self.target_r):
            problems.append(f"r: {self.r} has no meaning here. Set init_r and target_r instead.")
        return problems

    def _unsupported(self) -> list[str]:
        problems = [
            f"{name}: not supported by AdaLoRA. Leave it out."
            for name in _UNSUPPORTED
            if getattr(self, name, None)
        ]
        if self.rank_pattern and not self.inference_mode:
            problems.append(
                "rank_pattern: ranks are what AdaLoRA finds. Leave it out; it is written when the "
                "adapter is saved."
            )
        if not isinstance(self.init_lora_weights, bool):
            problems.append(
                f"init_lora_weights: {self.init_lora_weights!r} is for LoRA. Choose True (lambda "
                "starts at zero) or False (at random, to test with)."
            )
        return problems

    def schedule(self, num_modules: int) -> BudgetSchedule:
        """The rank budget of ``num_modules`` modules, step by step.

        Raises ValueError where the number of steps is not known, or leaves none to allocate in.
        """
        if self.total_step is None:
            raise ValueError(
                "total_step: not set, so the rank budget has no schedule. Give the number of "
                "optimizer steps of the whole run (transformers' Trainer: add RsAdaLoraCallback)."
            )
        if self.total_step < 1 or self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave no step to allocate ranks in, "
                f"of total_step {self.total_step}. Lower them, or train longer."
            )
        return BudgetSchedule(
            initial=self.init_r * num_modules,
            target=self.target_r * num_modules,
            tinit=self.tinit,
            tfinal=self.tfinal,
            total_step=self.total_step,
            delta_t=self.deltaT,
        )

    def gamma_r(self, active_rank: int) -> float:
        """The factor of a module that has ``active_rank`` triplets at the moment."""
        reference = {"target": self.target_r, "init": self.init_r, "live": max(1, active_rank)}
        rule: Literal["rslora", "lora"] = "rslora" if self.use_rslora else "lora"
        return gamma_r(rule, self.lora_alpha, reference[self.scale_rank])


def _number(value: Any) -> float:
    """Not a number where it is none, which no comparison is true of."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def register(tuner: type) -> None:
    """Makes PEFT know the configuration and its tuner.

    PEFT's own registration takes only methods of its closed list of types.
    """
    mappings: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, RsAdaLoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, "lora_"),
    )
    for mapping, value in mappings:
        mapping[PEFT_TYPE] = value
