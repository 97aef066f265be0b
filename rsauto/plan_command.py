"""What `rsauto plan` is asked for, checked before anything is traced, and its answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rsauto.choices import PowerRange
from rsauto.config import StudyConfig
from rsauto.errors import BudgetError, InputError
from rsauto.memory.changes import Change
from rsauto.memory.cost import parse_rate, study_cost
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.plan import Plan, plan
from rsauto.memory.plan_study import study_notes, study_settings
from rsauto.memory.profiles import Profiles
from rsauto.plan_view import budget_answer, cost_answer, fit_answer
from rsauto.units import bytes_text

LARGEST_RANK = 2**20
LARGEST_COUNT = 10**9
"""Trials, and steps of a trial."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked beside the plan itself. Raises InputError for what cannot be answered."""

    fit: int | None = None
    """A rank that is to fit."""
    trials: int | None = None
    steps: int | None = None
    flops_per_second: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {value} is not a whole number from 1 to {most}."
            for name, most in (
                ("fit", LARGEST_RANK), ("trials", LARGEST_COUNT), ("steps", LARGEST_COUNT)
            )
            if (value := getattr(self, name)) is not None and not 1 <= value <= most
        ]  # fmt: skip
        if self.price_per_hour is not None and not 0 < self.price_per_hour < 1e9:
            problems.append(
                f"price_per_hour: {self.price_per_hour} is no price. Give what an hour costs, "
                "such as 2.5."
            )
        if self.price_per_hour is not None and self.flops_per_second is None:
            problems.append("price_per_hour: give flops_per_second as well, such as 150T.")
        asks_cost = any((self.trials, self.steps, self.flops_per_second, self.price_per_hour))
        missing = [name for name in ("trials", "steps") if getattr(self, name) is None]
        if asks_cost and missing:
            problems.append(
                f"{' and '.join(missing)}: not given, and without them a study has no cost. Give "
                + " and ".join(f"--{name}" for name in missing)
                + ", or a study file that has them."
            )
        if problems:
            raise InputError(problems)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A plan to be made: the arguments of `rsauto.plan`, and what is asked beside it."""

    settings: Mapping[str, Any]
    questions: Questions
    notes: list[str] = field(default_factory=list)
    """What the settings assume, where they come from a study."""

    @classmethod
    def of_options(
        cls,
        options: Mapping[str, Any],
        config: StudyConfig | None,
        *,
        flops_per_second: str | None,
        **asked: Any,
    ) -> Request:
        """From the options of the command line; None stands for one that is not given."""
        given = {name: value for name, value in options.items() if value is not None}
        for name, parse in _PARSERS.items():
            if name in given:
                given[name] = parse(given[name])
        settings = given if config is None else study_settings(config, **given)
        rate = None if flops_per_second is None else parse_rate(flops_per_second)
        asks_cost = rate is not None or any(
            asked[name] is not None for name in ("trials", "steps", "price_per_hour")
        )
        if config is not None and (asks_cost or config.training.steps is not None):
            own = {"trials": config.search.trials, "steps": config.training.steps}
            asked |= {name: n for name, n in own.items() if asked[name] is None}
        questions = Questions(flops_per_second=rate, **asked)
        if questions.fit is not None and settings.get("memory_budget") is None:
            raise InputError(
                f"fit: rank {questions.fit} has nothing to fit in. Give --memory-budget, such as "
                "24GiB or rtx4090."
            )
        notes = [] if config is None else study_notes(config, settings)
        return cls(settings=settings, questions=questions, notes=notes)

    def plan(self, on_trace: Callable[[StepKind, StepSize], None]) -> Plan:
        """Raises InputError as `rsauto.plan` does, in the words of the options."""
        try:
            return plan(**self.settings, profiles=Profiles.on_disk(on_trace))
        except InputError as error:
            raise InputError([_in_options(problem) for problem in error.problems]) from error


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was asked beside the plan, answered."""

    sentences: list[str]
    result: dict[str, Any]
    """For JSON: the change and the cost, where asked."""


