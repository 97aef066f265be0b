"""The search space: what a sampler may choose, and the trial that a choice stands for.

A sampler works on numbers that suit it (log2 of a rank, an offset from the expected learning
rate); a `TrialSpec` holds the values themselves. The two are kept apart so that the space may be
widened later and old trials still teach the sampler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from rsauto.choices import PowerRange, RateRange
from rsauto.config import StudyConfig
from rsauto.records import ADALORA_METHODS, Method, TrialSpec
from rsauto.scaling import (
    ScalingRule,
    init_scale,
    learning_rate_exponent,
    transferred_learning_rate,
)
from rsauto.search.band import Band
from rsauto.search.whole import with_allocation, with_training

Params = dict[str, Any]

SCALING_RULES: dict[Method, ScalingRule] = {
    "lora": "lora",
    "rslora": "rslora",
    "adalora": "lora",
    "rsadalora": "rslora",
}

STORED_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "method": CategoricalDistribution(("lora", "rslora", "adalora", "rsadalora")),
    "rank": IntDistribution(1, 2**20, log=True),
    "alpha": IntDistribution(1, 2**20, log=True),
    "learning_rate": FloatDistribution(1e-12, 1e6, log=True),
    "lr_ratio": FloatDistribution(1e-6, 1e6, log=True),
}
"""How a trial's settings stand in the Optuna study, the same for every trial of every study."""


