"""How the best learning rate moves with rank: the prior law, what the trials say, and whether they
agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rsauto.rate_law import RateLaw, RatePoint, Surface, fit_surface, whole_search_trials
from rsauto.records import Method, TrialRecord
from rsauto.report.kinds import kind_of
from rsauto.scaling import OptimizerName, ScalingRule, learning_rate_exponent

LAWFUL: tuple[tuple[Method, ScalingRule], ...] = (("rslora", "rslora"), ("lora", "lora"))
"""Methods with a law, and the scaling rule it follows from."""

_VAGUE = 1.0
"""Half width of an exponent's interval from which on its value says nothing: the rate would be
uncertain by the factor by which rank itself moves."""

_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RateFinding:
    """What the search trials of one kind say about its law."""

    kind: str
    """What reports call it, see ``kind_text``."""
    optimizer: OptimizerName
    prior: float
    """Exponent of the law that was assumed."""
    trials: tuple[RatePoint, ...]
    """Search trials at full length."""
    surface: Surface | None

    @property
    def law(self) -> RateLaw | None:
        return None if self.surface is None else self.surface.law

    @property
    def says(self) -> Literal["agree", "contradict", "too few", "too wide"]:
        """Whether the trials bear the prior out.

        An interval as wide as the laws of the two scaling rules are apart would agree with both.
        """
        if self.law is None:
            return "too few"
        if self.law.contradicts(self.prior):
            return "contradict"
        rules = [learning_rate_exponent(rule, self.optimizer) for _, rule in LAWFUL]
        return "too wide" if self.law.half_width > abs(rules[0] - rules[1]) else "agree"

    @property
    def is_vague(self) -> bool:
        """Whether a law was fitted that is too uncertain to be shown."""
        return self.law is not None and self.law.half_width > _VAGUE

    @property
    def sentence(self) -> str:
        prior = f"prior for {self.kind} under {_OPTIMIZERS[self.optimizer]} is {_power(self.prior)}"
        law = self.law
        if law is None:
            count = len(self.trials)
            trials = f"{count} search trial{'' if count == 1 else 's'} at full length"
            verb = "is" if count == 1 else "are"
            return f"The {prior}; {trials} {verb} too few to tell whether the rate moves so."
        if self.is_vague:
            return (
                f"How the learning rate moves with rank is left open by {law.num_trials} search "
                f"trials, the interval is too wide to tell; the {prior}."
            )
        ends = {
            "agree": "they agree",
            "contradict": "they contradict each other",
            "too wide": "the interval is too wide to tell",
        }
        return (
            f"Learning rate moves with rank as {_power(law.exponent)} (95 % {law.low:.2f} to "
            f"{law.high:.2f}, {law.num_trials} trials); the {prior}: {ends[self.says]}."
        )


def rate_findings(records: Sequence[TrialRecord]) -> tuple[RateFinding, ...]:
    """One for every kind with a law of which a search trial was run.

    Adafactor has no law; nor has a method that was searched with two optimizers, or with the power
    of rank overridden in some trials only. Methods whose power is overridden by one are one kind.
    """
    found: dict[str, RateFinding] = {}
    for method, rule in LAWFUL:
        ours = [r for r in records if r.role == "search" and r.method == method]
        kinds = {(r.optimizer, r.scaling_exponent) for r in ours}
        if len(kinds) != 1 or any(r.init_scale is not None for r in ours):
            continue
        name, exponent = kinds.pop()
        optimizer: OptimizerName | None = _lawful(name)
        if optimizer is None:
            continue
        kind = kind_of(ours[0])
        alike = found[kind].trials if kind in found else ()
        points = (*alike, *whole_search_trials(ours, method))
        found[kind] = RateFinding(
            kind=kind,
            optimizer=optimizer,
            prior=learning_rate_exponent(rule, optimizer, exponent),
            trials=points,
            surface=fit_surface(points),
        )
    return tuple(found.values())


def _lawful(optimizer: str) -> OptimizerName | None:
    if optimizer == "adamw":
        return "adamw"
    return "sgd" if optimizer == "sgd" else None


def _power(exponent: float) -> str:
    """'r^-0.25'; the prior of LoRA under AdamW is 'r^0', a rate that does not move."""
    text = f"{exponent:.2f}"
    return f"r^{'0' if text in ('0.00', '-0.00') else text}"