def answers(found: Plan, questions: Questions) -> Answers:
    """The largest rank, what makes a rank fit, and what a study costs."""
    sentences: list[str] = []
    result: dict[str, Any] = {}
    if found.memory_budget is not None:
        sentences.append(budget_answer(found))
        rank = questions.fit or (None if any_fits(found) else found.ranks[0].rank)
        if rank is not None:
            change = None if found.at(rank).fits else found.cheapest_change(rank)
            sentences.append(fit_answer(found, rank, change))
            result["change"] = None if change is None else _json_change(change)
    if questions.trials is not None and questions.steps is not None:
        rates = {
            "flops_per_second": questions.flops_per_second,
            "price_per_hour": questions.price_per_hour,
        }
        cost = study_cost(found, trials=questions.trials, steps=questions.steps, **rates)
        sentences.append(cost_answer(cost, steps=questions.steps, **rates))
        result["cost"] = asdict(cost)
    return Answers(sentences=sentences, result=result)


def require_fit(found: Plan) -> None:
    """Raises BudgetError where no rank of the table fits."""
    if not any_fits(found):
        raise BudgetError(
            f"memory_budget: none of these ranks fits {bytes_text(found.memory_budget_bytes)}. "
            "Raise the budget, or change what is said above."
        )


def any_fits(found: Plan) -> bool:
    """Whether a rank of the table fits; without a budget nothing is said to exceed it."""
    return any(row.fits is not False for row in found.ranks)


def parse_ranks(text: str) -> tuple[int, ...]:
    """(4, 8, 16, 100) from '4..16,100': numbers, and ranges of powers of two. Raises InputError."""
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})\s*(?:\.\.\s*(\d{1,7})\s*)?", part)
        low = int(match[1]) if match else 0
        high = int(match[2] or low) if match else 0
        if not 1 <= low <= high <= LARGEST_RANK:
            raise InputError(
                f"ranks: {part.strip()!r} is no rank. Give whole numbers from 1 to {LARGEST_RANK} "
                "separated by commas, such as 8,64,256, or powers of two from one to another, "
                "such as 4..256."
            )
        ranks += _powers(part, low, high) if low < high else [low]
    return tuple(ranks)


def _powers(part: str, low: int, high: int) -> tuple[int, ...]:
    odd = [number for number in (low, high) if number & (number - 1)]
    if odd:
        raise InputError(
            f"ranks: {part.strip()!r} is a range of powers of two, and {odd[0]} is none. Give "
            "powers of two at both ends, such as 4..256, or list the ranks."
        )
    return PowerRange(low=low, high=high).values()


def parse_targets(text: str) -> str | tuple[str, ...]:
    """'all-linear', 'attention', or names of layers. Raises InputError where a name is empty."""
    if text in ("all-linear", "attention"):
        return text
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InputError(
            f"target_modules: {text!r} names an empty layer. Give all-linear, attention, or names "
            "separated by commas, such as q_proj,v_proj."
        )
    return names


def parse_micro_batch(text: str) -> int | str:
    """A number, or 'auto'. Raises InputError."""
    if text == "auto":
        return text
    if not re.fullmatch(r"\d{1,9}", text):
        raise InputError(
            f"micro_batch_size: {text!r} is no number of sequences. Give a divisor of the batch "
            "size, or auto."
        )
    return int(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "ranks": parse_ranks,
    "target_modules": parse_targets,
    "micro_batch_size": parse_micro_batch,
}

_OPTION_WORDS = {
    "or, to classify texts, name the column of the class: data.label": (
        "or plan a classifier: --task SEQ_CLS"
    ),
    "or take data.label away": "or leave out --task SEQ_CLS",
    "model.name: ": "model: ",
}
"""Words of study files, and what they are called here."""


def _in_options(problem: str) -> str:
    for words, ours in _OPTION_WORDS.items():
        problem = problem.replace(words, ours)
    return re.sub(r"\bmodel\.(?=[a-z])", "", problem)


def _json_change(change: Change) -> dict[str, Any]:
    return {
        "rank": change.rank,
        "settings": dict(change.settings),
        "peak_bytes": change.prediction.peak_bytes,
        "needed_bytes": change.needed_bytes,
        "freed_bytes": change.freed_bytes,
        "words": str(change),
    }