@dataclass(frozen=True)
class Space:
    """The search space of a study, restricted to the ranks that can fit."""

    config: StudyConfig
    ranks: tuple[int, ...]
    steps: int
    """Optimizer steps of a full-length trial."""
    max_length: int
    quant_bits: Literal[4, 8] | None = None
    """Of the base model, however it came to them."""
    bands: Mapping[Method, Band] = field(default_factory=dict)
    """Where a method's learning rates are searched; without one over their whole range."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """What the sampler chooses; a setting with one value is not part of the search."""
        search = self.config.search
        choices: dict[str, BaseDistribution | None] = {
            "method": _categorical(search.method),
            "log2_rank": _powers(search.rank, self.ranks),
            "rank": _listed(search.rank, self.ranks),
            "log2_alpha": _powers(search.alpha, search.alphas),
            "alpha": _listed(search.alpha, search.alphas),
            "lr_ratio": _categorical(search.lr_ratio),
            "lambda_lr_ratio": _categorical(self._lambda_lr_ratios()),
            "target_modules": _categorical(range(len(self.config.target_choices()))),
            "scaling_exponent": _categorical(search.scaling_exponent or ()),
            "init_exponent": _categorical(search.init_exponent),
        }
        rate = search.learning_rate
        if isinstance(rate, RateRange):
            half = self._half_searched()
            if half > 0:
                choices["log2_lr_offset"] = FloatDistribution(-half, half)
        else:
            choices["learning_rate"] = _categorical(rate)
        return {name: dist for name, dist in choices.items() if dist is not None}

    def spec(self, params: Params) -> TrialSpec:
        """The trial that a sampler's choice stands for."""
        search, targets = self.config.search, self.config.target_choices()
        method = params.get("method", search.method[0])
        rank = self._rank(params)
        chosen = TrialSpec(
            role="search",
            method=method,
            rank=rank,
            alpha=self._alpha(params),
            scaling_rule=SCALING_RULES[method],
            learning_rate=self._learning_rate(params, method, rank),
            lr_ratio=params.get("lr_ratio", search.lr_ratio[0]),
            target_modules=targets[params.get("target_modules", 0)],
            scaling_exponent=params.get("scaling_exponent", (search.scaling_exponent or [None])[0]),
            init_scale=init_scale(rank, params.get("init_exponent", search.init_exponent[0])),
        )
        return self._whole(chosen, params.get("lambda_lr_ratio"))

    def params(self, spec: TrialSpec) -> Params | None:
        """The sampler's choice that stands for a trial, None when it lies outside the space."""
        search, targets = self.config.search, self.config.target_choices()
        if spec.target_modules not in targets or not self._values_match(spec):
            return None
        full: Params = {
            "method": spec.method,
            "rank": spec.rank,
            "log2_rank": round(math.log2(spec.rank)),
            "alpha": spec.alpha,
            "log2_alpha": round(math.log2(spec.alpha)),
            "lr_ratio": spec.lr_ratio,
            "lambda_lr_ratio": spec.lambda_lr_ratio or self.config.adalora.lambda_lr_ratio[0],
            "target_modules": targets.index(spec.target_modules),
            "learning_rate": spec.learning_rate,
            "scaling_exponent": spec.scaling_exponent,
            "init_exponent": next(
                (p for p in search.init_exponent if init_scale(spec.rank, p) == spec.init_scale), 0
            ),
        }
        if isinstance(search.learning_rate, RateRange):
            centre = self.centre(spec.method, spec.rank)
            full["log2_lr_offset"] = math.log2(spec.learning_rate / centre)
        space = self.distributions()
        if not all(_contains(dist, full[name]) for name, dist in space.items()):
            return None
        return {name: _clipped(dist, full[name]) for name, dist in space.items()}

    def grid(self) -> Iterator[TrialSpec]:
        """Every point of the grid, low ranks first; with `search.repeat` all on every seed."""
        search = self.config.search
        assert not isinstance(search.learning_rate, RateRange)
        axes: dict[str, Sequence[Any]] = {
            "rank": self.ranks,
            "method": search.method,
            "scaling_exponent": search.scaling_exponent or (None,),
            "init_exponent": search.init_exponent,
            "alpha": search.alphas,
            "lr_ratio": search.lr_ratio,
            "target_modules": range(len(self.config.target_choices())),
            "learning_rate": search.learning_rate,
            "lambda_lr_ratio": self._lambda_lr_ratios() or (1.0,),
        }
        points = [
            self.spec(dict(zip(axes, values, strict=True)))
            for values in itertools.product(*axes.values())
        ]
        num_seeds = search.seeds if search.repeat == "all" else 1
        for k in range(num_seeds):
            # A ratio for lambda is of no account to LoRA: its points are the same.
            yield from (replace(spec, seed=spec.seed + k) for spec in dict.fromkeys(points))

    def middle(self, rank: int, method: Method | None = None) -> TrialSpec:
        """The trial in the middle of the space at ``rank``, rates at the centre of their range.

        Of the first method unless told otherwise.
        """
        search = self.config.search
        params: Params = {
            "rank": rank,
            "alpha": _middle(search.alphas),
            "method": method or search.method[0],
        }
        if not isinstance(search.learning_rate, RateRange):
            params["learning_rate"] = _middle(sorted(search.learning_rate))
        return self.spec(params)

    def points(self) -> Iterator[TrialSpec]:
        """Every point of a finite space; nothing where the learning rate is a range."""
        space = self.distributions()
        if any(isinstance(dist, FloatDistribution) for dist in space.values()):
            return
        for values in itertools.product(*map(_members, space.values())):
            yield self.spec(dict(zip(space, values, strict=True)))

    def default(self) -> TrialSpec:
        """PEFT's and Trainer's defaults: LoRA, rank 8, alpha 8, learning rate 5e-5, AdamW's kin."""
        chosen = TrialSpec(
            role="default",
            method="lora",
            rank=8,
            alpha=8,
            scaling_rule="lora",
            learning_rate=5e-5,
            target_modules=self.config.model.target_modules,
        )
        return self._whole(chosen)

    def default_tuned(self, learning_rate: float) -> TrialSpec:
        """The default adapter at another learning rate."""
        return replace(self.default(), role="default_tuned", learning_rate=learning_rate)

    def centre(self, method: Method, rank: int) -> float:
        """Where a learning-rate range is centred at ``rank``, by the law of its scaling rule.

        The geometric mean of the range at reference_rank, or what the study has found since, moved
        by `rate_exponent`.
        """
        if method in self.bands:
            return self.bands[method].centre(rank)
        search = self.config.search
        assert isinstance(search.learning_rate, RateRange)
        middle = math.sqrt(search.learning_rate.low * search.learning_rate.high)
        return self.transferred(method, middle, search.reference_rank, rank)

    def transferred(self, method: Method, rate: float, rank: int, other_rank: int) -> float:
        """A learning rate moved from one rank to another by the prior of the method's law."""
        return transferred_learning_rate(rate, rank, other_rank, self.rate_exponent(method))

    def has_law(self, method: Method) -> bool:
        """Whether the learning rate is known to move with rank: not for AdaLoRA or Adafactor."""
        return method not in ADALORA_METHODS and self.config.training.optimizer != "adafactor"

    def trusts_law(self, method: Method) -> bool:
        """Whether the law's prior was near what was measured: under AdamW it was, not under SGD
        (reports/learning-rate-exponents)."""
        return self.has_law(method) and self.config.training.optimizer == "adamw"

    def rate_exponent(self, method: Method) -> float:
        """Prior of the law, see `learning_rate_exponent`; 0 where there is none."""
        if not self.has_law(method):
            return 0.0
        return learning_rate_exponent(SCALING_RULES[method], self.config.training.optimizer)

    @property
    def half_octaves(self) -> float:
        """Half of the learning-rate range, in octaves."""
        rate = self.config.search.learning_rate
        low, high = (rate.low, rate.high) if isinstance(rate, RateRange) else (min(rate), max(rate))
        return math.log2(high / low) / 2

    def allowed_rate(self, rate: float) -> float:
        """The rate as it is run: as a person would copy it, or the nearest of a list."""
        chosen = self.config.search.learning_rate
        if isinstance(chosen, RateRange):
            return _copied(rate)
        return min(chosen, key=lambda listed: abs(math.log(listed / rate)))

    def _half_searched(self) -> float:
        """Half width of the learning rates to sample from, the widest of all methods."""
        halves = [
            self.bands[m].half_octaves if m in self.bands else self.half_octaves
            for m in self.config.search.method
        ]
        return max(halves)

    def moved_rate(self, spec: TrialSpec, rank: int) -> float:
        """The learning rate of a LoRA trial moved to another rank by the law of its rule."""
        rule = SCALING_RULES[spec.method]
        exponent = learning_rate_exponent(rule, spec.optimizer, spec.scaling_exponent)
        return _copied(transferred_learning_rate(spec.learning_rate, spec.rank, rank, exponent))

    def _rank(self, params: Params) -> int:
        if "log2_rank" in params:
            return int(2 ** params["log2_rank"])
        return int(params.get("rank", self.ranks[0]))

    def _alpha(self, params: Params) -> int:
        if "log2_alpha" in params:
            return int(2 ** params["log2_alpha"])
        return int(params.get("alpha", self.config.search.alphas[0]))

    def _learning_rate(self, params: Params, method: Method, rank: int) -> float:
        rate = self.config.search.learning_rate
        if isinstance(rate, RateRange):
            return _copied(self.centre(method, rank) * 2 ** params.get("log2_lr_offset", 0.0))
        return float(params.get("learning_rate", rate[0]))

    def _lambda_lr_ratios(self) -> tuple[float, ...]:
        return self.config.adalora.lambda_lr_ratio if self.config.allocates() else ()

    def _values_match(self, spec: TrialSpec) -> bool:
        search = self.config.search
        ratios = (None, *self._lambda_lr_ratios())
        return (
            spec.rank_pattern is None
            and spec.lambda_lr_ratio in ratios
            and spec.method in search.method
            and spec.alpha in search.alphas
            and spec.lr_ratio in search.lr_ratio
            and spec.rank in self.ranks
            and spec.scaling_exponent in (search.scaling_exponent or (None,))
            and spec.init_scale in {init_scale(spec.rank, p) for p in search.init_exponent}
        )

    def _whole(self, chosen: TrialSpec, lambda_lr_ratio: float | None = None) -> TrialSpec:
        """What was chosen, with what all trials have in common."""
        config = self.config
        if lambda_lr_ratio is None:
            lambda_lr_ratio = config.adalora.lambda_lr_ratio[0]
        allocated = with_allocation(chosen, config, self.steps, lambda_lr_ratio)
        return with_training(allocated, config, self.steps, self.max_length, self.quant_bits)


def stored_params(spec: TrialSpec) -> Params:
    """A trial's settings as they stand in the Optuna study."""
    return {name: getattr(spec, name) for name in STORED_DISTRIBUTIONS}


def _copied(rate: float) -> float:
    """As a person would copy it, which is what is run."""
    return float(f"{rate:.4g}")


def _middle(values: Sequence[Any]) -> Any:
    """The middle one of sorted values, the lower of two."""
    return values[(len(values) - 1) // 2]


def _categorical(values: Any) -> CategoricalDistribution | None:
    values = tuple(values)
    return CategoricalDistribution(values) if len(values) > 1 else None


def _powers(choice: Any, values: tuple[int, ...]) -> IntDistribution | None:
    if not isinstance(choice, PowerRange) or len(values) < 2:
        return None
    return IntDistribution(values[0].bit_length() - 1, values[-1].bit_length() - 1)


def _listed(choice: Any, values: tuple[int, ...]) -> CategoricalDistribution | None:
    return None if isinstance(choice, PowerRange) else _categorical(values)


def _members(dist: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(dist, CategoricalDistribution):
        return dist.choices
    assert isinstance(dist, IntDistribution)
    return tuple(range(dist.low, dist.high + 1))


def _contains(dist: BaseDistribution, value: Any) -> bool:
    if isinstance(dist, CategoricalDistribution):
        return value in dist.choices
    assert isinstance(dist, (IntDistribution, FloatDistribution))
    slack = 1e-3 if isinstance(dist, FloatDistribution) else 0  # rounding of learning rates
    return bool(dist.low - slack <= value <= dist.high + slack)


def _clipped(dist: BaseDistribution, value: Any) -> Any:
    if isinstance(dist, FloatDistribution):
        return min(max(value, dist.low), dist.high)
    return value
